"""Ovi behind ComfyUI's MODEL: latents, masks, conditioning, context windows, and what wrong inputs say."""

import weakref

import comfy.cli_args
import comfy.conds
import comfy.latent_formats
import comfy.model_management
import comfy.sd
import comfy.supported_models
import pytest
import torch
from comfy.nested_tensor import NestedTensor
from comfy.utils import pack_latents
from comfy_extras.nodes_custom_sampler import (
    BasicGuider,
    SplitSigmas,
)
from comfy_extras.nodes_model_advanced import ModelComputeDtype
from ovi_native.ovi_model.ovi import supported_models
from ovi_native.ovi_model.ovi.conditioning import AUDIO_TEXT_KEY
from ovi_native.ovi_model.sampling import solvers, step_cache
from support.sampling_runs import Calls, sample, windowed
from tiny.checkpoint import draw_weights
from tiny.compare import assert_pair_close, assert_pair_equal, relative_l2
from tiny.inputs import conditioning, first_frame_mask, joint, noise, text
from tiny.models import load
from tiny.sizes import TINY, core_layout

WAN22 = comfy.latent_formats.Wan22()
PROMPT = text(5, 1)


@pytest.fixture(scope="module")
def weights():
    return draw_weights()


@pytest.fixture(scope="module")
def model(weights):
    return load(weights)


# --- latent normalisation ---------------------------------------------------------------------------------------------

def test_only_the_video_is_normalised(model):
    latent = joint(seed=1)
    video, audio = model.model.process_latent_in(latent).unbind()
    assert torch.equal(video, WAN22.process_in(latent.unbind()[0])) and not torch.equal(video, latent.unbind()[0])
    assert torch.equal(audio, latent.unbind()[1])
    assert_pair_close(model.model.process_latent_out(NestedTensor((video, audio))), latent, 1e-6)
    plain = latent.unbind()[0]
    assert torch.equal(model.model.process_latent_in(plain), WAN22.process_in(plain))
    assert torch.equal(model.model.process_latent_out(plain), WAN22.process_out(plain))
    assert torch.equal(model.model.process_latent_in(latent.unbind()[1]), latent.unbind()[1])


def test_the_network_sees_the_normalised_latent_and_the_caller_keeps_his(model):
    latent = joint(seed=1)
    before = NestedTensor([x.clone() for x in latent.unbind()])
    sigma = 0.25
    with Calls(model) as calls:
        sample(model, latent, torch.tensor([sigma, 0.0]), keep_noise=False)
    assert_pair_equal(latent, before)
    video, audio = latent.unbind()
    assert relative_l2(calls[0]["video"], (1 - sigma) * WAN22.process_in(video)) < 1e-6
    assert relative_l2(calls[0]["audio"], (1 - sigma) * audio) < 1e-6


def test_a_step_that_goes_nowhere_returns_the_latent(model):
    """In through the normalisation, out through its inverse, for batches too."""
    latent = joint(batch=2, seed=4)
    assert_pair_close(sample(model, latent, torch.tensor([0.3, 0.3]), keep_noise=False), latent, 1e-6)


def test_tiny_denoise_nearly_returns_the_latent(model):
    latent = joint(seed=5)
    assert_pair_close(sample(model, latent, torch.tensor([0.001, 0.0])), latent, 1e-2)
    changed = sample(model, latent, solvers.make_sigmas("euler", 2, denoise=0.5))
    assert all(relative_l2(a, b) > 0.1 for a, b in zip(changed.unbind(), latent.unbind(), strict=True))


def test_a_split_schedule_without_new_noise_continues_where_it_stopped(model):
    latent, sigmas = joint(seed=6), solvers.make_sigmas("euler", 4, denoise=0.8)
    high, low = SplitSigmas.execute(sigmas, 2).result
    halfway = sample(model, latent, high)
    assert_pair_close(sample(model, halfway, low, keep_noise=False), sample(model, latent, sigmas), 1e-5)


def test_an_interlude_with_other_shapes_leaves_no_trace(model):
    first = sample(model, joint(seed=7))
    sample(model, joint(frames=2, height=6, width=4, batch=2, seed=8))
    model.model.process_latent_in(pack_latents(joint(seed=9).unbind())[0])  # normalised by nobody, then forgotten
    assert_pair_equal(sample(model, joint(seed=7)), first)


