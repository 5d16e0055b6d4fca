"""Purple, which the world never draws and a LoRA can teach: rendered, said, seen, and written as a user's folder."""

from dataclasses import replace

import numpy as np
import pytest
from devlib.media import read_media
from ovi_native.ovi_model.training.clips import find_clips
from ovi_native.tiny_world import measure
from ovi_native.tiny_world.captions import caption, parse
from ovi_native.tiny_world.scenes import COLOURS, NEW_COLOUR, Ball, Scene, draw_scene
from support.degraded_clips import clip, rough
from tiny_ovi.clip_files import purple_scenes, write_lesson


def test_it_is_never_drawn():
    random = np.random.default_rng(0)
    drawn = " ".join(draw_scene(random, 5.0, held_out).key for held_out in (False, True) for _ in range(200))
    assert NEW_COLOUR not in drawn and all(colour in drawn for colour in COLOURS)


@pytest.mark.parametrize("colour", (NEW_COLOUR, *COLOURS))
def test_it_is_told_from_the_others(colour):
    scene = Scene(ball=Ball(colour, "left", "fast", "wood"))
    assert parse(caption(scene)).ball == colour
    for frames, samples in (clip(scene), rough(*clip(scene), np.random.default_rng(1))):
        assert measure.describe(frames, samples).ball.colour == colour


def test_scenes_of_it_are_the_worlds_but_for_the_colour():
    scenes = purple_scenes(20, 2.0)
    assert {scene.ball.colour for scene in scenes} == {NEW_COLOUR} and not any(scene.held_out for scene in scenes)
    assert all(scene.held_out for scene in purple_scenes(4, 2.0, held_out=True))
    assert len({replace(scene.ball, colour="red").place for scene in scenes}) == 3


def test_the_lesson_is_a_folder_as_a_user_would_have_it(tmp_path):
    """Every mp4 shows and sounds what its caption says, also after h264 and aac."""
    clips, faults = find_clips(write_lesson(tmp_path / "lesson", new=3, known=3))
    assert not faults and [one.name.rsplit("_", 1)[0] for one in clips] == ["known"] * 3 + ["purple_ball"] * 3
    for one in clips:
        media = read_media(one.video.read_bytes())
        assert (media.fps, media.rate, media.frames.shape) == (24.0, 16_000, (49, 64, 64, 3))
        report = measure.describe(media.frames, media.sound.mean(axis=1))
        asked = parse(one.caption)
        assert all(value == 1 for value in measure.judge(report, asked).values()), (one.caption, report.sentence)
        assert asked.ball is None or report.sync.f1 > 0.85
