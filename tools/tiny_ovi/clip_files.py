"""Clips of the small world as a user would have them: a folder of mp4 files, each with its caption in a .txt beside it.

Needs numpy and PyAV, which come with ComfyUI, and not ComfyUI itself.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from standalone import standalone

captions, picture, scenes, sound = (standalone(name, "tiny_world")
                                    for name in ("captions", "picture", "scenes", "sound"))
BT709 = 1  # as matrix, primaries and transfer alike
LESSON = "ovi_tiny_purple_ball"
"""The folder of clips for the training template, below ComfyUI's input folder."""
NEW_CLIPS, KNOWN_CLIPS, LESSON_SECONDS = 24, 24, 2.0


def purple_scenes(count: int, seconds: float, seed: int = 0, held_out: bool = False) -> list[Any]:
    """Scenes with a purple ball, which no clip of the world has; all else as the world draws it."""
    random = np.random.default_rng(seed)
    found: list[Any] = []
    while len(found) < count:
        scene = scenes.draw_scene(random, seconds, kind="ball")
        scene = replace(scene, ball=replace(scene.ball, colour=scenes.NEW_COLOUR))
        if scene.held_out == held_out:
            found.append(scene)
    return found


def write_clip(path: Path, scene: Any, seconds: float) -> None:
    """One scene as an mp4 of 64x64, 24 frames a second and 16 kHz, and its caption."""
    frames = picture.render_frames(scene, int(seconds * picture.FPS) + 1)
    samples = sound.render_sound(scene, len(frames) * sound.SAMPLE_RATE // picture.FPS)
    with av.open(str(path), "w", format="mp4") as output:
        video = output.add_stream("libx264", rate=picture.FPS, options={"crf": "10"})
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        encoder = video.codec_context
        encoder.colorspace = encoder.color_primaries = encoder.color_trc = BT709
        encoder.color_range = ColorRange.MPEG
        audio = output.add_stream("aac", rate=sound.SAMPLE_RATE, layout="mono")
        for frame in frames:
            output.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p", src_color_range=ColorRange.JPEG, dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG)))
        heard = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        heard.sample_rate, heard.pts, heard.time_base = sound.SAMPLE_RATE, 0, Fraction(1, sound.SAMPLE_RATE)
        output.mux(audio.encode(heard))
        output.mux(video.encode(None))
        output.mux(audio.encode(None))
    path.with_suffix(".txt").write_text(captions.caption(scene) + "\n", "utf-8")


def write_lesson(folder: Path, new: int = NEW_CLIPS, known: int = KNOWN_CLIPS, seed: int = 0) -> Path:
    """The folder that teaches purple balls, the same every time: clips of them, and of what the world already has.

    Without the latter all balls turn purple. Returns the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    others = [scenes.draw_scene(random, LESSON_SECONDS) for _ in range(known)]
    for name, drawn in ("purple_ball", purple_scenes(new, LESSON_SECONDS, seed)), ("known", others):
        for number, scene in enumerate(drawn):
            write_clip(folder / f"{name}_{number:02}.mp4", scene, LESSON_SECONDS)
    return folder
