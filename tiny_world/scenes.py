"""What happens in a clip: a ball that bounces, alone or beside a silent square, or a face that speaks.

Lengths are in 64ths of the frame's height, times in seconds. Contacts and mouth openings are known in closed form, so
that picture and sound agree exactly.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field

import numpy as np

COLOURS = ("red", "green", "blue", "yellow")
NEW_COLOUR = "purple"  # never drawn: what a LoRA can teach
PLACES = {"left": 13.0, "middle": 32.0, "right": 51.0}
GRAVITY = {"slow": 170.0, "fast": 700.0}  # of a ball, 64ths a second squared
TIMBRES = ("bell", "wood", "drum")
VOICES = ("low", "high")
VOWELS = ("a", "e", "i", "o", "u")

FLOOR = 57.0  # where balls touch the ground, from the top
BALL_RADIUS, SQUARE_HALF = 6.5, 5.5
RESTITUTION = 0.97  # share of its speed that a ball keeps at a contact
FASTEST = math.sqrt(2 * GRAVITY["fast"] * 38)  # impact speed
VOWEL_SECONDS, PAUSE_SECONDS, MOST_VOWELS = 0.42, 0.08, 6
HELD_OUT_SHARE = 10  # one in so many descriptions is never trained on


@dataclass(frozen=True)
class Ball:
    """A ball that falls and bounces, and sounds at each contact with the floor."""

    colour: str
    place: str
    speed: str
    timbre: str
    height: float = 32.0  # of its centre over the lowest point, at rest
    fallen: float = 0.0  # share of the first fall that is over when the clip begins, 0..1
    shift: float = 0.0  # of its place

    @property
    def x(self) -> float:
        return PLACES[self.place] + self.shift

    def contacts(self, seconds: float) -> list[tuple[float, float]]:
        """(time, impact speed) of every contact within the clip."""
        gravity = GRAVITY[self.speed]
        fall = math.sqrt(2 * self.height / gravity)
        time, speed, found = fall * (1 - self.fallen), gravity * fall, []
        while time < seconds:
            found.append((time, speed))
            speed *= RESTITUTION
            time += 2 * speed / gravity
        return found

    def heights(self, times: np.ndarray) -> np.ndarray:
        """Height over the lowest point at each time."""
        gravity = GRAVITY[self.speed]
        fall = math.sqrt(2 * self.height / gravity)
        since = times + fall * self.fallen
        heights = self.height - gravity * since**2 / 2
        for time, speed in self.contacts(float(times.max()) + 1e-6):
            flight = times - time
            after = RESTITUTION * speed * flight - gravity * flight**2 / 2
            heights = np.where(flight >= 0, after, heights)
        return np.maximum(heights, 0.0)


@dataclass(frozen=True)
class Square:
    """A square that floats up and down and makes no sound."""

    colour: str
    place: str
    period: float = 2.0
    phase: float = 0.0

    def ys(self, times: np.ndarray) -> np.ndarray:
        """Its centre from the top."""
        return 32.0 + 14.0 * np.sin(2 * math.pi * (times / self.period + self.phase))


@dataclass(frozen=True)
class Face:
    """A face that says vowels, its mouth open while it sounds."""

    colour: str  # of its hat
    voice: str
    vowels: tuple[str, ...]
    start: float = 0.25
    shift: float = 0.0

    def spoken(self) -> list[tuple[float, float, str]]:
        """(start, end, vowel) of each."""
        step = VOWEL_SECONDS + PAUSE_SECONDS
        return [(self.start + i * step, self.start + i * step + VOWEL_SECONDS, vowel)
                for i, vowel in enumerate(self.vowels)]


@dataclass(frozen=True)
class Scene:
    """All that happens in one clip."""

    ball: Ball | None = None
    square: Square | None = None
    face: Face | None = None
    wording: int = 0  # which way of saying it
    seed: int = field(default=0, compare=False)  # of the noise in its sounds

    @property
    def key(self) -> str:
        """What a caption can tell, in one fixed form."""
        parts = []
        if self.ball:
            parts.append(f"{self.ball.colour} {self.ball.place} {self.ball.speed} {self.ball.timbre}")
        if self.square:
            parts.append(f"{self.square.colour} {self.square.place}")
        if self.face:
            parts.append(f"{self.face.colour} {self.face.voice} {''.join(self.face.vowels)}")
        return "; ".join(parts)

    @property
    def held_out(self) -> bool:
        """Whether this is one of the descriptions that are kept for tests."""
        return zlib.crc32(self.key.encode()) % HELD_OUT_SHARE == 0


def longest_speech(seconds: float) -> int:
    """How many vowels fit in a clip."""
    return min(MOST_VOWELS, max(1, int((seconds - 0.35) / (VOWEL_SECONDS + PAUSE_SECONDS))))


def draw_scene(random: np.random.Generator, seconds: float, held_out: bool = False, kind: str | None = None) -> Scene:
    """A random scene for a clip of that length; `kind` is ball, pair, face or None for any of them.

    held_out: only descriptions that are kept for tests, else only the others.
    """
    while True:
        scene = _draw(random, seconds, kind or random.choice(["ball", "pair", "face"], p=[0.3, 0.4, 0.3]))
        if scene.held_out == held_out:
            return scene


def _draw(random: np.random.Generator, seconds: float, kind: str) -> Scene:
    wording, seed = int(random.integers(3)), int(random.integers(2**31))
    colour, other = (str(name) for name in random.choice(COLOURS, 2, replace=False))
    if kind == "face":
        count = int(random.integers(1, longest_speech(seconds) + 1))
        vowels = tuple(str(vowel) for vowel in random.choice(VOWELS, count))
        return Scene(face=Face(colour, str(random.choice(VOICES)), vowels, float(random.uniform(0.15, 0.35)),
                               float(random.uniform(-3, 3))), wording=wording, seed=seed)
    place, beside = (str(name) for name in random.choice(list(PLACES), 2, replace=False))
    ball = Ball(colour, place, str(random.choice(list(GRAVITY))), str(random.choice(TIMBRES)),
                float(random.uniform(24, 38)), float(random.uniform(0, 0.9)), float(random.uniform(-2, 2)))
    square = None
    if kind == "pair":
        square = Square(other, beside, float(random.uniform(1.6, 2.6)), float(random.uniform(0, 1)))
    return Scene(ball=ball, square=square, wording=wording, seed=seed)