def test_a_latent_whose_run_ended_early_is_forgotten(model):
    """Between the two hooks a run can fail. What waited then is not kept in memory, and no later latent is taken for
    it, not even one at the same address."""
    packed, shapes = pack_latents(joint(seed=1).unbind())
    for _ in range(20):
        waiting = model.model.process_latent_in(packed)
        gone, address = weakref.ref(waiting), id(waiting)
        with pytest.raises(ValueError, match="Ovi needs a joint latent of picture and sound"):
            model.model.extra_conds(latent_image=waiting, latent_shapes=shapes[:1], device="cpu")
        del waiting
        assert gone() is None
        other = packed.clone()
        model.model.extra_conds(latent_image=other, latent_shapes=shapes, device="cpu", cross_attn=PROMPT)
        assert torch.equal(other, packed)
        if id(other) == address:
            break
    assert id(other) == address, "the test did not get to see a reused address"


def test_the_newest_latent_is_the_one_that_waits(model):
    """A run that fails, then one that works: the first one's latent stays as it was."""
    packed, shapes = pack_latents(joint(seed=1).unbind())
    old, new = (model.model.process_latent_in(packed) for _ in range(2))
    for waiting in (old, new, old):
        model.model.extra_conds(latent_image=waiting, latent_shapes=shapes, device="cpu", cross_attn=PROMPT)
    assert torch.equal(old, packed)
    expected = sample(model, joint(seed=2))
    with pytest.raises(ValueError, match="got"):
        sample(model, NestedTensor((VIDEO, noise(1, 40, 15))))
    assert_pair_equal(sample(model, joint(seed=2)), expected)


def test_only_the_latent_that_waits_is_normalised(model):
    """`extra_conds` must not touch a latent that did not come through `process_latent_in`."""
    packed, shapes = pack_latents(joint(seed=1).unbind())
    waiting = model.model.process_latent_in(packed)
    assert torch.equal(waiting, packed) and waiting is not packed
    other = packed.clone()
    model.model.extra_conds(latent_image=other, latent_shapes=shapes, device="cpu", cross_attn=PROMPT)
    assert torch.equal(other, packed)
    waiting = model.model.process_latent_in(packed)
    for _ in range(2):  # positive and negative
        model.model.extra_conds(latent_image=waiting, latent_shapes=shapes, device="cpu", cross_attn=PROMPT)
    video = WAN22.process_in(joint(seed=1).unbind()[0])
    assert torch.equal(waiting[:, :, :video.numel()], video.reshape(1, 1, -1))
    assert torch.equal(waiting[:, :, video.numel():], packed[:, :, video.numel():])


# --- image to video, given audio -------------------------------------------------------------------------------------

@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_a_given_first_frame_stays(model, solver):
    latent = joint(frames=3, batch=2, seed=10)
    with Calls(model) as calls:
        out = sample(model, latent, mask=first_frame_mask(latent), solver=solver, steps=3)
    clean = latent.unbind()[0][:, :, :1]
    assert relative_l2(out.unbind()[0][:, :, :1], clean) < 1e-6
    assert relative_l2(out.unbind()[0][:, :, 1:], latent.unbind()[0][:, :, 1:]) > 0.1
    for call in calls:  # rewritten before every step, at timestep 0
        assert relative_l2(call["video"][:, :, :1], WAN22.process_in(clean)) < 1e-6
        assert call["denoise_mask"].flatten(1).tolist() == [[0, 1, 1]] * 2
        assert call.get("audio_denoise_mask") is None


def test_given_audio_stays(model):
    latent = joint(seed=11)
    video, audio = latent.unbind()
    mask = NestedTensor((torch.ones_like(video[:, :1]), torch.zeros_like(audio[:, :1])))
    with Calls(model) as calls:
        out = sample(model, latent, mask=mask, solver="unipc", steps=3)
    assert torch.equal(out.unbind()[1], audio)
    assert relative_l2(out.unbind()[0], video) > 0.1
    for call in calls:
        assert torch.equal(call["audio"], audio)
        assert not call["audio_denoise_mask"].any() and call["denoise_mask"].all()


def test_a_given_start_of_the_audio_stays(model):
    latent = joint(seed=12)
    video, audio = latent.unbind()
    audio_mask = torch.ones_like(audio[:, :1])
    audio_mask[:, :, :5] = 0
    with Calls(model) as calls:
        out = sample(model, latent, mask=NestedTensor((torch.ones_like(video[:, :1]), audio_mask)))
    assert relative_l2(out.unbind()[1][:, :, :5], audio[:, :, :5]) < 1e-6
    assert relative_l2(out.unbind()[1][:, :, 5:], audio[:, :, 5:]) > 0.1
    assert torch.equal(calls[0]["audio_denoise_mask"], audio_mask)


