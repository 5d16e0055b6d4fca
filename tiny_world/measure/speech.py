"""Sung vowels in samples: when, at which pitch, and which.

The amplitudes of a voice's harmonics are compared with those that each vowel's formants would give them at that pitch,
so that a vowel is known whoever sings it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..scenes import VOWELS
from ..sound import PITCHES, SAMPLE_RATE, formant_gains
from .face import spans
from .sounds import SILENCE

STEP = 160  # samples between values of the contour
SHORTEST = 0.15  # seconds above half of its peak that a vowel lasts
LEAST_OF_CLIP = 0.12  # of the loudest voice
PITCH_RANGE = (85.0, 300.0)
CLEAR = 0.45  # autocorrelation at the pitch, from which a sound is a voice
VOICE_BAND, LEAST_VOICE = (150.0, 1000.0), 0.25  # share of power there: of voices most, of bells and drums little
HIGHEST, FLOOR_DB = 3400.0, -32.0


@dataclass(frozen=True)
class Sung:
    """One sung vowel; times in seconds, pitch in Hz."""

    start: float
    end: float
    vowel: str
    pitch: float

    @property
    def voice(self) -> str:
        return "low" if self.pitch < (PITCHES["low"] * PITCHES["high"]) ** 0.5 else "high"


def sung(samples: np.ndarray) -> list[Sung]:
    """Every sung vowel of a clip."""
    contour = _contour(samples)
    found = []
    for first, last in spans(contour, max(SILENCE, LEAST_OF_CLIP * float(contour.max(initial=0))), 3):
        held: np.ndarray = first + np.flatnonzero(contour[first:last] >= 0.5 * contour[first:last].max())
        start, end = int(held[0]) * STEP, (int(held[-1]) + 1) * STEP
        if end - start >= SHORTEST * SAMPLE_RATE:
            vowel = _vowel(samples[start:end])
            if vowel:
                found.append(Sung(first * STEP / SAMPLE_RATE, last * STEP / SAMPLE_RATE, *vowel))
    return found


def _contour(samples: np.ndarray) -> np.ndarray:
    """Root mean square over 25 ms, every 10 ms."""
    power = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=float))])
    middle = np.arange(0, len(samples), STEP)
    first, last = np.clip(middle - 200, 0, len(samples)), np.clip(middle + 200, 0, len(samples))
    return np.sqrt((power[last] - power[first]) / np.maximum(last - first, 1))


def _vowel(part: np.ndarray) -> tuple[str, float] | None:
    """(vowel, pitch) of a stretch of sound, None where it is no voice."""
    size = 1 << int(np.ceil(np.log2(2 * len(part))))
    power = np.abs(np.fft.rfft(part * np.hanning(len(part)), size)) ** 2
    frequencies = np.arange(len(power)) * SAMPLE_RATE / size
    inside = (frequencies >= VOICE_BAND[0]) & (frequencies < VOICE_BAND[1])
    pitch, clarity = _pitch(power, size)
    if clarity < CLEAR or power[inside].sum() < LEAST_VOICE * power.sum():
        return None
    return _nearest(power, frequencies, pitch), pitch


def _pitch(power: np.ndarray, size: int) -> tuple[float, float]:
    """(Hz, clarity 0..1): the shortest period at which the sound is nearly as like itself as at any."""
    correlation = np.fft.irfft(power, size)
    shortest, longest = (int(SAMPLE_RATE / hertz) for hertz in PITCH_RANGE[::-1])
    lags = correlation[:longest + 2] / max(float(correlation[0]), 1e-12)
    peaks = [lag for lag in range(shortest, longest + 1) if lags[lag] >= lags[lag - 1] and lags[lag] > lags[lag + 1]]
    if not peaks:
        return 0.0, 0.0
    best = max(float(lags[lag]) for lag in peaks)
    if best <= 0:
        return 0.0, 0.0
    lag = next(lag for lag in peaks if lags[lag] >= 0.9 * best)
    return SAMPLE_RATE / lag, best


def _nearest(power: np.ndarray, frequencies: np.ndarray, pitch: float) -> str:
    """The vowel whose harmonics are most like those found."""
    harmonics = np.arange(1, int(HIGHEST / pitch) + 1)
    edges = [int(np.searchsorted(frequencies, (k + 0.5) * pitch)) for k in range(len(harmonics) + 1)]
    found = _decibels(np.array([power[first:last].sum() for first, last in pairwise(edges)]))
    distances = {name: float(np.abs(found - _decibels(formant_gains(name, harmonics * pitch) ** 2)).mean())
                 for name in VOWELS}
    return min(distances, key=lambda name: distances[name])


def _decibels(power: np.ndarray) -> np.ndarray:
    """Below the strongest, and not below a floor."""
    return np.maximum(10 * np.log10(np.maximum(power, 1e-12) / max(float(power.max()), 1e-12)), FLOOR_DB)
