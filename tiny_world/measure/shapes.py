"""Coloured shapes in frames of any size: how much of each colour every pixel shows, and which bodies that makes.

Frames are averaged down to the world's 64x64 first, which also averages noise away. Colour is read in the plane across
grey, where a soft edge before the grey wall changes the strength and keeps the hue.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..picture import SHADES
from ..scenes import PLACES

GRID = 64
HUE_REACH = 35.0  # degrees from a shade's hue that still are that colour
FAINT, FULL = 0.35, 0.8  # share of a shade's strength: below, a pixel is not of its colour; above, all of it is
LEAST_AREA = 35.0  # of a body, in pixels of the grid; a ball has 133, a square 121
LEAST_COLUMN = 1.0  # height of a body's outermost column, a mean over time
LEAST_TOGETHER = 0.6  # share of a body that is near its centre; of one colour all over the picture it is 0.1
SQUARENESS = 0.86  # a disc has 0.67, a square 1.0
SHAPE_REACH, SHAPE_FRAMES = 9.0, 24


@dataclass(frozen=True)
class Body:
    """One coloured body that keeps to its columns. x, y [T] in 64ths of the frame, NaN where it is not seen."""

    colour: str
    x: np.ndarray
    y: np.ndarray
    area: float
    together: float
    squareness: float

    @property
    def place(self) -> str:
        return min(PLACES, key=lambda name: abs(PLACES[name] - float(np.nanmean(self.x))))


def on_grid(frames: np.ndarray) -> np.ndarray:
    """[T, S, S, 3] uint8 -> [T, 64, 64, 3] float32, each value the mean of what it covers."""
    size = frames.shape[1]
    if size == GRID:
        return frames.astype(np.float32)
    edges = np.linspace(0, size, GRID + 1)
    low, high = edges[:-1, None], edges[1:, None]
    cells = np.arange(size)[None]
    weights = np.clip(np.minimum(high, cells + 1) - np.maximum(low, cells), 0, 1).astype(np.float32)
    weights /= weights.sum(1, keepdims=True)
    return np.stack([np.tensordot(weights, np.tensordot(weights, frame, (1, 0)), (1, 1)).transpose(1, 0, 2)
                     for frame in frames.astype(np.float32)])


def chroma(rgb: np.ndarray) -> np.ndarray:
    """[..., 3] -> complex [...]: hue as the angle, strength as the length; 0 for grey."""
    red, green, blue = (rgb[..., i] for i in range(3))
    return (red - 0.5 * (green + blue)) + 1j * (0.75**0.5 * (green - blue))


def cover(grid: np.ndarray) -> dict[str, np.ndarray]:
    """How much of each colour every pixel shows: [T, 64, 64] in 0..1."""
    seen: np.ndarray = chroma(grid).astype(np.complex64)
    shades = {name: complex(chroma(np.array(rgb, np.float32))) for name, rgb in SHADES.items()}
    turned = {name: seen * np.complex64(np.conj(shade) / abs(shade) ** 2) for name, shade in shades.items()}
    return {name: np.where(np.abs(part.imag) < np.tan(np.radians(HUE_REACH)) * part.real,
                           np.clip((np.abs(part) - FAINT) / (FULL - FAINT), 0, 1), 0)
            for name, part in turned.items()}


def bodies(covers: dict[str, np.ndarray]) -> list[Body]:
    """Every body large enough, the largest first."""
    found = []
    for colour, weights in covers.items():
        heights = weights.sum(1).mean(0)  # of each column
        inside = np.flatnonzero(heights >= LEAST_COLUMN)
        for columns in np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1):
            if len(columns) and heights[columns].sum() >= LEAST_AREA:
                found.append(_body(colour, weights, columns))
    found = [body for body in found if body.together >= LEAST_TOGETHER]
    return sorted(found, key=lambda body: -body.area)


def _body(colour: str, weights: np.ndarray, columns: np.ndarray) -> Body:
    first, last = max(0, int(columns[0]) - 2), int(columns[-1]) + 3
    part = weights[:, :, first:last]
    areas = part.sum((1, 2))
    seen = areas > 0.3 * np.median(areas[areas > 0])
    total = np.where(seen, areas, np.nan)
    rows, across = np.arange(GRID) + 0.5, np.arange(first, first + part.shape[2]) + 0.5
    x, y = (part.sum(1) @ across) / total, (part.sum(2) @ rows) / total
    return Body(colour, x, y, float(areas.mean()), *_shape(part, across, rows, x, y))


def _shape(part: np.ndarray, across: np.ndarray, rows: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The share of the body that is near its centre, and its squareness.

    Squareness is E[dx^2 dy^2] / (E[dx^2] E[dy^2]), whatever the size: 2/3 for a disc, 1 for an upright square.
    """
    chosen = np.flatnonzero(np.isfinite(y))
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(len(chosen), SHAPE_FRAMES)).astype(int)]
    dx, dy = (np.abs(line[None] - centre[chosen, None]) for line, centre in ((across, x), (rows, y)))
    near = part[chosen] * (dx < SHAPE_REACH)[:, None, :] * (dy < SHAPE_REACH)[:, :, None]
    together = float(near.sum() / part[chosen].sum())
    across2, down2 = dx[:, None, :] ** 2, dy[:, :, None] ** 2
    spread = float((near * across2).sum() * (near * down2).sum())
    return together, float(near.sum() * (near * across2 * down2).sum()) / spread if spread > 0 else 0.0
