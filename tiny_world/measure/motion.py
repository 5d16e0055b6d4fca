"""Bounces in a ball's height over time: where the fall turns into a rise, to a fraction of a frame.

Before and after a contact the ball moves on parabolas of the same gravity, so their difference is a straight line, and
its zero is the contact.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..picture import FPS
from ..scenes import BALL_RADIUS, FLOOR, GRAVITY

LEAST_TURN = 3.0  # 64ths a frame: velocity before a contact minus velocity after
LEAST_RISE = 1.5  # 64ths by which a contact is lower than what comes before and after
REACH = 5  # frames on each side that are fitted
LEAST_GRAVITY = 0.6 * GRAVITY["slow"]  # of what falls
CONTACT_LEVEL = FLOOR - BALL_RADIUS  # of the centre, where no bounce tells


@dataclass(frozen=True)
class Motion:
    """Contacts (seconds), the impact speed of each, and the gravity between them, in 64ths and seconds."""

    bounces: tuple[float, ...]
    impacts: tuple[float, ...]
    gravity: float

    @property
    def falls(self) -> bool:
        """Whether it bounces as a ball does: what floats up and down may seem to turn at once, but is slower."""
        return bool(self.bounces) and self.gravity >= LEAST_GRAVITY

    @property
    def speed(self) -> str | None:
        """slow or fast, None where nothing falls."""
        middle = (GRAVITY["slow"] * GRAVITY["fast"]) ** 0.5
        return None if self.gravity < GRAVITY["slow"] / 3 else "slow" if self.gravity < middle else "fast"


def motion(y: np.ndarray) -> Motion:
    """y [T]: the ball's centre from the top in 64ths at 24 frames a second, NaN where it is not seen."""
    seen = np.isfinite(y)
    if seen.sum() < 4:
        return Motion((), (), 0.0)
    frames: np.ndarray = np.arange(len(y), dtype=float)
    y = np.interp(frames, frames[seen], y[seen])
    lowest = _lowest(y)
    gravity = _gravity(y, lowest)
    fits = [fit for k in lowest if (fit := _contact(y, k, gravity, lowest)) is not None]
    level = float(np.median([fit[2] for fit in fits])) if fits else CONTACT_LEVEL
    fits += _at_the_ends(y, lowest, gravity, level)
    fits.sort()
    return Motion(tuple(fit[0] / FPS for fit in fits), tuple(fit[1] * FPS for fit in fits), gravity * FPS**2)


def _lowest(y: np.ndarray) -> list[int]:
    """Frames that are lower in the picture than both neighbours and stand out from what lies between them."""
    turns = [k for k in range(1, len(y) - 1) if y[k] > y[k - 1] and y[k] >= y[k + 1]]
    while turns:
        ends = [0, *turns, len(y) - 1]
        rises = [y[k] - max(y[ends[i]:k + 1].min(), y[k:ends[i + 2] + 1].min()) for i, k in enumerate(turns)]
        weakest = int(np.argmin(rises))
        if rises[weakest] >= LEAST_RISE:
            break
        del turns[weakest]
    return turns


def _gravity(y: np.ndarray, lowest: list[int]) -> float:
    """64ths a frame squared, shared by all arcs: least squares, each arc with a height and a velocity of its own."""
    above = below = 0.0
    ends = [-1, *lowest, len(y)]
    for first, last in pairwise(ends):
        t: np.ndarray = np.arange(first + 1, last, dtype=float)
        if len(t) >= 4:
            line = np.stack([np.ones_like(t), t - t.mean()], 1)
            bent = 0.5 * (t - t.mean()) ** 2
            bent -= line @ np.linalg.lstsq(line, bent, rcond=None)[0]
            above, below = above + float(bent @ y[first + 1:last]), below + float(bent @ bent)
    return above / below if below else 0.0


def _side(y: np.ndarray, k: int, chosen: np.ndarray, gravity: float) -> tuple[float, float] | None:
    """(height, velocity) at frame k of the parabola through the chosen frames; None where they are too few."""
    if len(chosen) < 2:
        return None
    t = chosen - float(k)
    velocity, height = np.polyfit(t, y[chosen] - 0.5 * gravity * t**2, 1)
    return float(height), float(velocity)


def _contact(y: np.ndarray, k: int, gravity: float, lowest: list[int]) -> tuple[float, float, float] | None:
    """(frame, impact speed, level) of the contact near frame k; None where the velocity hardly turns."""
    first = max([0, k - REACH, *(other + 1 for other in lowest if other < k)])
    last = min([len(y) - 1, k + REACH, *(other - 1 for other in lowest if other > k)])
    before, after = (_side(y, k, np.arange(*ends), gravity) for ends in ((first, k), (k + 1, last + 1)))
    if before is None and after is None:
        return None
    if before is None or after is None:
        fitted, sign = (after, -1) if before is None else (before, 1)
        assert fitted is not None
        speed, since = _arrival(fitted, sign, gravity, CONTACT_LEVEL)
        return (k + since, speed, CONTACT_LEVEL) if 2 * speed >= LEAST_TURN and abs(since) <= 1 else None
    turn = before[1] - after[1]
    if turn < LEAST_TURN:
        return None
    since = float(np.clip((after[0] - before[0]) / turn, -1, 1))
    return k + since, before[1] + gravity * since, before[0] + before[1] * since + 0.5 * gravity * since**2


def _arrival(fitted: tuple[float, float], sign: int, gravity: float, level: float) -> tuple[float, float]:
    """(speed, frames from k) at which a parabola is at the level, falling (1) or rising (-1)."""
    height, velocity = fitted
    speed = max(velocity**2 + 2 * gravity * (level - height), 0.0) ** 0.5
    return speed, (sign * speed - velocity) / gravity if gravity > 0 else 0.0


def _at_the_ends(y: np.ndarray, lowest: list[int], gravity: float, level: float) -> list[tuple[float, float, float]]:
    """A contact between the last two frames, which no later frame shows: the fall would have gone through the floor."""
    end = len(y) - 1
    first = max(end - 1 - REACH, lowest[-1] + 1 if lowest else 0)
    fitted = _side(y, end, np.arange(first, end), gravity)
    if fitted is None or len(range(first, end)) < 3 or fitted[0] < level + 1 or fitted[0] < y[end] + 1:
        return []
    speed, since = _arrival(fitted, 1, gravity, level)
    return [(end + since, speed, level)] if -1 <= since <= 0 and 2 * speed >= LEAST_TURN else []
