"""What a set of clips is worth: the figures of `tiny_world.measure` over many of them, with chance beside each.

Chance is the same count with every picture judged by the next clip's sound, and every clip by the next one's caption.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import mean

import numpy as np
from ovi_native.tiny_world import measure
from ovi_native.tiny_world.captions import parse

NAMES = {"ball": "ball's colour", "place": "place", "speed": "speed", "timbre": "timbre", "square": "square's colour",
         "square_place": "square's place", "hat": "hat's colour", "voice": "voice", "vowels": "vowels heard",
         "mouth_vowels": "vowels seen"}
SEEN = tuple(NAMES[name] for name in ("ball", "place", "speed", "square", "square_place", "hat", "mouth_vowels"))
HEARD = tuple(NAMES[name] for name in ("timbre", "voice", "vowels"))
"""What a caption asks of the picture, and of the sound."""
Scores = dict[str, tuple[float, float]]
"""(value, chance) by name."""


@dataclass(frozen=True, eq=False)
class Clip:
    """A decoded clip and what was asked for."""

    caption: str
    frames: np.ndarray  # [T, S, S, 3] uint8
    samples: np.ndarray  # [N] at 16 kHz

    @cached_property
    def report(self) -> measure.Report:
        return measure.describe(self.frames, self.samples)


def marks(clips: list[Clip], shift: int = 0) -> dict[str, float]:
    """Share that is right of each thing that captions ask for; `shift` judges by another clip's caption."""
    found: dict[str, list[float]] = {}
    for i, clip in enumerate(clips):
        for name, value in measure.judge(clip.report, parse(clips[(i + shift) % len(clips)].caption)).items():
            found.setdefault(name, []).append(value)
    return {name: mean(found[name]) for name in NAMES if name in found}


def lips(clips: list[Clip], shift: int = 0) -> list[float]:
    """Correlation of mouth and loudness in each clip with a face that speaks."""
    faces = [(clip.report.mouth.opening, clip.report.loudness) for clip in clips
             if parse(clip.caption).vowels is not None and clip.report.mouth]
    out = []
    for i, (opening, _) in enumerate(faces):
        loud = faces[(i + shift) % len(faces)][1]
        length = min(len(loud), len(opening))
        value = measure.correlation(np.sqrt(opening[:length]), np.sqrt(loud[:length]))
        out.append(0.0 if value is None else value)
    return out


def scores(clips: list[Clip]) -> Scores:
    """All figures of a set of clips."""
    balls = [clip.report for clip in clips if parse(clip.caption).ball is not None]
    events = [(report.motion.bounces, [onset.time for onset in report.onsets]) for report in balls]
    out = {}
    if len(balls) > 1:
        out["sync F1"] = measure.pooled(report.sync for report in balls).f1, measure.chance(events).f1
    right, others = marks(clips), marks(clips, 1)
    out |= {NAMES[name]: (value, others.get(name, float("nan"))) for name, value in right.items()}
    if right_lips := lips(clips):
        out["mouth and loudness"] = mean(right_lips), mean(lips(clips, 1))
    return out


def table(rows: dict[str, Scores]) -> str:
    """Markdown: a row for each score, a column for each set of clips, chance in brackets."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = ["| | " + " | ".join(rows) + " |", "|---|" + "---|" * len(rows)]
    for name in names:
        cells = [f"{row[name][0]:.3f} ({row[name][1]:.2f})" if name in row else "" for row in rows.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
