"""Context windows over a joint latent: both streams, in order, aligned."""

import itertools

import comfy.cli_args
import comfy.conds
import comfy.latent_formats
import comfy.model_management
import comfy.sd
import comfy.supported_models
import pytest
import torch
from comfy.context_windows import (
    ContextFuseMethods,
    ContextSchedules,
    IndexListContextWindow,
    WindowingState,
)
from comfy_extras.nodes_context_windows import WanContextWindowsManualNode
from comfy_extras.nodes_custom_sampler import (
    CFGGuider,
)
from ovi_native.ovi_model.ovi import model_base
from support import oracle
from support.sampling_runs import LENGTH, Calls, sample, windowed
from tiny.checkpoint import draw_weights
from tiny.compare import assert_pair_equal, relative_l2
from tiny.inputs import audio_length, conditioning, first_frame_mask, joint, noise, text
from tiny.models import load, network
from tiny.sizes import TINY


@pytest.fixture(scope="module")
def weights():
    return draw_weights()


@pytest.fixture(scope="module")
def model(weights):
    return load(weights)


FRAMES = 9
WAN22 = comfy.latent_formats.Wan22()
SCHEDULES = (ContextSchedules.STATIC_STANDARD, ContextSchedules.UNIFORM_STANDARD, ContextSchedules.UNIFORM_LOOPED,
             ContextSchedules.BATCHED)


def shapes_of(frames: int, latents: int) -> list[torch.Size]:
    return [torch.Size((1, 48, frames, 2, 2)), torch.Size((1, 20, latents))]


@pytest.mark.parametrize(("frames", "latents"), [(31, 157), (61, 314), (1, 5), (1, 1), (9, 46), (9, 45), (9, 20),
                                                (9, 80), (40, 3), (2, 11)])
