"""The sound of a scene: struck bodies at contacts, sung vowels in a face's speech."""

from __future__ import annotations

import numpy as np

from .picture import envelope
from .scenes import FASTEST, Scene

SAMPLE_RATE = 16_000

PARTIALS = {  # (frequency in Hz, amplitude, decay in seconds)
    "bell": ((1180.0, 0.5, 0.30), (2360.0, 0.3, 0.22), (3260.0, 0.25, 0.16), (5400.0, 0.12, 0.08)),
    "wood": ((560.0, 0.8, 0.030), (1390.0, 0.5, 0.020), (2250.0, 0.25, 0.012)),
    "drum": ((82.0, 1.0, 0.14), (150.0, 0.4, 0.08), (225.0, 0.15, 0.05)),
}
CLICKS = {"bell": (0.05, 0.002), "wood": (0.35, 0.004), "drum": (0.2, 0.010)}  # noise at the contact: amplitude, decay
STRIKE_SECONDS = 1.2  # after which a struck body is silent

FORMANTS = {"a": (730, 1090, 2440), "e": (530, 1840, 2480), "i": (270, 2290, 3010), "o": (500, 850, 2410),
            "u": (300, 650, 2240)}  # Hz; Peterson and Barney (1952), o and u moved apart
FORMANT_GAINS, FORMANT_WIDTHS = (1.0, 0.6, 0.3), (90.0, 130.0, 200.0)
PITCHES = {"low": 110.0, "high": 225.0}  # Hz
HIGHEST_HARMONIC = 4200.0  # Hz
VOICE_LEVEL = 0.38


def strike(timbre: str, speed: float, samples: int, noise: np.random.Generator) -> np.ndarray:
    """One contact: louder, the faster the impact."""
    times = np.arange(min(samples, int(STRIKE_SECONDS * SAMPLE_RATE))) / SAMPLE_RATE
    wave = sum(amplitude * np.sin(2 * np.pi * frequency * times) * np.exp(-times / decay)
               for frequency, amplitude, decay in PARTIALS[timbre])
    amplitude, decay = CLICKS[timbre]
    wave = wave + amplitude * noise.standard_normal(len(times)) * np.exp(-times / decay)
    return level(speed) * wave


def level(speed: float) -> float:
    """Amplitude of a contact at an impact speed."""
    return 0.5 * (0.25 + 0.75 * speed / FASTEST)


def formant_gains(vowel: str, frequencies: np.ndarray) -> np.ndarray:
    """Amplitudes of a voice's harmonics at these frequencies in Hz."""
    return 0.02 + sum(gain / (1 + ((frequencies - centre) / width) ** 2)
                      for centre, gain, width in zip(FORMANTS[vowel], FORMANT_GAINS, FORMANT_WIDTHS, strict=True))


def sing(vowel: str, pitch: float, phase: np.ndarray) -> np.ndarray:
    """A sustained vowel: harmonics of the pitch in Hz, shaped by the vowel's formants; `phase` is the pitch's."""
    harmonics = np.arange(1, int(HIGHEST_HARMONIC / pitch))
    gains = formant_gains(vowel, harmonics * pitch)
    return np.sqrt(pitch / 400.0) * sum(gain * np.sin(harmonic * phase)
                                        for gain, harmonic in zip(gains, harmonics, strict=True))


def vibrato(pitch: float, times: np.ndarray) -> np.ndarray:
    """Phase of a pitch in Hz that sways by one part in a hundred."""
    return 2 * np.pi * np.cumsum(pitch * (1 + 0.01 * np.sin(2 * np.pi * 5.5 * times))) / SAMPLE_RATE


def render_sound(scene: Scene, samples: int) -> np.ndarray:
    """[samples] float32 within -1..1 at 16 kHz."""
    noise = np.random.default_rng(scene.seed)
    wave = np.zeros(samples)
    if scene.ball:
        for time, speed in scene.ball.contacts(samples / SAMPLE_RATE):
            begin = round(time * SAMPLE_RATE)
            struck = strike(scene.ball.timbre, speed, samples - begin, noise)
            wave[begin:begin + len(struck)] += struck
    if scene.face:
        for start, end, vowel in scene.face.spoken():
            first, last = max(0, int(start * SAMPLE_RATE)), min(samples, int(end * SAMPLE_RATE))
            if first < last:
                times = np.arange(first, last) / SAMPLE_RATE
                pitch = PITCHES[scene.face.voice]
                sung = sing(vowel, pitch, vibrato(pitch, times))
                wave[first:last] += VOICE_LEVEL * envelope(times, start, end) * sung
    return np.clip(wave, -1, 1).astype(np.float32)
