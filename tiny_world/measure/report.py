"""All that is found in one clip, in figures and in a sentence, and against what its caption asks for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..captions import WHERE, Asked
from ..picture import FPS
from ..sound import SAMPLE_RATE
from . import face as faces
from .motion import Motion, motion
from .scores import Sync, correlation, matches, right_share, sync
from .shapes import SQUARENESS, Body, bodies, cover, on_grid
from .sounds import SILENCE, Onset, loudness, onsets
from .speech import Sung, sung

EARLY = 0.06  # seconds before a vowel's start in which an onset is that vowel's own


@dataclass(frozen=True, eq=False)
class Report:
    """What was found in a clip. Times in seconds, lengths in 64ths of the frame, None for what is not there."""

    frames: int
    seconds_of_sound: float
    loudest: float  # sample
    ball: Body | None
    square: Body | None
    motion: Motion  # of the ball
    face: bool
    hat: str | None  # its colour
    mouth: faces.Mouth | None
    loudness: np.ndarray  # [frames], root mean square
    onsets: tuple[Onset, ...]  # struck sounds
    vowels: tuple[Sung, ...]  # heard

    @property
    def sync(self) -> Sync:
        """Of bounces and struck sounds."""
        return sync(self.motion.bounces, [onset.time for onset in self.onsets])

    @property
    def timbre(self) -> str | None:
        """What most struck sounds are."""
        names = [onset.timbre for onset in self.onsets]
        return max(dict.fromkeys(names), key=names.count) if names else None

    @property
    def voice(self) -> str | None:
        names = [vowel.voice for vowel in self.vowels]
        return max(dict.fromkeys(names), key=names.count) if names else None

    @property
    def heard(self) -> tuple[str, ...]:
        """The vowels, in order."""
        return tuple(vowel.vowel for vowel in self.vowels)

    @property
    def lip_sync(self) -> float | None:
        """Correlation of the mouth's opening with the loudness; both as square roots, which evens the vowels out."""
        return correlation(np.sqrt(self.mouth.opening), np.sqrt(self.loudness)) if self.mouth else None

    @property
    def sentence(self) -> str:
        """All of it for a person."""
        return _sentence(self)


def describe(frames: np.ndarray, samples: np.ndarray) -> Report:
    """frames [T, S, S, 3] uint8 at 24 a second, samples [N] at 16 kHz within -1..1. Either may be empty (T or N is 0).

    Raises:
        ValueError: for other shapes and types, and for samples that are no numbers.
    """
    frames, samples = _checked(frames, samples)
    grid = on_grid(frames) if len(frames) else np.zeros((0, 64, 64, 3), np.float32)
    x = faces.face_x(grid)
    covers = cover(grid)
    ball, square = (None, None) if x is not None or not len(grid) else _ball_and_square(bodies(covers))
    vowels = sung(samples)
    struck = [onset for onset in onsets(samples)
              if not any(vowel.start - EARLY <= onset.time <= vowel.end for vowel in vowels)]
    return Report(frames=len(frames), seconds_of_sound=len(samples) / SAMPLE_RATE,
                  loudest=float(np.abs(samples).max(initial=0)), ball=ball, square=square,
                  motion=motion(ball.y) if ball else Motion((), (), 0.0), face=x is not None,
                  hat=faces.hat(covers) if x is not None else None,
                  mouth=faces.mouth(grid, x) if x is not None else None,
                  loudness=loudness(samples, len(frames)), onsets=tuple(struck), vowels=tuple(vowels))


def _checked(frames: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    frames, samples = np.asarray(frames), np.asarray(samples)
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.shape[1] != frames.shape[2] or frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [T, S, S, 3], "
                         "square pictures of 0..255. Crop or scale them first.")
    if len(frames) and not 32 <= frames.shape[1] <= 1024:
        raise ValueError(f"frames are {frames.shape[1]} pixels wide; expected 32 to 1024. Scale them first.")
    if samples.ndim != 1 or samples.dtype.kind != "f":
        raise ValueError(f"samples are {samples.dtype} {list(samples.shape)}; expected one channel of floating point "
                         "numbers, [N] at 16 kHz. Take the mean of the channels, and divide whole numbers by 32768.")
    if not np.isfinite(samples).all():
        raise ValueError("samples hold values that are no finite numbers; expected -1..1.")
    return frames, (samples - samples.mean() if len(samples) else samples).astype(np.float32)


