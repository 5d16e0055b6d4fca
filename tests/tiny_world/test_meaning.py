"""What the trained tiny Ovi does with words, seen and heard in its clips: colours, places, lips, sync, a first frame.

The thresholds leave room below what `tools/train_tiny.py evaluate` measures (assets/tiny_ovi/README.md); a model that
does not read its text, or whose streams do not read each other, falls far below them.
"""


import numpy as np
import pytest
from tiny_ovi.evaluate import Models, Way, generate
from tiny_ovi.files import install
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


def test_the_mouth_opens_once_for_each_vowel_while_there_is_sound(faces):
    assert [len(clip.report.mouth.vowels) for clip in faces] == [2, 3]
    assert all(clip.report.lip_sync > 0.6 for clip in faces)
    other = np.roll(faces[0].report.loudness, len(faces[0].report.loudness) // 2)
    assert np.corrcoef(faces[0].report.mouth.opening, other)[0, 1] < 0.3


def test_the_ball_is_the_one_that_is_asked_for(balls):
    assert [(clip.report.ball.colour, clip.report.ball.place) for clip in balls] == [("red", "left"), ("blue", "right")]
