"""What is in an mp4 or a sound file."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import av
import numpy as np


@dataclass(frozen=True)
class Media:
    """A decoded mp4 or sound file; times in seconds."""

    codecs: dict[str, str]
    fps: float
    rate: int
    frames: np.ndarray  # [F, H, W, 3] uint8
    sound: np.ndarray  # [samples, channels] -1..1
    starts: dict[str, float]
    durations: dict[str, float]


def read_media(content: bytes) -> Media:
    """Decode every stream of a file with PyAV."""
    with av.open(io.BytesIO(content), "r") as container:
        streams = {stream.type: stream for stream in container.streams}
        pictures, sounds = [], []
        for frame in container.decode(*streams.values()):
            if isinstance(frame, av.VideoFrame):
                pictures.append(frame.to_ndarray(format="rgb24"))
            elif isinstance(frame, av.AudioFrame):
                sounds.append(_samples(frame))
        video, audio = container.streams.video, container.streams.audio
        return Media(
            codecs={kind: stream.codec_context.name for kind, stream in streams.items()},
            fps=float(video[0].average_rate or 0) if video else 0.0,
            rate=audio[0].rate if audio else 0,
            frames=np.stack(pictures) if pictures else np.zeros((0, 0, 0, 3), np.uint8),
            sound=np.concatenate(sounds) if sounds else np.zeros((0, 1), np.float32),
            starts={kind: _seconds(stream.start_time, stream) for kind, stream in streams.items()},
            durations={kind: _seconds(stream.duration, stream) for kind, stream in streams.items()},
        )


def _seconds(value: int | None, stream: Any) -> float:
    return float((value or 0) * stream.time_base)


def _samples(frame: av.AudioFrame) -> np.ndarray:
    values = frame.to_ndarray()
    if values.dtype.kind == "i":
        values = values.astype(np.float32) / -float(np.iinfo(values.dtype).min)
    return values.T if frame.format.is_planar else values.reshape(-1, frame.layout.nb_channels)