def test_windows_over_all_frames_cover_all_audio_in_order(model, frames, latents):
    def audio_of(indices):
        video, audio = model.model.map_context_window_to_modalities(indices, shapes_of(frames, latents), 2)
        assert video == indices
        return audio

    assert audio_of(list(range(frames))) == list(range(latents))
    single = [audio_of([frame]) for frame in range(frames)]
    assert set().union(*single) == set(range(latents))
    for start, end in itertools.combinations(range(0, frames + 1, max(1, frames // 6)), 2):
        audio = audio_of(list(range(start, end)))
        assert audio and audio == list(range(audio[0], audio[-1] + 1))
    if latents == audio_length(frames):
        assert all(abs(audio[0] * model_base.AUDIO_ROPE_SCALE - frame) <= 0.5 * model_base.AUDIO_ROPE_SCALE + 0.02
                   for frame, audio in enumerate(single))


def test_the_same_result_when_the_window_holds_the_clip(model):
    latent = joint(frames=3)
    for length in (3, 5):
        assert_pair_equal(sample(windowed(model, length), latent), sample(model, latent))


@pytest.mark.parametrize(("schedule", "causal", "freenoise"),
                         list(itertools.product(SCHEDULES, (True, False), (True, False))))
def test_every_schedule_covers_the_clip(model, schedule, causal, freenoise):
    latent = joint(frames=FRAMES, height=2, width=2)
    out = sample(windowed(model, schedule=schedule, causal=causal, freenoise=freenoise), latent)
    for stream, given in zip(out.unbind(), latent.unbind(), strict=True):
        assert stream.shape == given.shape and torch.isfinite(stream).all()
        assert stream.abs().amax(dim=(0, 1)).min() > 0  # no index left at zero


@pytest.mark.parametrize(("fuse", "options"), [
    (ContextFuseMethods.FLAT, {}), (ContextFuseMethods.RELATIVE, {}), (ContextFuseMethods.OVERLAP_LINEAR, {}),
    (ContextFuseMethods.PYRAMID, {"schedule": ContextSchedules.UNIFORM_LOOPED, "closed": True, "stride": 2}),
    (ContextFuseMethods.PYRAMID, {"schedule": ContextSchedules.UNIFORM_STANDARD, "stride": 2}),
    (ContextFuseMethods.PYRAMID, {"length": 1, "overlap": 0}),
])
def test_every_way_of_fusing_windows(model, fuse, options):
    out = sample(windowed(model, fuse=fuse, **options), joint(frames=FRAMES, height=2, width=2), steps=3)
    assert all(torch.isfinite(stream).all() and stream.abs().amax(dim=(0, 1)).min() > 0 for stream in out.unbind())


def test_the_wan_node_counts_in_frames(model):
    node = WanContextWindowsManualNode.execute(model, 13, 4, ContextSchedules.STATIC_STANDARD, 1, False,
                                               ContextFuseMethods.PYRAMID, False)
    with Calls(model) as calls:
        sample(node.result[0], joint(frames=FRAMES, height=2, width=2), steps=1)
    assert [call["video"].shape[2] for call in calls] == [4, 5, 5]  # 13 frames are 4 latents, then one causal frame


@pytest.mark.parametrize(("start", "causal"), [(0, False), (3, False), (4, False), (3, True), (5, True)])
def test_sound_and_picture_stay_aligned_inside_a_window(weights, model, start, causal):
    """A window's result is the oracle's for that part of the clip at its true place in time.

    Attention sees only differences of temporal positions, so moving both streams together changes nothing, and moving
    one against the other does.
    """
    video, audio = noise(1, 48, FRAMES, 2, 4, seed=20), noise(1, 20, audio_length(FRAMES), seed=21)
    state = WindowingState([video, audio], [None] * 2, [None] * 2, [None] * 2, [video.shape, audio.shape], 2, True)
    plain = IndexListContextWindow(list(range(start, start + LENGTH)), dim=2, total_frames=FRAMES)
    window = state.prepare_window(plain, model.model)
    if causal:
        window.causal_anchor_index = start - 1
    (part, sound), _ = state.slice_for_window(window, [])
    prompt = text(6, 1)
    with torch.no_grad():
        found = network(model)([part, sound], torch.tensor([500.0]), prompt, {"context_window": window})
    first = (start - causal, window.get_window_for_modality(1).index_list[0])
    truth = oracle.forward(weights, part[0], sound[0], 500.0, prompt[0], prompt[0], first=first)
    shifted = oracle.forward(weights, part[0], sound[0], 500.0, prompt[0], prompt[0], first=(first[0], first[1] + 1))
    for out, expected, control in zip(found, truth, shifted, strict=True):
        assert relative_l2(out[0], expected) < 1e-5
        assert relative_l2(out[0], control) > 1e-3


def test_masks_follow_the_window(model):
    latent = joint(frames=FRAMES, height=2, width=2, seed=30)
    mask = first_frame_mask(latent)
    mask.unbind()[1][:, :, :6] = 0
    with Calls(model) as calls:
        out = sample(windowed(model, causal=False), latent, mask=mask, steps=1)
    assert [call["denoise_mask"].flatten().tolist() for call in calls] == [[0, 1, 1, 1]] + [[1] * LENGTH] * 3
    audio_mask = mask.unbind()[1]
    assert torch.equal(calls[0]["audio_denoise_mask"], audio_mask[:, :, :calls[0]["audio"].shape[2]])
    assert all(call["audio_denoise_mask"].all() for call in calls[2:])
    assert relative_l2(out.unbind()[0][:, :, :1], latent.unbind()[0][:, :, :1]) < 1e-6


def test_a_retained_first_frame_is_clean_in_every_window(model):
    latent = joint(frames=FRAMES, height=2, width=2, seed=31)
    with Calls(model) as calls:
        sample(windowed(model, causal=False, cond_retain_index_list="0", latent_retain_index_list="0"), latent,
               mask=first_frame_mask(latent), steps=1)
    clean = WAN22.process_in(latent.unbind()[0])[:, :, :1]
    for call in calls:
        assert call["denoise_mask"].flatten().tolist() == [0, 1, 1, 1]
        assert relative_l2(call["video"][:, :, :1], clean) < 1e-6


def test_text_is_never_cut_to_a_window(model):
    window = IndexListContextWindow([1, 2], dim=2, total_frames=TINY.text)
    for key in ("c_crossattn", "audio_context"):
        cond = comfy.conds.CONDRegular(text(5, 1))
        assert model.model.resize_cond_for_context_window(key, cond, window, None, "cpu") is cond
    frames = TINY.text  # as many frames as the text is wide: the default rule would cut the text
    with Calls(model) as calls:
        sample(windowed(model, frames - 1, 0, causal=False), joint(frames=frames, height=1, width=1, audio=5), steps=1)
    assert all(call["context"].shape == (1, 512, TINY.text) for call in calls)


def test_guidance_inside_windows(model):
    """Conditionings of other lengths and a separate audio text share each window's batch. Core: one clip at a time."""
    guider = CFGGuider.execute(windowed(model), conditioning(7, 1), conditioning(4, 2, audio_tokens=3), 3.0).result[0]
    with Calls(model) as calls:
        out = sample(model, joint(frames=FRAMES, height=2, width=2), guider=guider, steps=1)
    assert [call["video"].shape[0] for call in calls] == [2] * 4
    assert all(torch.isfinite(stream).all() for stream in out.unbind())


def test_freenoise_repeats_the_noise_of_both_streams(model):
    with Calls(model) as calls:
        sample(windowed(model, causal=False, freenoise=True), joint(frames=FRAMES, height=2, width=2), steps=1)
    for stream in ("video", "audio"):
        first, third = ({tuple(column.flatten().tolist()) for column in calls[i][stream][0].unbind(1)} for i in (0, 2))
        assert first & third, f"no {stream} noise of the first window comes back in the third"
