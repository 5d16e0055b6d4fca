"""What a sampling shows while it runs, without a page: the clock, the picture, and who is told."""

import base64
import io
import re
from types import SimpleNamespace

import comfy.latent_formats
import numpy as np
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.nested_tensor import NestedTensor
from comfy_execution.utils import CurrentNodeContext
from comfy_extras.nodes_custom_sampler import Guider_Basic, Noise_RandomNoise, SamplerCustomAdvanced
from latent_preview import Latent2RGBPreviewer
from ovi_native.nodes import preview
from ovi_native.ovi_model.sampling import solvers
from PIL import Image
from tiny.checkpoint import draw_weights
from tiny.models import load
from tiny.sizes import Sizes

WAN = comfy.latent_formats.Wan22()


class Told:
    """What is sent, in place of a server with a tab that listens."""

    def __init__(self, monkeypatch):
        self.texts, self.events = [], []
        monkeypatch.setattr(preview, "send_text", lambda text, node: self.texts.append((node, text)))
        monkeypatch.setattr(preview, "send_event", lambda name, data: self.events.append((name, data)))
        shown = SimpleNamespace(get_display_node_id=lambda node: f"shown {node}")
        monkeypatch.setattr(preview, "get_progress_state", lambda: SimpleNamespace(dynprompt=shown))


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Auto)
    return Told(monkeypatch)


@pytest.fixture(scope="module")
def model():
    patcher = load(draw_weights(Sizes(), 0))
    preview.follow(patcher)
    return patcher


def sample(model, frames=3, steps=3):
    latent = {"samples": NestedTensor((torch.zeros(2, 48, frames, 4, 4), torch.zeros(2, 20, 12)))}
    guider = Guider_Basic(model.clone())
    guider.set_conds([[torch.randn(1, 8, Sizes().text), {}]])
    with torch.inference_mode():
        return SamplerCustomAdvanced.execute(Noise_RandomNoise(1), guider, solvers.make_sampler("euler"),
                                             solvers.make_sigmas("euler", steps, 5.0, 1.0), latent).result


def picture(event) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(event["sheet"])))


def test_every_step_is_told_with_the_clip_and_the_time_left(told, model):
    with CurrentNodeContext("prompt", "7"):
        sample(model)
    assert [node for node, _ in told.texts] == ["7"] * 4
    texts = [text for _, text in told.texts]
    assert [text.partition(",")[0] for text in texts[:3]] == ["step 1 of 3", "step 2 of 3", "step 3 of 3"]
    assert texts[2].endswith(" 0:00 left") and re.fullmatch(r"3 steps in \d:\d\d, seed 1", texts[3])
    assert [name for name, _ in told.events] == [preview.EVENT] * 3
    event = told.events[-1][1]
    assert (event["node"], event["prompt_id"], event["count"], event["seconds"]) == ("shown 7", "prompt", 3, 0.5)
    assert picture(event).size == (4, 3 * 4)
    assert len({data["sheet"] for _, data in told.events}) == 3


def test_scripts_get_the_same_result_and_are_told_nothing(told, model):
    with CurrentNodeContext("prompt", "7"):
        watched = sample(model)
    told.texts.clear(), told.events.clear()
    alone = sample(model)
    assert not told.texts and not told.events
    for one, other in zip(watched[0]["samples"].unbind(), alone[0]["samples"].unbind(), strict=True):
        assert torch.equal(one, other)


def test_no_picture_is_made_where_previews_are_off(told, model, monkeypatch):
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.NoPreviews)
    monkeypatch.setattr(preview, "colours", lambda *_: pytest.fail("made all the same"))
    with CurrentNodeContext("prompt", "7"):
        sample(model)
    assert not told.events and len(told.texts) == 4


def test_colours_are_those_of_core_s_previews():
    video = torch.randn(2, 48, 31, 5, 7, generator=torch.Generator().manual_seed(0))
    frames = preview.colours(video, WAN)
    assert frames.shape == (preview.MOST_FRAMES, 5, 7, 3) and frames.dtype == torch.uint8
    core = Latent2RGBPreviewer(WAN.latent_rgb_factors, WAN.latent_rgb_factors_bias)
    for shown, latent in ((0, 0), (-1, 30)):
        wanted = torch.from_numpy(np.array(core.decode_latent_to_preview(video[:, :, latent:])))
        assert (frames[shown].int() - wanted.int()).abs().max() <= 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_a_picture_too(value):
    assert preview.colours(torch.full((1, 48, 1, 2, 2), value), WAN).shape == (1, 2, 2, 3)


def test_the_clock_leaves_the_first_step_out_of_its_mean():
    times = iter([0.0, 30.0, 32.0, 34.0, 36.0])
    clock = preview.Clock(50, lambda: next(times))
    clock.tick(1)
    assert clock.text == "step 1 of 50, 30.0 s each, 24:30 left"
    clock.tick(2)
    clock.tick(3)
    assert clock.text == "step 3 of 50, 2.0 s each, 1:34 left"


@pytest.mark.parametrize(("seconds", "words"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05")])
def test_times_are_written_as_people_read_them(seconds, words):
    assert preview.minutes(seconds) == words


def test_what_a_sampling_took():
    assert preview.took(1, 61, 5) == "1 step in 1:01, seed 5" and preview.took(50, 5, 0) == "50 steps in 0:05, seed 0"
