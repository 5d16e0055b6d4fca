"""The world's sounds in tune with the frames of a spectrogram: what the vocoder is taught to say.

Spectra hold no phases, so many waveforms have the same ones, and a network that is to give one of them is told to give
none. Here every tone is moved to a multiple of 62.5 Hz, of which a whole number of periods fits the 256 samples of a
frame, and begins with the frame; noise repeats every frame. Then the same spectrum means the same 256 samples wherever
it stands, and learning them is a plain regression. Ears and `tiny_world.measure` hear the same: bells, wood and drums
move by less than a semitone but for the drum's lowest partial, voices sing at 125 and 250 Hz in place of 110 and 225.
"""

from __future__ import annotations

import numpy as np
from ovi_native.tiny_world.picture import envelope
from ovi_native.tiny_world.scenes import Scene
from ovi_native.tiny_world.sound import (
    CLICKS,
    PARTIALS,
    PITCHES,
    SAMPLE_RATE,
    STRIKE_SECONDS,
    VOICE_LEVEL,
    level,
    sing,
)

FRAME = 256  # samples
STEP = SAMPLE_RATE / FRAME  # Hz
CLICK = np.random.default_rng(5).standard_normal(FRAME)
SUNG = {voice: 2 * STEP * round(pitch / (2 * STEP)) for voice, pitch in PITCHES.items()}  # Hz


def in_tune(frequency: float) -> float:
    """The nearest frequency, in Hz, that fits a frame."""
    return STEP * max(1, round(frequency / STEP))


def locked_sound(scene: Scene, samples: int) -> np.ndarray:
    """[samples] float32 within -1..1 at 16 kHz: `tiny_world.sound.render_sound`, locked to frames."""
    times, wave = np.arange(samples) / SAMPLE_RATE, np.zeros(samples)
    if scene.ball:
        for time, speed in scene.ball.contacts(samples / SAMPLE_RATE):
            first = round(time * SAMPLE_RATE)
            here = times[first:first + int(STRIKE_SECONDS * SAMPLE_RATE)]
            wave[first:first + len(here)] += level(speed) * _strike(scene.ball.timbre, here, first)
    if scene.face:
        pitch = SUNG[scene.face.voice]
        for start, end, vowel in scene.face.spoken():
            part = slice(max(0, int(start * SAMPLE_RATE)), max(0, min(samples, int(end * SAMPLE_RATE))))
            here = times[part]
            wave[part] += VOICE_LEVEL * envelope(here, start, end) * sing(vowel, pitch, 2 * np.pi * pitch * here)
    return np.clip(wave, -1, 1).astype(np.float32)


def _strike(timbre: str, times: np.ndarray, first: int) -> np.ndarray:
    since = times - first / SAMPLE_RATE
    tones = sum(amplitude * np.sin(2 * np.pi * in_tune(frequency) * times) * np.exp(-since / decay)
                for frequency, amplitude, decay in PARTIALS[timbre])
    amplitude, decay = CLICKS[timbre]
    return tones + amplitude * CLICK[(first + np.arange(len(times))) % FRAME] * np.exp(-since / decay)
