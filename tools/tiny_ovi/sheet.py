"""A picture of clips: some frames of each, evenly spaced, over its waveform; bounces and sounds marked where found."""

from __future__ import annotations

import numpy as np
from ovi_native.tiny_world.sound import SAMPLE_RATE
from PIL import Image, ImageDraw

from .scores import Clip

FRAMES, SIDE, WAVE = 12, 96, 56
PAPER, INK, SEEN, HEARD = (255, 255, 255), (70, 70, 80), (214, 40, 40), (40, 80, 215)


def row(clip: Clip) -> Image.Image:
    """One clip: caption, frames, waveform. Red: a bounce; blue: the beginning of a sound."""
    width = FRAMES * SIDE
    sheet = Image.new("RGB", (width, 16 + SIDE + WAVE), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 2), clip.caption, fill=INK)
    for place in range(FRAMES):
        index = int((place + 0.5) / FRAMES * len(clip.frames))  # what is seen in the middle of the waveform below
        frame = Image.fromarray(clip.frames[index]).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        sheet.paste(frame, (place * SIDE, 16))
    middle, per_pixel = 16 + SIDE + WAVE // 2, len(clip.samples) / width
    loudest = max(1e-3, float(np.abs(clip.samples).max()))
    for x in range(width):
        part = clip.samples[int(x * per_pixel):max(int(x * per_pixel) + 1, int((x + 1) * per_pixel))] / loudest
        draw.line([(x, middle - part.max() * WAVE / 2), (x, middle - part.min() * WAVE / 2)], fill=INK)
    seconds = len(clip.samples) / SAMPLE_RATE
    for time in clip.report.motion.bounces:
        seen = time / seconds * width
        draw.polygon([(seen - 4, 16 + SIDE + 7), (seen + 4, 16 + SIDE + 7), (seen, 16 + SIDE)], fill=SEEN)
    for onset in clip.report.onsets:
        heard = onset.time / seconds * width
        draw.line([(heard, 16 + SIDE + WAVE - 12), (heard, 16 + SIDE + WAVE)], fill=HEARD, width=2)
    return sheet


def sheet(clips: list[Clip]) -> Image.Image:
    """Several clips below each other."""
    rows = [row(clip) for clip in clips]
    whole = Image.new("RGB", (rows[0].width, sum(each.height + 6 for each in rows)), PAPER)
    top = 0
    for each in rows:
        whole.paste(each, (0, top))
        top += each.height + 6
    return whole
