"""The small world itself: everything from the seed, contacts where the picture shows them, captions that say it all."""

from dataclasses import fields, replace

import numpy as np
import pytest
from ovi_native.tiny_world.captions import Asked, caption, parse
from ovi_native.tiny_world.picture import FPS, render_frames
from ovi_native.tiny_world.scenes import (
    COLOURS,
    GRAVITY,
    PLACES,
    RESTITUTION,
    TIMBRES,
    VOICES,
    VOWELS,
    Ball,
    Face,
    Scene,
    Square,
    draw_scene,
    longest_speech,
)
from ovi_native.tiny_world.sound import SAMPLE_RATE, render_sound
from support.degraded_clips import clip


def scenes(seed: int, count: int, **chosen) -> list[Scene]:
    random = np.random.default_rng(seed)
    return [draw_scene(random, 2.0, **chosen) for _ in range(count)]


def test_a_seed_gives_the_same_clips_again():
    first, again, others = scenes(3, 6), scenes(3, 6), scenes(4, 6)
    assert first == again and first != others
    for one, other in zip(first, again, strict=True):
        for a, b in zip(clip(one), clip(other), strict=True):
            assert np.array_equal(a, b)


def test_the_noise_of_a_scene_is_its_seeds():
    scene = Scene(ball=Ball("red", "left", "fast", "wood"), seed=1)
    assert not np.array_equal(render_sound(scene, 16_000), render_sound(replace(scene, seed=2), 16_000))


@pytest.mark.parametrize("size", (64, 96))
def test_frames_and_samples_have_their_forms(size):
    for scene in scenes(0, 8):
        frames, samples = clip(scene, size=size)
        assert frames.shape == (49, size, size, 3) and frames.dtype == np.uint8
        assert samples.shape == (32_000,) and samples.dtype == np.float32 and np.abs(samples).max() <= 1


@pytest.mark.parametrize("speed", GRAVITY)
def test_a_contact_is_the_lowest_moment_and_its_sound_begins_there(speed):
    ball = Ball("red", "middle", speed, "wood", height=30.0, fallen=0.3)
    contacts = ball.contacts(3.0)
    assert len(contacts) >= 2
    samples = render_sound(Scene(ball=ball), 48_000)
    for time, _ in contacts:
        around = ball.heights(time + np.array([-0.03, 0.0, 0.03]))
        assert around[1] == pytest.approx(0, abs=1e-6) and around[0] > 1 < around[2]
        start = round(time * SAMPLE_RATE)
        assert np.abs(samples[start - 300:start]).max() < 0.02 < np.abs(samples[start:start + 300]).max()
    speeds = [speed for _, speed in contacts]
    assert speeds[1] == pytest.approx(RESTITUTION * speeds[0])


def test_the_frame_nearest_a_contact_shows_the_ball_lowest():
    ball = Ball("blue", "left", "slow", "bell")
    frames = render_frames(Scene(ball=ball), 49)
    blue = frames[..., 2].astype(int) - frames[..., 0] > 90
    bottom = np.array([np.flatnonzero(frame.any(1)).max() for frame in blue])
    for time, _ in ball.contacts(2.0):
        frame = round(time * FPS)
        assert bottom[frame] == bottom[max(0, frame - 5):frame + 6].max() > bottom[frame - 5]


def test_training_never_draws_what_is_kept_for_tests():
    kept, drawn = scenes(1, 60, held_out=True), scenes(2, 600)
    assert all(scene.held_out for scene in kept) and not any(scene.held_out for scene in drawn)
    assert not {scene.key for scene in kept} & {scene.key for scene in drawn}
    assert replace(kept[0], wording=(kept[0].wording + 1) % 3, seed=99).held_out, "another wording is no other scene"


@pytest.mark.parametrize("kind", ("ball", "pair", "face"))
def test_a_kind_is_what_is_drawn(kind):
    for scene in scenes(5, 10, kind=kind):
        assert (scene.ball is not None, scene.square is not None, scene.face is not None) == {
            "ball": (True, False, False), "pair": (True, True, False), "face": (False, False, True)}[kind]
        if scene.face:
            assert len(scene.face.vowels) <= longest_speech(2.0) and scene.face.spoken()[-1][1] <= 2.0


def expected(scene: Scene) -> Asked:
    ball, square, face = scene.ball, scene.square, scene.face
    return Asked(*((ball.colour, ball.place, ball.speed, ball.timbre) if ball else [None] * 4),
                 *((square.colour, square.place) if square else [None] * 2),
                 *((face.colour, face.voice, face.vowels) if face else [None] * 3))


def every_description() -> list[Scene]:
    balls = [Ball(colour, place, speed, timbre)
             for colour in COLOURS for place in PLACES for speed in GRAVITY for timbre in TIMBRES]
    pairs = [Scene(ball=balls[i * 7 % len(balls)], square=Square(colour, place))
             for i, (colour, place) in enumerate((c, p) for c in COLOURS for p in PLACES)]
    faces = [Scene(face=Face(colour, voice, (vowel, "a")))
             for colour in COLOURS for voice in VOICES for vowel in VOWELS]
    return [replace(scene, wording=n) for n in range(3) for scene in [*(Scene(ball=b) for b in balls), *pairs, *faces]]


def test_captions_are_read_back_into_what_they_say():
    for scene in every_description():
        assert parse(caption(scene)) == expected(scene), caption(scene)


@pytest.mark.parametrize(("text", "says"), (
    ("a red ball", Asked(ball="red")),
    ("A ball bounces slowly", Asked(speed="slow")),
    ("A GREEN BALL, in the middle. AUDIO: A DRUM", Asked(ball="green", place="middle", timbre="drum")),
    ("A red ball on the left and a blue square on the right.",
     Asked(ball="red", place="left", square="blue", square_place="right")),
    ("A face says <S>a hm i<E>", Asked(vowels=("a", "i"))),
    ("A yellow ball. <AUDCAP>a bell at every bounce<ENDAUDCAP>", Asked(ball="yellow", timbre="bell")),
    ("a cat plays the drum", Asked()),
    ("", Asked()),
))
def test_other_prompts_are_read_as_far_as_they_go(text, says):
    assert parse(text) == says


def test_asked_names_what_a_caption_can_say():
    assert [field.name for field in fields(Asked)] == ["ball", "place", "speed", "timbre", "square", "square_place",
                                                       "hat", "voice", "vowels"]