def _ball_and_square(found: list[Body]) -> tuple[Body | None, Body | None]:
    """Of the two largest, the ball is the one that bounces more, else the rounder one. What does not bounce beside a
    ball is a square; one body alone is a square only if it has corners as well."""
    two = sorted(found[:2], key=lambda body: (-len(motion(body.y).bounces), body.squareness))
    floats = [not motion(body.y).falls for body in two]
    if len(two) == 2:
        return two[0], two[1] if floats[1] or two[1].squareness >= SQUARENESS else None
    if two and floats[0] and two[0].squareness >= SQUARENESS:
        return None, two[0]
    return (two[0] if two else None), None


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}" + ("" if number == 1 else "s")


def _sentence(report: Report) -> str:
    parts = [_face_words(report) if report.face else _ball_words(report)]
    if not report.frames:
        parts.append("no picture")
    if not report.seconds_of_sound:
        parts.append("no sound track")
    elif report.loudest < SILENCE:
        parts.append("silence")
    elif not report.onsets and not report.vowels:
        parts.append("a sound without strokes or voices")
    return ", ".join(parts)


def _ball_words(report: Report) -> str:
    counts = [_count(len(report.motion.bounces), "bounce"), _count(len(report.onsets), "sound")]
    offsets = report.sync.offsets
    if offsets:
        some = len(offsets) < max(report.sync.bounces, report.sync.sounds)
        counts.append(f"{len(offsets)} of them together " * some
                      + f"within {_count(max(1, round(max(map(abs, offsets)) * FPS)), 'frame')}")
    seen = [_body_words(body, name) for body, name in ((report.ball, "ball"), (report.square, "square")) if body]
    heard = [f"a {report.timbre}"] if report.timbre else []
    if report.vowels:
        heard.append(f"a {report.voice} voice that sings {' '.join(report.heard)}")
    return ", ".join(counts) + ": " + ", ".join([" and ".join(seen) or "neither a ball nor a face", *heard])


def _body_words(body: Body, name: str) -> str:
    return f"a {body.colour} {name} {WHERE[body.place]}"


def _face_words(report: Report) -> str:
    opened = len(report.mouth.vowels) if report.mouth else 0
    words = [f"a face{f' with a {report.hat} hat' if report.hat else ''}", f"its mouth opens {_count(opened, 'time')}"]
    if report.vowels:
        words.append(f"a {report.voice} voice sings {' '.join(report.heard)}")
        if report.lip_sync is not None:
            words.append(f"mouth and loudness agree at {report.lip_sync:.2f}")
    else:
        words.append("no voice")
    if report.onsets:
        words.append(f"{_count(len(report.onsets), 'struck sound')} ({report.timbre})")
    return ", ".join(words)


def loudness_by_speed(reports: Iterable[Report]) -> float | None:
    """Correlation of impact speeds with the strengths of their sounds; both are taken from their timbre's mean."""
    heard: dict[str, list[tuple[float, float]]] = {}
    for report in reports:
        for i, j in matches(report.motion.bounces, [onset.time for onset in report.onsets]):
            onset = report.onsets[j]
            heard.setdefault(onset.timbre, []).append((report.motion.impacts[i], onset.strength))
    if not heard:
        return None
    speeds, strengths = np.concatenate([np.subtract(pairs, np.mean(pairs, 0)) / (1, np.mean(pairs, 0)[1])
                                        for pairs in heard.values()]).T
    return correlation(speeds, strengths)


def judge(report: Report, asked: Asked) -> dict[str, float]:
    """What a caption asks for and whether it is there: 1 or 0, the vowels' right share; only what the caption says."""
    found = {"ball": report.ball.colour if report.ball else None, "place": report.ball.place if report.ball else None,
             "speed": report.motion.speed, "timbre": report.timbre,
             "square": report.square.colour if report.square else None,
             "square_place": report.square.place if report.square else None, "hat": report.hat, "voice": report.voice}
    marks = {name: float(value == getattr(asked, name)) for name, value in found.items()
             if getattr(asked, name) is not None}
    if asked.vowels is not None:
        marks["vowels"] = right_share(report.heard, asked.vowels)
        marks["mouth_vowels"] = right_share(report.mouth.vowels if report.mouth else (), asked.vowels)
    return marks
