"""Folders of real clips: scenes of the tiny world as mp4, webm, frames and wav, with their captions."""

from __future__ import annotations

import struct
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from ovi_native.ovi_model.media.mp4 import write_mp4
from ovi_native.tiny_world.captions import caption
from ovi_native.tiny_world.picture import render_frames
from ovi_native.tiny_world.scenes import draw_scene
from ovi_native.tiny_world.sound import render_sound
from PIL import Image

RATE = 16_000


def scene(seed: int, frames: int = 25) -> tuple[np.ndarray, np.ndarray, str]:
    """Frames [n, 64, 64, 3] uint8 at 24 a second, sound [N] at 16 kHz, caption."""
    drawn = draw_scene(np.random.default_rng(seed), frames / 24)
    return render_frames(drawn, frames), render_sound(drawn, frames * RATE // 24), caption(drawn)


def write_clip(path: Path, seed: int, frames: int = 25, text: str | None = None) -> Path:
    """An mp4 with sound, as the product itself writes it, and its caption beside it."""
    pictures, sound, words = scene(seed, frames)
    chunk = torch.from_numpy(pictures).float() / 255
    path.write_bytes(write_mp4([chunk], 24, torch.from_numpy(sound)[None].float(), RATE, 10).getvalue())
    path.with_suffix(".txt").write_text(words if text is None else text, "utf-8")
    return path


def write_silent(path: Path, pictures: np.ndarray, fps: float = 24, codec: str = "libx264", rotate: int = 0) -> Path:
    """A video file without sound of any kind."""
    options = {"crf": "10"} if codec == "libx264" else {"crf": "20", "b": "0", "cpu-used": "8", "deadline": "realtime"}
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    if rotate:
        turn(path, rotate)
    return path


def turn(path: Path, degrees: int) -> None:
    """Write a quarter turn into the track header of an mp4, as phones do."""
    a, b = {90: (0, 1), 270: (0, -1)}[degrees]
    matrix = struct.pack(">9i", a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30)
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    content = path.read_bytes()
    at = content.index(upright, content.index(b"tkhd"))
    path.write_bytes(content[:at] + matrix + content[at + len(matrix):])


def write_frames(folder: Path, pictures: np.ndarray, ending: str = "png") -> Path:
    """One picture file a frame, numbered without zeros in front."""
    folder.mkdir(parents=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"frame_{index}.{ending}")
    return folder


def write_sound(path: Path, sound: np.ndarray, rate: int = RATE) -> Path:
    """A wav of 16 bits; sound [N] or [N, channels]."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if sound.ndim == 1 else sound.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
    return path
