"""How well picture and sound agree: bounces and onsets, mouths and voices, vowels found and asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..picture import FPS

TOLERANCE = 2 / FPS  # seconds between a bounce and its sound, at most


@dataclass(frozen=True)
class Sync:
    """Bounces and sounds matched one to one. Offsets in seconds, positive where the sound comes late."""

    bounces: int
    sounds: int
    offsets: tuple[float, ...]

    @property
    def precision(self) -> float:
        """Share of the sounds that have a bounce; 0 where there is none."""
        return len(self.offsets) / self.sounds if self.sounds else 0.0

    @property
    def recall(self) -> float:
        """Share of the bounces that have a sound; 0 where there is none."""
        return len(self.offsets) / self.bounces if self.bounces else 0.0

    @property
    def f1(self) -> float:
        """0 where there is neither bounce nor sound: nothing shows that they agree."""
        total = self.bounces + self.sounds
        return 2 * len(self.offsets) / total if total else 0.0

    @property
    def mean_offset(self) -> float | None:
        return float(np.mean(self.offsets)) if self.offsets else None


def sync(bounces: Sequence[float], sounds: Sequence[float], tolerance: float = TOLERANCE) -> Sync:
    """As many pairs as can be, each of one bounce and one sound. Times in seconds, ascending."""
    return Sync(len(bounces), len(sounds),
                tuple(sounds[j] - bounces[i] for i, j in matches(bounces, sounds, tolerance)))


def matches(bounces: Sequence[float], sounds: Sequence[float], tolerance: float = TOLERANCE) -> list[tuple[int, int]]:
    """Indices of bounces and sounds that belong together. The earliest that still fits is taken, which loses none."""
    found, i, j = [], 0, 0
    while i < len(bounces) and j < len(sounds):
        offset = sounds[j] - bounces[i]
        if abs(offset) <= tolerance:
            found.append((i, j))
        i, j = i + (offset >= -tolerance), j + (offset <= tolerance)
    return found


def pooled(parts: Iterable[Sync]) -> Sync:
    """All bounces and sounds of several clips counted together."""
    parts = list(parts)
    return Sync(sum(part.bounces for part in parts), sum(part.sounds for part in parts),
                tuple(offset for part in parts for offset in part.offsets))


def chance(clips: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Sync:
    """(bounces, sounds) of several clips, each picture with the sound of every other clip."""
    return pooled(sync(bounces, sounds) for i, (bounces, _) in enumerate(clips)
                  for j, (_, sounds) in enumerate(clips) if i != j)


def correlation(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float | None:
    """Pearson's, None where one of them does not change or there are fewer than 3 values."""
    a, b = (np.asarray(values, float) for values in (first, second))
    if len(a) < 3 or a.std() < 1e-9 or b.std() < 1e-9:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def right_share(found: Sequence[str], asked: Sequence[str]) -> float:
    """1 minus the edit distance over the longer length; 1 where both are empty."""
    row = list(range(len(asked) + 1))
    for i, one in enumerate(found, 1):
        above, row[0] = row[:], i
        for j, other in enumerate(asked, 1):
            row[j] = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (one != other))
    return 1 - row[-1] / max(len(found), len(asked), 1)
