"""Clips of the small world, and what an approximate model, a codec or a careless export does to them."""

import io

import av
import numpy as np
from ovi_native.tiny_world.picture import render_frames
from ovi_native.tiny_world.scenes import Scene
from ovi_native.tiny_world.sound import render_sound


def clip(scene: Scene, seconds: float = 2.0, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """frames [24 s + 1, size, size, 3] and samples."""
    return render_frames(scene, int(seconds * 24) + 1, size), render_sound(scene, int(seconds * 16_000))


def rough(frames: np.ndarray, samples: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Blurred by a pixel, colour halved in resolution and off by blocks, noise over both, a quarter as loud."""
    soft = frames.astype(np.float32)
    for axis in (1, 2):
        soft = (np.roll(soft, 1, axis) + 2 * soft + np.roll(soft, -1, axis)) / 4
    grey = soft.mean(-1, keepdims=True)
    count, size = frames.shape[:2]
    colour = (soft - grey).reshape(count, size // 2, 2, size // 2, 2, 3).mean((2, 4)).repeat(2, 1).repeat(2, 2)
    colour += random.normal(0, 8, (count, size // 8, size // 8, 3)).repeat(8, 1).repeat(8, 2)
    noisy = grey + colour + random.normal(0, 6, frames.shape)
    return np.clip(noisy + 0.5, 0, 255).astype(np.uint8), 0.25 * samples + random.normal(0, 0.002, len(samples))


def through_h264(frames: np.ndarray) -> np.ndarray:
    """Written as an mp4 (crf 23, 4:2:0) and read back."""
    file = io.BytesIO()
    with av.open(file, "w", "mp4") as out:
        stream = out.add_stream("libx264", 24, width=frames.shape[2], height=frames.shape[1], pix_fmt="yuv420p",
                                options={"crf": "23", "threads": "1"})
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        out.mux(stream.encode())
    file.seek(0)
    with av.open(file) as back:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in back.decode(video=0)])
