"""Loudness of samples, and the struck sounds in them: when, how strong, and of what they sound."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from ..picture import FPS
from ..scenes import FASTEST, TIMBRES
from ..sound import SAMPLE_RATE, strike

WINDOW, HOP = 512, 128
BANDS = np.array([0, 120, 190, 280, 400, 520, 640, 800, 1000, 1280, 1600, 2000, 2500, 3100, 3900, 4900, 6200, 8000.0])
SILENCE = 0.004  # root mean square below which nothing is heard
LEAST_STRENGTH = 0.25  # of the strongest onset in the clip
LEAST_GAP = 0.18  # seconds between onsets
LEAST_GROWTH = 1.5  # of the amplitude across an onset
MOST_LEFT = 0.75  # of the amplitude a quarter of a second after a stroke
TIMBRE_SECONDS = 0.12
LAG = 3  # hops across which a rise is measured


@dataclass(frozen=True)
class Onset:
    """One struck sound."""

    time: float  # seconds
    strength: float  # root mean square around its beginning, from 20 ms before to 80 ms after
    timbre: str


def loudness(samples: np.ndarray, frames: int) -> np.ndarray:
    """Root mean square around the time of each of so many frames."""
    power = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=float))])
    middle = np.arange(frames) / FPS * SAMPLE_RATE
    half = SAMPLE_RATE / FPS / 2
    first, last = (np.clip(middle + side, 0, len(samples)).astype(int) for side in (-half, half))
    return np.sqrt((power[last] - power[first]) / np.maximum(last - first, 1))


def spectrogram(samples: np.ndarray) -> np.ndarray:
    """Amplitudes [n, 257]; row i is centred on sample i * HOP."""
    padded = np.pad(samples.astype(np.float32), (WINDOW // 2, WINDOW))
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[:len(samples) + 1:HOP]
    return np.abs(np.fft.rfft(windows * np.hanning(WINDOW).astype(np.float32), axis=1)) / (WINDOW / 4)


def band_amplitudes(spectra: np.ndarray) -> np.ndarray:
    """[n, 257] -> [n, bands]."""
    frequencies = np.arange(spectra.shape[1]) * SAMPLE_RATE / WINDOW
    which = np.clip(np.searchsorted(BANDS, frequencies, "right") - 1, 0, len(BANDS) - 2)
    member = (which[:, None] == np.arange(len(BANDS) - 1)).astype(np.float32)
    return np.sqrt(np.square(spectra) @ member)


def onsets(samples: np.ndarray) -> list[Onset]:
    """Every sudden sound, whatever made it."""
    bands = band_amplitudes(spectrogram(samples))
    before = np.concatenate([np.zeros((LAG, bands.shape[1])), bands])[:len(bands)]
    rise = np.clip(bands - before, 0, None).sum(1)
    found: list[Onset] = []
    least = max(LEAST_STRENGTH * float(rise.max(initial=0)), SILENCE)
    for i in np.argsort(-rise):
        if rise[i] < least:
            break
        time = float(i - LAG / 2 + 0.9) * HOP / SAMPLE_RATE
        apart = all(abs(time - other.time) >= LEAST_GAP for other in found)
        if apart and _grows(samples, time) and _dies_away(samples, time):
            found.append(Onset(max(time, 0.0), _rms(samples, time - 0.02, time + 0.08), timbre(samples, time)))
    return sorted(found, key=lambda onset: onset.time)


def _dies_away(samples: np.ndarray, time: float) -> bool:
    """A struck sound does; noise and tones that go on do not."""
    later = _rms(samples, time + 0.2, time + 0.3)
    return later <= MOST_LEFT * _rms(samples, time - 0.02, time + 0.08)


def timbre(samples: np.ndarray, time: float) -> str:
    """The struck body whose spectrum is most like what sounds after that time."""
    found = _profile(samples, time)
    return max(TIMBRES, key=lambda name: float(found @ _known()[name]))


def _profile(samples: np.ndarray, time: float) -> np.ndarray:
    """Square roots of band amplitudes in the time after an onset, as a unit vector."""
    first = max(0, int(time * SAMPLE_RATE))
    part = samples[first:first + int(TIMBRE_SECONDS * SAMPLE_RATE)]
    means = np.sqrt(band_amplitudes(spectrogram(part)).mean(0))
    return means / max(float(np.linalg.norm(means)), 1e-9)


@cache
def _known() -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0)
    return {name: _profile(strike(name, FASTEST, SAMPLE_RATE // 4, noise), 0.0) for name in TIMBRES}


def _rms(samples: np.ndarray, start: float, end: float) -> float:
    part = samples[max(0, int(start * SAMPLE_RATE)):max(0, int(end * SAMPLE_RATE))]
    return float(np.sqrt(np.mean(np.square(part, dtype=float)))) if len(part) else 0.0


def _grows(samples: np.ndarray, time: float) -> bool:
    before, after = _rms(samples, time - 0.04, time - 0.012), _rms(samples, time, time + 0.03)
    return after >= SILENCE and after >= LEAST_GROWTH * before