def test_a_given_part_of_a_frame_stays_and_is_clean(model):
    """Its tokens get timestep 0, the others the full one; frames that are whole cost no more than before."""
    latent = joint(3, 4, 6, seed=13)
    mask = first_frame_mask(latent)
    mask.unbind()[0][:, :, 1:, :, 4:] = 0
    with Calls(model) as calls:
        out = sample(model, latent, mask=mask, solver="unipc", steps=3)
    video = latent.unbind()[0]
    assert relative_l2(out.unbind()[0][:, :, 1:, :, 4:], video[:, :, 1:, :, 4:]) < 1e-6
    assert relative_l2(out.unbind()[0][:, :, 1:, :, :4], video[:, :, 1:, :, :4]) > 0.1
    assert all(torch.equal(call["denoise_mask"], mask.unbind()[0]) for call in calls)
    with Calls(model) as calls:
        sample(windowed(model, 2, 1, causal=False), latent, mask=mask, steps=1)
    assert torch.equal(calls[0]["denoise_mask"], mask.unbind()[0][:, :, :2])
    cached = step_cache.set_step_cache(model, step_cache.Settings(0.1, 0.1, 0.0, 1.0))
    assert_pair_close(sample(cached, latent, mask=mask, solver="unipc", steps=3), out, 1e-5)


# --- wrong inputs ----------------------------------------------------------------------------------------------------

VIDEO, AUDIO = noise(1, 48, 3, 4, 6, seed=1), noise(1, 20, 15, seed=2)


@pytest.mark.parametrize("content", [0, 1])
@pytest.mark.parametrize(("samples", "found"), [
    (VIDEO, "[1, 48, 3, 4, 6]"), (noise(1, 16, 3, 4, 6), "[1, "), (noise(1, 16, 4, 6), "[1, "), (AUDIO, "[1, "),
    (NestedTensor((AUDIO, VIDEO)), "got [1, 20, 15] and [1, 48, 3, 4, 6]"),
    (NestedTensor((noise(1, 16, 3, 4, 6), AUDIO)), "got [1, 16, 3, 4, 6] and [1, 20, 15]"),
    (NestedTensor((VIDEO, noise(1, 40, 15))), "got [1, 48, 3, 4, 6] and [1, 40, 15]"),
    (NestedTensor((VIDEO, AUDIO, AUDIO)), "[1, 20, 15]"),
])
def test_latents_ovi_cannot_sample_get_a_sentence(model, samples, found, content):
    samples = samples * content  # ComfyUI treats empty latents differently
    with pytest.raises(ValueError, match="Ovi") as error:
        sample(model, samples)
    assert found in str(error.value)
    assert "Connect" in str(error.value) or "Use the Wan2.2 VAE" in str(error.value)


@pytest.mark.parametrize("extra", [{}, {AUDIO_TEXT_KEY: text(3, 1, 32)}])
def test_text_of_another_encoder_gets_a_sentence(model, extra):
    cond = conditioning(width=TINY.text if extra else 32, **extra)
    with pytest.raises(ValueError, match=r"32 wide, but this Ovi model reads 64.*UMT5"):
        sample(model, joint(), guider=BasicGuider.execute(model, cond).result[0])


def test_registering_twice_enters_ovi_once():
    supported_models.register()
    supported_models.register()
    assert comfy.supported_models.models.count(supported_models.OviConfig) == 1
    assert comfy.supported_models.models[0] is supported_models.OviConfig


# --- precision --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flag", [None, "fp16_unet", "force_fp16"])
@pytest.mark.parametrize("has_bf16", [True, False])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_float16_is_never_computed_in(weights, flag, has_bf16, stored, monkeypatch, caplog):
    """On a GPU, by what core asks of one: its command line asks for float16 whatever the model allows."""
    if flag is not None:  # core reads the second as the first too
        for name in ("fp16_unet", flag):
            monkeypatch.setattr(comfy.cli_args.args, name, True)
    for name, answer in (("should_use_bf16", has_bf16), ("should_use_fp16", True)):
        monkeypatch.setattr(comfy.model_management, name, lambda *_, answer=answer, **__: answer)
    tensors = core_layout({key: tensor.to(stored) for key, tensor in weights.items()})
    model = comfy.sd.load_diffusion_model_state_dict(tensors)
    expected = torch.bfloat16 if has_bf16 else torch.float32
    assert model.model.get_dtype_inference() == expected
    assert [str(expected) in record.message for record in caplog.records if "Ovi computes" in record.message] == (
        [] if flag is None else [True])
    out = sample(model, joint(2, 2, 2), steps=1)
    assert all(torch.isfinite(stream).all() for stream in out.unbind())


def test_float16_from_a_node_is_not_computed_in(weights, caplog):
    model, = ModelComputeDtype().patch(load(weights, torch.bfloat16), "fp16")
    with Calls(model) as calls:
        sample(model, joint(2, 2, 2), steps=1)
    assert calls[0]["video"].dtype == torch.float32  # the CPU's choice; bf16 on a GPU that has it
    assert "Ovi computes in torch.float32 although float16 was asked for" in caplog.text
