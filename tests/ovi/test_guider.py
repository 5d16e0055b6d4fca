"""Guidance per stream, skip-layer guidance, and whole sampling runs against the oracle's loop."""

import copy
import json

import comfy.latent_formats
import comfy.samplers
import nodes
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.nested_tensor import NestedTensor
from comfy.sample import prepare_noise
from comfy_extras.nodes_custom_sampler import (
    BasicGuider,
    BasicScheduler,
    CFGGuider,
    KSamplerSelect,
    RandomNoise,
    SamplerCustomAdvanced,
)
from ovi_native.nodes.sampling import OviAudioGuidance, OviGuider, OviSampler, OviSchedule, OviSkipLayer, OviSolver
from ovi_native.ovi_model.ovi import model_base
from ovi_native.ovi_model.ovi.conditioning import AUDIO_TEXT_KEY, SKIP_LAYER_KEY
from ovi_native.ovi_model.ovi.guider import make_guider
from ovi_native.ovi_model.sampling import solvers
from safetensors.torch import load_file
from support import oracle
from tiny.checkpoint import draw_weights
from tiny.compare import assert_pair_close, assert_pair_equal, relative_l2
from tiny.inputs import conditioning, first_frame_mask, joint, noise
from tiny.models import Batches, load, plain_wan, tiny_model
from tiny.sizes import TINY, Sizes

WAN22 = comfy.latent_formats.Wan22()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def conds():
    """Positive; negative with an audio text of its own."""
    return conditioning(7, 1), conditioning(5, 2, audio_tokens=4)


def advanced(guider, latent=None, solver="euler", steps=2, seed=5, mask=None, sigmas=None, sampler=None):
    given = {"samples": joint() if latent is None else latent}
    if mask is not None:
        given["noise_mask"] = mask
    return SamplerCustomAdvanced.execute(
        RandomNoise.execute(seed).result[0], guider, sampler or solvers.make_sampler(solver),
        solvers.make_sigmas(solver, steps) if sigmas is None else sigmas, given).result[0]["samples"]


# --- the whole loop ---------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_oracle_samples_like_the_reference(golden):
    """All float32 runs, from the stored noise to the stored result."""
    config = json.loads((golden / "sampling" / "config.json").read_text())
    data = load_file(golden / "sampling" / "inputs.safetensors")
    weights = load_file(golden / "fusion" / "weights.safetensors")

    def velocities(video, audio, t, negative):
        texts = ("text_video_neg", "text_audio_neg") if negative else ("text_pos", "text_pos")
        return oracle.forward(weights, video, audio, t, data[texts[0]], data[texts[1]], clean_first_frame=i2v,
                              skip_layer=config["slg"] if negative else -1)

    for run in config["runs"]:
        truth, i2v = load_file(golden / "sampling" / run["file"]), run["i2v"]
        video, audio = oracle.sample(
            velocities, data["video_noise"], data["audio_noise"].T, run["solver"], config["steps"], config["shift"],
            config["vg"], config["ag"], data["first_frame_latent"] if i2v else None)
        assert relative_l2(video, truth["video.final"]) < 1e-5
        assert relative_l2(audio.T, truth["audio.final"]) < 1e-5


