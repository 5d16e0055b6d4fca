"""Scenes in words, in the tag format of Ovi's 960x960 checkpoints: speech as <S>...<E>, then `Audio:` and the sound.

`parse` reads them back into what they ask for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .scenes import COLOURS, GRAVITY, NEW_COLOUR, PLACES, TIMBRES, VOICES, VOWELS, Scene

WHERE = {"left": "on the left", "middle": "in the middle", "right": "on the right"}

BALL = ("A {colour} ball bounces {speed} {where}.",
        "There is a {colour} ball {where}, bouncing {speed}.",
        "{Where} a {colour} ball falls and bounces {speed}.")
SQUARE = (" A {colour} square floats silently {where}.",
          " A silent {colour} square floats {where}.",
          " {Where} a {colour} square floats without a sound.")
CONTACT = (" Audio: a {timbre} at every bounce.",
           " Audio: {timbre} sounds when the ball hits the floor.",
           " Audio: each bounce sounds like a {timbre}.")
FACE = ("A face with a {colour} hat says <S>{speech}<E>.",
        "A cartoon face wearing a {colour} hat speaks: <S>{speech}<E>",
        "With a {colour} hat on, a face says <S>{speech}<E>.")
VOICE = (" Audio: a {voice} voice.",
         " Audio: a {voice} voice speaks.",
         " Audio: someone speaks in a {voice} voice.")


def caption(scene: Scene) -> str:
    """The scene in its wording."""
    n = scene.wording
    if scene.face:
        face = scene.face
        return (FACE[n].format(colour=face.colour, speech=" ".join(face.vowels)) + VOICE[n].format(voice=face.voice))
    ball = scene.ball
    assert ball is not None
    where = WHERE[ball.place]
    text = BALL[n].format(colour=ball.colour, speed=ball.speed + "ly" * (ball.speed == "slow"), where=where,
                          Where=where.capitalize())
    if scene.square:
        where = WHERE[scene.square.place]
        text += SQUARE[n].format(colour=scene.square.colour, where=where, Where=where.capitalize())
    return text + CONTACT[n].format(timbre=ball.timbre)


@dataclass(frozen=True)
class Asked:
    """What a caption asks for; None for what it does not say."""

    ball: str | None = None  # its colour
    place: str | None = None
    speed: str | None = None
    timbre: str | None = None
    square: str | None = None
    square_place: str | None = None
    hat: str | None = None
    voice: str | None = None
    vowels: tuple[str, ...] | None = None


def parse(text: str) -> Asked:
    """What a text asks for, whether it is one of our captions or a prompt that somebody wrote."""
    text = text.lower()
    speech = re.search(r"<s>(.*?)<e>", text, re.DOTALL)
    text = re.sub(r"<s>.*?<e>", " ", text, flags=re.DOTALL)
    picture, _, sound = re.sub(r"<audcap>", " audio:", text).partition("audio:")
    ball, square = (_clause(picture, noun) for noun in ("ball", "square"))
    vowels = tuple(word for word in re.findall(r"[a-z]+", speech[1]) if word in VOWELS) if speech else None
    return Asked(ball=_colour(picture, "ball"), place=_first(ball, list(PLACES)), speed=_first(ball, list(GRAVITY)),
                 timbre=_first(sound, TIMBRES), square=_colour(picture, "square"),
                 square_place=_first(square, list(PLACES)), hat=_colour(picture, "hat"),
                 voice=_first(re.sub(r"[^a-z]+", " ", sound), [f"{voice} voice" for voice in VOICES]), vowels=vowels)


def _clause(text: str, noun: str) -> str:
    """The part of the text that speaks of the noun."""
    parts = re.split(r"[.;!?]|\band\b(?=\s+(?:an?|the)\b)|\bbeside\b|\bwhile\b", text)
    return next((part for part in parts if noun in part), "")


def _colour(text: str, noun: str) -> str | None:
    found = re.search(rf"\b({'|'.join((*COLOURS, NEW_COLOUR))})\s+{noun}", text)
    return found[1] if found else None


def _first(text: str, words: list[str] | tuple[str, ...]) -> str | None:
    """The word that comes first in the text; of two words, the first counts."""
    places = {word: text.find(word) for word in words if word in text}
    return min(places, key=lambda word: places[word]).split()[0] if places else None
