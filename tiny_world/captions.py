"""Scenes in words, in the tag format of Ovi's 960x960 checkpoints: speech as <S>...<E>, then `Audio:` and the sound."""

from __future__ import annotations

from .scenes import Scene

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
