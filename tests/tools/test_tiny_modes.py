"""The tables of `train_tiny.py evaluate`: what is given to a sampler, and the figures of a clip's beginning."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_ovi.evaluate import Models
from tiny_ovi.files import install
from tiny_ovi.given import given_stream, rendered, replacing
from tiny_ovi.modes import MODES, by_kind, draw, going_on
from tiny_ovi.scores import scores, table
from train_tiny import MODES as OFFERED


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    folder = tmp_path_factory.mktemp("world")
    install(folder)
    return Models(folder)


@pytest.fixture(scope="module")
def own():
    return [rendered(scene) for scene in draw(6, seed=1)]


def test_the_command_offers_every_table():
    assert OFFERED == tuple(MODES)


def test_scenes_are_held_out_or_trained_and_of_every_kind():
    for held_out in (True, False):
        scenes = draw(6, 3, held_out)
        assert {scene.held_out for scene in scenes} == {held_out}
        assert [bool(scene.face) for scene in scenes] == [False] * 4 + [True] * 2
        assert [bool(scene.square) for scene in scenes] == [False] * 2 + [True] * 2 + [False] * 2


def test_figures_of_a_kind_are_of_its_clips_alone(own):
    found = by_kind(scores, own)
    assert found["one ball: sync F1"] == scores(own[:2])["sync F1"]
    assert "face: sync F1" not in found and found["face: mouth and loudness"][0] > 0.9
    assert "| face: hat's colour | 1.000 " in table({"renderer's": found})


def test_a_beginning_is_kept_or_jumps(own):
    balls = own[:2]
    kept = going_on(balls, balls)
    assert kept["frame 0, dB"][0] > 100 and kept["frame 0, dB"][1] < 30
    assert 0.5 < kept["step after frame 0"][0] < 1.5
    jumping = [replace(clip, frames=np.concatenate([other.frames[:1], clip.frames[1:]]))
               for clip, other in zip(balls, balls[::-1], strict=True)]
    found = going_on(balls, jumping)
    assert found["frame 0, dB"] == pytest.approx(kept["frame 0, dB"][::-1])
    assert found["step after frame 0"] == pytest.approx(kept["step after frame 0"][::-1])
    assert found["step after frame 0"][0] > 1.4 * kept["step after frame 0"][0]


@pytest.mark.parametrize("stream", ["picture", "sound"])
def test_what_is_given_alone_is_in_the_latent(models, own, stream):
    latent = given_stream(models, own[0], stream)
    video, audio = latent["samples"].unbind()
    masks = latent["noise_mask"].unbind()
    assert [int(mask.max()) for mask in masks] == [int(stream == "sound"), int(stream == "picture")]
    assert [bool(part.any()) for part in (video, audio)] == [stream == "picture", stream == "sound"]


def test_replacing_brings_the_given_stream_to_the_others_level(models):
    clean = [torch.ones(1, 48, 2, 4, 4), torch.ones(1, 20, 9)]
    x = torch.cat([part.flatten(1) for part in clean], 1)[:, None]
    got = {}

    def apply_model(x, sigma, **conds):
        got.update(conds, sigma=sigma, video=x[..., :clean[0].numel()], audio=x[..., clean[0].numel():])

    call = replacing(models.model, 0).model_options["model_function_wrapper"]
    call(apply_model, {"input": x, "timestep": torch.tensor([0.5]), "c": {
        "latent_shapes": [part.shape for part in clean], "denoise_mask": torch.ones(1, 1, 1, 1, 1),
        "audio_denoise_mask": torch.zeros(1, 1, 9), "skip_layers": [-1]}})
    assert got["sigma"] == 0.5 and (got["video"] == 1).all() and got["audio"].std() == pytest.approx(0.5, rel=0.2)
    assert got["audio"].mean() == pytest.approx(0.5, abs=0.15)
    assert "denoise_mask" not in got and "audio_denoise_mask" not in got and got["skip_layers"] == [-1]
