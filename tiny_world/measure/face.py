"""A speaking face in frames: whether there is one, the colour of its hat, how far and how wide its mouth is open."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..picture import FACE_X, FACE_Y, FPS, MOUTH, MOUTHS, OPEN_HALF_HEIGHT, SKIN

SKIN_REACH = 45.0  # distance in RGB
LEAST_SKIN = 0.12  # share of the frame; a face without hat and mouth has about 0.25
HAT_ROWS = slice(4, 26)
LEAST_HAT = 60.0  # pixels of the grid; a hat has about 430
MOUTH_ROWS, MOUTH_REACH = slice(38, 56), 13.5
REST_HALF_HEIGHT = 0.8
LEAST_OPENING, LEAST_SECONDS = 0.12, 0.12  # of a spoken vowel


@dataclass(frozen=True)
class Mouth:
    """opening [T], 0 closed, 1 as wide as for an a; half_width [T] in 64ths; vowels that the shapes look like."""

    opening: np.ndarray
    half_width: np.ndarray
    vowels: tuple[str, ...]


def skin(grid: np.ndarray) -> np.ndarray:
    """[T, 64, 64] bool."""
    return ((grid - np.array(SKIN, np.float32)) ** 2).sum(-1) < SKIN_REACH**2


def face_x(grid: np.ndarray) -> float | None:
    """The middle of the face from the left in 64ths, None where there is no face."""
    found = skin(grid)
    if not len(found) or found.mean() < LEAST_SKIN:
        return None
    columns = found[:, int(FACE_Y) - 10:int(FACE_Y) + 10].mean((0, 1))
    inside = np.flatnonzero(columns > 0.5 * columns.max()) + 0.5
    return float((inside[0] + inside[-1]) / 2) if len(inside) else FACE_X


def hat(covers: dict[str, np.ndarray]) -> str | None:
    """The colour that fills most of the upper part of the picture."""
    areas = {name: float(weights[:, HAT_ROWS].sum((1, 2)).mean()) for name, weights in covers.items()}
    best = max(areas, key=lambda name: areas[name])
    return best if areas[best] >= LEAST_HAT else None


def mouth(grid: np.ndarray, x: float) -> Mouth:
    """Of the face with its middle at x. grid [T, 64, 64, 3]."""
    towards = np.subtract(MOUTH, SKIN).astype(np.float32)
    columns = np.arange(grid.shape[2]) + 0.5 - x
    part = grid[:, MOUTH_ROWS][:, :, np.abs(columns) <= MOUTH_REACH]
    share = np.clip((part - np.array(SKIN, np.float32)) @ towards / (towards @ towards), 0, 1)
    share = np.clip((share - 0.15) / 0.7, 0, 1)
    middle = np.abs(columns[np.abs(columns) <= MOUTH_REACH]) <= 2.5
    half_height = share[:, :, middle].sum(1).mean(1) / 2
    half_width = share.sum((1, 2)) / (np.pi * np.maximum(half_height, REST_HALF_HEIGHT / 2))
    opening = np.clip((half_height - REST_HALF_HEIGHT) / OPEN_HALF_HEIGHT, 0, None)
    return Mouth(opening, half_width, _vowels(opening, half_width))


def _vowels(opening: np.ndarray, half_width: np.ndarray) -> tuple[str, ...]:
    """The nearest mouth of each time that it is open."""
    found = []
    for first, last in spans(opening, LEAST_OPENING, int(LEAST_SECONDS * FPS)):
        widest = np.sort(opening[first:last])[-3:]
        held: np.ndarray = first + np.flatnonzero(opening[first:last] >= widest[0])
        shape = np.array([np.median(opening[held]) * 10, np.median(half_width[held])])
        found.append(min(MOUTHS, key=lambda name: float(np.abs(shape - np.array(MOUTHS[name]) * (10, 1)).sum())))
    return tuple(found)


def spans(level: np.ndarray, least: float, shortest: int, dip: float = 0.5) -> list[tuple[int, int]]:
    """Stretches [first, last) where level [T] is at least so high, parted where it dips below a share of both peaks."""
    inside = np.flatnonzero(level >= least)
    parts = [(int(run[0]), int(run[-1]) + 1) for run in np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1)
             if len(run)]
    found = []
    while parts:
        first, last = parts.pop()
        ahead, back = np.maximum.accumulate(level[first:last]), np.maximum.accumulate(level[first:last][::-1])[::-1]
        depth = level[first:last] / np.minimum(ahead, back)
        lowest = int(np.argmin(depth))
        if depth[lowest] < dip and 0 < lowest < last - first - 1:
            parts += [(first, first + lowest), (first + lowest, last)]
        elif last - first >= shortest:
            found.append((first, last))
    return sorted(found)