@pytest.mark.parametrize("solver", solvers.SOLVERS)
@pytest.mark.parametrize("i2v", [False, True])
def test_the_sampler_node_is_the_oracles_loop(solver, i2v):
    """'Ovi Sampler' on a random model: random sizes, texts, scales and skipped layer, odd height and width."""
    seed = 10 * solvers.SOLVERS.index(solver) + i2v
    sizes, steps, shift, skip = Sizes(heads=1 + i2v, blocks=2, ffn=96), 4 + i2v, 3.0 + i2v, 1 - i2v
    weights = draw_weights(sizes, seed)
    positive, negative = conditioning(6, seed), conditioning(3, seed + 1, audio_tokens=8)
    latent = joint(frames=3, height=3, width=5, seed=seed if i2v else None)
    first = WAN22.process_in(latent.unbind()[0])[0, :, :1] if i2v else None

    given = {"samples": latent} | ({"noise_mask": first_frame_mask(latent)} if i2v else {})
    if i2v:  # everything but the first frame is sampled from noise alone
        latent.unbind()[0][:, :, 1:], latent.unbind()[1][:] = WAN22.process_out(torch.zeros(1, 48, 2, 3, 5)), 0
    found = OviSampler.execute(load(weights), positive, negative, given, seed, steps, solver, shift, 4.5, 2.5, skip,
                               1.0).result[0]["samples"]

    def velocities(video, audio, t, is_negative):
        cond, options = (negative if is_negative else positive)[0]
        return oracle.forward(weights, video, audio, t, cond[0], options.get(AUDIO_TEXT_KEY, cond)[0],
                              clean_first_frame=i2v, skip_layer=skip if is_negative else -1)

    video_noise, audio_noise = prepare_noise(latent, seed).unbind()
    video, audio = oracle.sample(velocities, video_noise[0], audio_noise[0], solver, steps, shift, 4.5, 2.5, first)
    assert_pair_close(found, (WAN22.process_out(video[None]), audio[None]), 1e-5)


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_the_parts_are_the_sampler_node(model, conds, solver):
    """Guider, solver and schedule in SamplerCustomAdvanced give 'Ovi Sampler' bit for bit."""
    latent = joint(seed=4)
    mask = first_frame_mask(latent)
    whole = OviSampler.execute(model, *conds, {"samples": latent, "noise_mask": mask}, 9, 3, solver, 5.0, 4.0, 3.0, 1,
                               0.7).result[0]["samples"]
    parts = advanced(OviGuider.execute(model, *conds, 4.0, 3.0, 1).result[0], latent, seed=9, mask=mask,
                     sigmas=OviSchedule.execute(solver, 3, 5.0, 0.7).result[0],
                     sampler=OviSolver.execute(solver).result[0])
    assert_pair_equal(parts, whole)


def test_the_same_seed_gives_the_same_clip_and_another_another(model, conds):
    def run(seed):
        return OviSampler.execute(model, *conds, {"samples": joint()}, seed, 2, "unipc", 5.0, 4.0, 3.0, 1, 1.0)

    first, again, other = (run(seed).result[0]["samples"] for seed in (1, 1, 2))
    assert_pair_equal(first, again)
    assert all(relative_l2(a, b) > 0.1 for a, b in zip(first.unbind(), other.unbind(), strict=True))


# --- one scale per stream ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scales", [(4.0, 3.0), (1.0, 3.0), (4.0, 1.0), (1.0, 1.0), (0.0, 2.0)])
def test_each_stream_follows_its_own_scale(model, conds, scales):
    """One step from noise shows the guided estimates themselves."""
    def estimates(cond):
        return advanced(BasicGuider.execute(model, cond).result[0], steps=1).unbind()

    found = advanced(make_guider(model, *conds, *scales), steps=1).unbind()
    for stream, positive, negative, scale in zip(found, estimates(conds[0]), estimates(conds[1]), scales, strict=True):
        assert relative_l2(stream, negative + scale * (positive - negative)) < 1e-5


def test_the_audio_scale_reaches_the_video_only_through_the_model(model, conds):
    def run(audio_scale, steps):
        return advanced(OviGuider.execute(model, *conds, 4.0, audio_scale, -1).result[0], steps=steps).unbind()

    (video, audio), (same_video, other_audio) = run(3.0, 1), run(5.0, 1)
    assert torch.equal(video, same_video) and relative_l2(audio, other_audio) > 1e-2
    assert relative_l2(run(3.0, 2)[0], run(5.0, 2)[0]) > 1e-4


def test_audio_guidance_below_a_stock_sampler_is_the_guider(model, conds):
    """KSampler with 'Ovi Audio Guidance' and 'Ovi Skip Layer' equals 'Ovi Guider', bit for bit."""
    patched = OviAudioGuidance.execute(model, 3.0).result[0]
    negative = OviSkipLayer.execute(conds[1], 1).result[0]
    stock, = nodes.KSampler().sample(patched, 7, 3, 4.0, "euler", "simple", conds[0], negative, {"samples": joint()})
    ours = advanced(OviGuider.execute(model, *conds, 4.0, 3.0, 1).result[0], seed=7,
                    sigmas=BasicScheduler.execute(model, "simple", 3, 1.0).result[0],
                    sampler=KSamplerSelect.execute("euler").result[0])
    assert_pair_equal(stock["samples"], ours)


def test_audio_is_guided_even_at_cfg_1(model, conds):
    """Core leaves out the negative pass at cfg 1; the audio still needs it."""
    patched = OviAudioGuidance.execute(model, 3.0).result[0]

    def run(m):
        return nodes.KSampler().sample(m, 7, 1, 1.0, "euler", "simple", *conds, {"samples": joint()})[0][
            "samples"].unbind()

    plain, guided = run(model), run(patched)
    assert relative_l2(plain[0], guided[0]) < 1e-5 and relative_l2(plain[1], guided[1]) > 1e-2


