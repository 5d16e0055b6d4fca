"""The picture of a scene: soft-edged shapes before a wall and a floor."""

from __future__ import annotations

import numpy as np

from .scenes import BALL_RADIUS, FLOOR, PLACES, SQUARE_HALF, Face, Scene

FPS = 24
SHADES = {"red": (214, 40, 40), "green": (30, 150, 60), "blue": (40, 80, 215), "yellow": (240, 190, 20),
          "purple": (165, 40, 185)}
WALL_TOP, WALL_BOTTOM, GROUND = (222, 226, 232), (236, 234, 228), (150, 138, 124)
SKIN, LINE, MOUTH = (244, 208, 176), (60, 42, 36), (122, 18, 34)
FACE_X, FACE_Y, FACE_RADIUS = 32.0, 36.0, 21.0
MOUTH_Y = 47.0
MOUTHS = {"a": (1.0, 8.5), "e": (0.62, 11.0), "i": (0.3, 12.0), "o": (0.8, 5.5), "u": (0.38, 4.0)}
"""Opening and half width of the mouth for each vowel."""
REST_HALF_WIDTH, OPEN_HALF_HEIGHT = 8.0, 6.5
ATTACK = 0.06  # seconds in which a voice sets in and a mouth opens


def envelope(times: np.ndarray, start: float, end: float) -> np.ndarray:
    """0 outside of the vowel, 1 in its middle, smooth at both ends."""
    rise = np.clip((times - start) / ATTACK, 0, 1)
    fall = np.clip((end - times) / ATTACK, 0, 1)
    return 0.5 - 0.5 * np.cos(np.pi * np.minimum(rise, fall))


def mouth(face: Face, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Opening 0..1 and half width of the mouth at each time."""
    opening, width = np.zeros_like(times), np.full_like(times, REST_HALF_WIDTH)
    for start, end, vowel in face.spoken():
        weight = envelope(times, start, end)
        opened, half = MOUTHS[vowel]
        opening += weight * opened
        width += weight * (half - REST_HALF_WIDTH)
    return opening, width


class Canvas:
    """Frames [T, S, S, 3] in 0..255 to draw on; coordinates are 64ths, from the left top corner."""

    def __init__(self, frames: int, size: int) -> None:
        self.size, self.scale = size, size / 64
        self.y, self.x = ((np.arange(size, dtype=np.float32) + 0.5) / self.scale for _ in range(2))
        wall = np.linspace(0, 1, size, dtype=np.float32)[:, None] * (np.subtract(WALL_BOTTOM, WALL_TOP)) + WALL_TOP
        ground = np.clip((self.y - FLOOR) * self.scale + 0.5, 0, 1)[:, None]
        column = (wall * (1 - ground) + np.array(GROUND) * ground).astype(np.float32)
        self.frames = np.broadcast_to(column[None, :, None], (frames, size, size, 3)).copy()

    def ellipse(self, x, y, half_width, half_height, colour, strength=1.0) -> None:
        """Centre, half axes and strength are numbers, or one for each frame."""
        x, y, a, b, strength = (np.broadcast_to(np.asarray(v, np.float32), len(self.frames))[:, None]
                                for v in (x, y, half_width, half_height, strength))
        rows, columns, dx, dy = self._part(x, y, a, b)
        reach = np.sqrt((dx / a)[:, None, :] ** 2 + (dy / b)[:, :, None] ** 2)  # 1 at the edge
        cover = np.clip((1 - reach) * (np.minimum(a, b) * self.scale)[:, :, None] + 0.5, 0, 1)
        self._blend(rows, columns, cover * strength[..., None], colour)

    def rectangle(self, x, y, half_width, half_height, colour) -> None:
        x, y, a, b = (np.broadcast_to(np.asarray(v, np.float32), len(self.frames))[:, None]
                      for v in (x, y, half_width, half_height))
        rows, columns, dx, dy = self._part(x, y, a, b)
        across, down = (np.clip((half - d) * self.scale + 0.5, 0, 1) for half, d in ((a, dx), (b, dy)))
        self._blend(rows, columns, across[:, None, :] * down[:, :, None], colour)

    def _part(self, x, y, a, b) -> tuple[slice, slice, np.ndarray, np.ndarray]:
        """Rows and columns that the shape touches, and their distances from its centre: [T, columns], [T, rows]."""
        columns, rows = slice(*self._range(x, a)), slice(*self._range(y, b))
        return rows, columns, np.abs(self.x[columns] - x), np.abs(self.y[rows] - y)

    def _blend(self, rows: slice, columns: slice, cover: np.ndarray, colour) -> None:
        part = self.frames[:, rows, columns]
        part += cover[..., None] * (np.array(colour, np.float32) - part)

    def _range(self, centre, half) -> tuple[int, int]:
        first = int(np.floor((np.min(centre - half) - 1) * self.scale))
        last = int(np.ceil((np.max(centre + half) + 1) * self.scale))
        return max(0, first), min(self.size, last)


def render_frames(scene: Scene, frames: int, size: int = 64) -> np.ndarray:
    """[frames, size, size, 3] uint8 at 24 frames a second."""
    times = np.arange(frames) / FPS
    canvas = Canvas(frames, size)
    if scene.square:
        x, ys = PLACES[scene.square.place], scene.square.ys(times)
        canvas.rectangle(x, ys, SQUARE_HALF, SQUARE_HALF, SHADES[scene.square.colour])
    if scene.ball:
        ball = scene.ball
        height = ball.heights(times)
        y = FLOOR - BALL_RADIUS - height
        near = 1 / (1 + height / 10)
        canvas.ellipse(ball.x, FLOOR + 2.0, BALL_RADIUS * (0.75 + 0.25 * near), 1.8, (70, 62, 56), 0.6 * near)
        shade = np.array(SHADES[ball.colour])
        canvas.ellipse(ball.x, y, BALL_RADIUS, BALL_RADIUS, shade)
        canvas.ellipse(ball.x - 2.0, y - 2.2, 2.0, 1.7, shade + 0.55 * (255 - shade))
    if scene.face:
        _draw_face(canvas, scene.face, times)
    return np.clip(canvas.frames + 0.5, 0, 255).astype(np.uint8)


def _draw_face(canvas: Canvas, face: Face, times: np.ndarray) -> None:
    x = FACE_X + face.shift
    canvas.ellipse(x, FACE_Y, FACE_RADIUS, FACE_RADIUS, SKIN)
    canvas.rectangle(x, 12.5, 13.0, 6.0, SHADES[face.colour])
    canvas.rectangle(x, 18.5, 20.0, 2.0, SHADES[face.colour])
    for side in (-8.0, 8.0):
        canvas.ellipse(x + side, 30.0, 2.4, 3.0, LINE)
    opening, width = mouth(face, times)
    canvas.ellipse(x, MOUTH_Y, width, 0.8 + OPEN_HALF_HEIGHT * opening, MOUTH)

