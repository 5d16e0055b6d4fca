"""What the trained tiny Ovi does with words and with what is given, seen and heard in its clips.

The thresholds leave room below what `tools/train_tiny.py evaluate` measures (assets/tiny_ovi/README.md); a model that
does not read its text, or whose streams do not read each other, falls far below them.
"""

from dataclasses import replace
from statistics import mean

import numpy as np
import pytest
from ovi_native.tiny_world.measure import pooled, right_share
from ovi_native.tiny_world.scenes import Ball, Scene
from PIL import Image
from tiny_ovi.evaluate import Models, Way, generate
from tiny_ovi.files import FIRST_FRAME, SHIPPED, install
from tiny_ovi.given import given_first_frame, given_stream, rendered, with_own_clock
from tiny_ovi.scores import Clip

pytestmark = pytest.mark.slow
WAY = Way(steps=16)
FACES = ("A face with a green hat says <S>a o<E>. Audio: a low voice.",
         "A face with a red hat says <S>a o i<E>. Audio: a high voice.")
BALLS = ("A red ball bounces fast on the left. Audio: a wood at every bounce.",
         "A blue ball bounces slowly on the right. Audio: a drum at every bounce.")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    folder = tmp_path_factory.mktemp("world")
    install(folder / "models")
    return Models(folder / "models")


@pytest.fixture(scope="module")
def faces(models, tmp_path_factory) -> list[Clip]:
    return list(generate(models, FACES, tmp_path_factory.mktemp("faces"), WAY, seed=3))


@pytest.fixture(scope="module")
def balls(models, tmp_path_factory) -> list[Clip]:
    return list(generate(models, BALLS, tmp_path_factory.mktemp("balls"), WAY, seed=5))


def test_the_hat_is_the_one_that_is_asked_for(faces):
    assert [clip.report.hat for clip in faces] == ["green", "red"]


def test_lips_show_the_vowels_and_the_voice_sings_them(faces):
    asked = [("a", "o"), ("a", "o", "i")]
    for told in ([clip.report.mouth.vowels for clip in faces], [clip.report.heard for clip in faces]):
        assert mean(map(right_share, told, asked)) > 0.75
    assert [clip.report.voice for clip in faces] == ["low", "high"]
    assert all(clip.report.lip_sync > 0.6 for clip in faces)
    other = np.roll(faces[0].report.loudness, len(faces[0].report.loudness) // 2)
    assert np.corrcoef(faces[0].report.mouth.opening, other)[0, 1] < 0.3


def test_the_ball_is_the_one_that_is_asked_for(balls):
    assert [(clip.report.ball.colour, clip.report.ball.place) for clip in balls] == [("red", "left"), ("blue", "right")]


def test_sounds_fall_on_bounces(balls):
    assert pooled(clip.report.sync for clip in balls).f1 > 0.85 and len(balls[0].report.onsets) > 6
    assert [clip.report.timbre for clip in balls] == ["wood", "drum"]


def test_streams_part_where_the_sound_has_a_clock_of_its_own(models, faces, balls, tmp_path):
    texts, model = (BALLS[0], FACES[0]), with_own_clock(models.model)
    ball, face = generate(models, texts, tmp_path, WAY, seed=3, model=model)
    assert ball.report.sync.f1 < balls[0].report.sync.f1 - 0.25
    assert (face.report.lip_sync or 0.0) < faces[0].report.lip_sync - 0.4


def test_a_given_first_frame_is_kept_and_gone_on_from(models, tmp_path):
    picture = np.asarray(Image.open(SHIPPED / FIRST_FRAME))
    given = given_first_frame(models, Clip("", picture[None], np.zeros(0)))
    text = "A blue ball bounces slowly in the middle. Audio: a drum at every bounce."
    clip, = generate(models, [text], tmp_path, WAY, seed=1, latents=[given])
    error = (clip.frames[0].astype(float) - picture) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 24
    assert clip.report.ball.colour == "blue" and len(clip.report.motion.bounces) > 2


@pytest.mark.parametrize(("given", "part"), [("sound", "samples"), ("picture", "frames")])
def test_one_stream_follows_the_other_where_that_is_given(models, tmp_path, given, part):
    own = [rendered(Scene(ball=ball)) for ball in (Ball("green", "middle", "fast", "drum", 30.0, 0.5),
                                                   Ball("red", "right", "slow", "wood", 34.0, 0.2))]
    latents = [given_stream(models, clip, given) for clip in own]
    made = list(generate(models, [clip.caption for clip in own], tmp_path, WAY, seed=7, latents=latents))

    def sync(sources: list[Clip]) -> float:
        return pooled(replace(clip, **{part: getattr(source, part)}).report.sync
                      for clip, source in zip(made, sources, strict=True)).f1

    assert sync(own) > 0.8
    assert sync(own[::-1]) < 0.5