def test_audio_guidance_changes_nothing_without_a_negative(model, conds):
    patched = OviAudioGuidance.execute(model, 3.0).result[0]
    assert_pair_equal(advanced(BasicGuider.execute(patched, conds[0]).result[0]),
                      advanced(BasicGuider.execute(model, conds[0]).result[0]))


def test_patching_leaves_the_given_model_alone(model, conds):
    before = advanced(CFGGuider.execute(model, *conds, 4.0).result[0])
    options = copy.deepcopy(model.model_options)
    OviAudioGuidance.execute(model, 9.0)
    OviGuider.execute(model, *conds, 4.0, 9.0, 1)
    assert model.model_options == options
    assert_pair_equal(advanced(CFGGuider.execute(model, *conds, 4.0).result[0]), before)


# --- skipped layers ---------------------------------------------------------------------------------------------------

def test_setting_a_skip_layer_copies_the_conditioning(conds):
    skipped = OviSkipLayer.execute(conds[1], 2).result[0]
    assert SKIP_LAYER_KEY not in conds[1][0][1]
    assert skipped[0][1] == {**conds[1][0][1], SKIP_LAYER_KEY: 2}
    assert skipped[0][0] is conds[1][0][0]


@pytest.mark.parametrize("batch", [1, 2])
def test_positive_and_negative_share_a_batch_whatever_is_skipped(model, conds, batch, monkeypatch):
    """One call of the network per step, and the same numbers as when memory forces one call each."""
    latent, guider = joint(batch=batch), OviGuider.execute(model, *conds, 4.0, 3.0, 1).result[0]
    with Batches(model) as together:
        shared = advanced(guider, latent)
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda *_: 0)
    with Batches(model) as apart:
        split = advanced(guider, latent)
    assert together == [2 * batch] * 2 and apart == [batch] * 4
    assert_pair_close(shared, split, 1e-5)


def test_the_skipped_layer_touches_the_negative_pass_only(model, conds):
    def run(skip, scale):
        return advanced(OviGuider.execute(model, *conds, scale, scale, skip).result[0], steps=1)

    assert_pair_close(run(1, 1.0), run(-1, 1.0), 1e-5)  # at scale 1 the negative cancels out
    for a, b in zip(run(1, 4.0).unbind(), run(-1, 4.0).unbind(), strict=True):
        assert relative_l2(a, b) > 1e-2


@pytest.mark.parametrize("layer", [TINY.blocks, 99])
def test_a_layer_the_model_lacks_gets_a_sentence(model, conds, layer):
    with pytest.raises(ValueError, match=rf"Skip layer {layer} does not exist: this Ovi model has blocks 0 to 2\."):
        OviGuider.execute(model, *conds, 4.0, 3.0, layer)


def test_rows_of_skipped_layers_survive_batching():
    a, b = model_base.CondOfEach([1]).process_cond(2), model_base.CondOfEach([-1]).process_cond(2)
    assert a.can_concat(b) and a.concat([b]) == [1, 1, -1, -1]
    assert model_base.CondOfEach([0, 2]).process_cond(3).cond == [0, 2, 0]


def test_nodes_refuse_other_models(conds):
    wan = plain_wan()
    for call in (lambda: OviAudioGuidance.execute(wan, 3.0), lambda: OviGuider.execute(wan, *conds, 4.0, 3.0, 1),
                 lambda: OviSampler.execute(wan, *conds, {"samples": joint()}, 1, 2, "euler", 5.0, 4.0, 3.0, 1, 1.0)):
        with pytest.raises(ValueError, match=r"needs an Ovi model, but got WAN2.*Load Ovi Model"):
            call()


def test_a_batch_of_clips_has_its_own_noise_and_the_same_guidance(model, conds):
    """Row 0 of a batch is the clip sampled alone from the same noise."""
    guider = OviGuider.execute(model, *conds, 4.0, 3.0, 1).result[0]
    video, audio = noise(2, 48, 3, 4, 6, seed=1), noise(2, 20, 15, seed=2)
    sampler, sigmas = solvers.make_sampler("unipc"), solvers.make_sigmas("unipc", 3)

    def run(v, a):
        return guider.sample(NestedTensor((v, a)), NestedTensor((torch.zeros_like(v), torch.zeros_like(a))), sampler,
                             sigmas, disable_pbar=True)

    both = run(video, audio)
    for row in range(2):
        alone = run(video[row:row + 1], audio[row:row + 1])
        assert_pair_close([x[row:row + 1] for x in both.unbind()], alone, 1e-5)


