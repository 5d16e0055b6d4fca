"""Guidance nodes of ComfyUI and others on a joint latent: equal to the same node applied by hand to each stream."""

import logging

import comfy.samplers
import comfy.utils
import nodes
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import (
    BasicScheduler,
    CFGGuider,
    DualModelGuider,
    KSamplerSelect,
    RandomNoise,
    SamplerCustomAdvanced,
)
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_model_advanced import ModelSamplingFlux, ModelSamplingSD3
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from ovi_native.nodes.sampling import OviAudioGuidance, OviGuider, OviSampler
from ovi_native.ovi_model.ovi.guider import make_guider, overridden, overridden_schedule
from ovi_native.ovi_model.sampling import guidance, step_cache
from ovi_native.ovi_model.sampling.stream_guidance import cfg
from ovi_native.ovi_model.sampling.stream_memory import StreamMemory
from support.guidance_nodes import NODES, Momentum
from tiny.checkpoint import draw_weights
from tiny.compare import assert_pair_close, relative_l2
from tiny.inputs import conditioning, joint
from tiny.models import Batches, load, network
from tiny.sizes import Sizes

CONDS = conditioning(7, 1), conditioning(5, 2, audio_tokens=4)
LATENT = joint(2, 4, 6, audio=6)
SHAPES = [stream.shape for stream in LATENT.unbind()]


@pytest.fixture(scope="module")
def model():
    return load(draw_weights(Sizes(blocks=2)))


def by_hand(patched, x, cond, uncond, sigma, scale):
    """Core's formula with the node's functions, on the tensors of one stream."""
    options, conds = patched.model_options, [[{}], [{}]]
    out = [cond, uncond]
    for function in options.get("sampler_pre_cfg_function", []):
        out = function({"conds": conds, "conds_out": out, "cond_scale": scale, "timestep": sigma, "input": x,
                        "sigma": sigma, "model": patched.model, "model_options": options})
    return comfy.samplers.cfg_function(patched.model, out[0], out[1], scale, x, sigma, options, *conds)


class Steps:
    """A MODEL clone that notes each step's latent, estimates (positive, negative) and noise level, all packed."""

    def __init__(self, model):
        self.seen, self.model = [], model.clone()
        self.model.set_model_sampler_calc_cond_batch_function(self.see)

    def see(self, args):
        out = comfy.samplers.calc_cond_batch(args["model"], args["conds"], args["input"], args["sigma"],
                                             args["model_options"])
        self.seen.append((args["input"].clone(), [x.clone() for x in out], args["sigma"].clone()))
        return out


def denoised_of(guider, latent):
    """The estimate of every step of a sampling, as the sampler got it."""
    found = []
    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.8, 0.5, 0.0])
    guider.sample(joint(2, 4, 6, audio=6, batch=latent.shape[0], seed=5), latent, sampler, sigmas,
                  callback=lambda _step, x0, _x, _total: found.append(x0.unbind()), disable_pbar=True)
    return found


def stock(model, cfg=4.0):
    return CFGGuider.execute(model, *CONDS, cfg).result[0]


RUNS = {
    "CFGGuider": (lambda m: stock(m), 4.0, 4.0),
    "Ovi Audio Guidance": (lambda m: stock(OviAudioGuidance.execute(m, 3.0).result[0]), 4.0, 3.0),
    "Ovi Audio Guidance first": (lambda m: stock(m), 4.0, 3.0),
    "Ovi Guider": (lambda m: OviGuider.execute(m, *CONDS, 4.0, 2.0, -1).result[0], 4.0, 2.0),
    "no picture guidance": (lambda m: OviGuider.execute(m, *CONDS, 1.0, 2.0, -1).result[0], 1.0, 2.0),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", NODES)
def test_a_node_is_applied_to_each_stream(model, name, run):
    guider, *scales = RUNS[run]
    first = OviAudioGuidance.execute(model, 3.0).result[0] if run == "Ovi Audio Guidance first" else model
    steps = Steps(NODES[name](first))
    fresh = [NODES[name](model) for _ in SHAPES]
    for found, (x, out, sigma) in zip(denoised_of(guider(steps.model), LATENT), steps.seen, strict=True):
        x, cond, uncond = (comfy.utils.unpack_latents(packed, SHAPES) for packed in (x, *out))
        if name == "RescaleCFG" or name == "several":  # knows pictures only: no dimension 3 in [B, C, A]
            x[1], cond[1], uncond[1] = (stream[1].unsqueeze(2) for stream in (x, cond, uncond))
        for stream in range(2):
            expected = by_hand(fresh[stream], x[stream], cond[stream], uncond[stream], sigma, scales[stream])
            assert relative_l2(found[stream], expected.reshape(SHAPES[stream])) < 1e-5, (name, stream)


def test_the_sampler_nodes_result_holds_what_a_node_does_to_the_sound(model):
    """'Ovi Sampler' and KSampler; formerly the sound's own scale was put over it."""
    def sampler(m):
        return OviSampler.execute(m, *CONDS, {"samples": LATENT}, 7, 2, "euler", 5.0, 4.0, 3.0, -1, 1.0).result[0][
            "samples"].unbind()

    def ksampler(m):
        return nodes.KSampler().sample(m, 7, 2, 4.0, "euler", "simple", *CONDS, {"samples": LATENT})[0][
            "samples"].unbind()

    for run in (sampler, ksampler):
        for a, b in zip(run(NODES["CFGNorm"](model)), run(model), strict=True):
            assert relative_l2(a, b) > 1e-2


def test_shapes_and_scales_that_a_function_sees(model):
    seen = []

    def note(kind):
        def function(args):
            tensors = [tuple(v.shape) for v in args.values() if torch.is_tensor(v) and v.ndim > 1]
            tensors += [tuple(v.shape) for v in args.get("conds_out", [])]
            seen.append((kind, set(tensors), args["cond_scale"]))
            return {"before": args.get("conds_out"), "instead": args.get("cond"), "after": args.get("denoised")}[kind]
        return function

    patched = model.clone()
    patched.set_model_sampler_pre_cfg_function(note("before"))
    patched.set_model_sampler_cfg_function(note("instead"))
    patched.set_model_sampler_post_cfg_function(note("after"))
    batch = joint(2, 4, 6, audio=6, batch=2)
    denoised_of(OviGuider.execute(patched, *CONDS, 4.0, 2.0, -1).result[0], batch)
    video, audio = ({tuple(stream.shape)} for stream in batch.unbind())
    step = [(kind, shape, scale) for kind in ("before", "instead", "after") for shape, scale in (
        (video, 4.0), (audio, 2.0))]
    assert seen == 3 * step


def test_memory_of_one_sampling_does_not_reach_the_next(model):
    patched = NODES["APG"](model)
    first = denoised_of(stock(patched), LATENT)
    for again in (denoised_of(stock(patched), LATENT), denoised_of(stock(NODES["APG"](model)), LATENT)):
        for a, b in zip(first, again, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_samplers_that_add_a_function_of_their_own(model):
    """cfg_pp samplers read the packed negative estimate through one."""
    patched = OviAudioGuidance.execute(NODES["CFGNorm"](model), 3.0).result[0]
    for m in (NODES["CFGNorm"](model), patched):
        out, = nodes.KSampler().sample(m, 7, 3, 2.0, "euler_cfg_pp", "simple", *CONDS, {"samples": LATENT})
        assert all(torch.isfinite(stream).all() for stream in out["samples"].unbind())


def test_with_easycache_that_leaves_out_model_calls(model):
    """The functions are called for each stream in these steps too."""
    cached = EasyCacheNode.execute(NODES["RescaleCFG"](model), 3.0, 0.0, 1.0, False).result[0]
    with Batches(model) as calls:
        OviSampler.execute(cached, *CONDS, {"samples": LATENT}, 7, 8, "unipc", 5.0, 4.0, 3.0, -1, 1.0)
    assert len(calls) < 8


# --- functions that call the model again -----------------------------------------------------------------------------

SLG = {"double_layers": "1", "single_layers": ""}


@pytest.mark.parametrize("cached", [False, True])
def test_skip_layer_guidance_reaches_both_streams_with_one_more_pass(model, cached):
    patched = SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, **SLG).result[0]
    if cached:
        patched = step_cache.set_step_cache(patched, step_cache.Settings(0.0, 0.0, 0.0, 1.0))
    skipped = []

    def take_down(executor, x, *args, **kwargs):
        out = executor(x, *args, **kwargs)
        if args[4].get("patches_replace"):
            skipped.append(out.clone())
        return out

    steps = Steps(patched)
    steps.model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "watch", take_down)
    with Batches(model) as calls:
        found = denoised_of(RUNS["Ovi Guider"][0](steps.model), LATENT)
    assert calls == [2, 1] * 3
    for estimates, (_, out, _), without in zip(found, steps.seen, skipped, strict=True):
        cond, uncond, without = (comfy.utils.unpack_latents(packed, SHAPES) for packed in (*out, without))
        for stream, scale in enumerate((4.0, 2.0)):
            expected = cfg(cond[stream], uncond[stream], scale) + 3.0 * (cond[stream] - without[stream])
            assert relative_l2(estimates[stream], expected) < 1e-5


@pytest.mark.parametrize("way", ["calc_cond_batch", "bare options", "apply_model"])
def test_a_changed_latent_runs_with_the_other_stream_as_it_stands(model, way):
    """Self-attention guidance asks for the estimate at a latent that it has changed."""
    seen, asked = [], []

    def again(args):
        x = args["input"] * 0.5
        options = args["model_options"] if way == "calc_cond_batch" else {"transformer_options": {}}
        if way == "apply_model":
            model_conds = args["cond"][0]["model_conds"]
            conds = {key: value.process_cond(batch_size=1).cond for key, value in model_conds.items()}
            conds["transformer_options"] = {"uuids": [1], "cond_or_uncond": [0]}
            out = args["model"].apply_model(x, args["sigma"], **conds)
        else:
            out, = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], x, args["sigma"], options)
        seen.append(out)
        return args["denoised"]

    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(again)
    hook = network(model).register_forward_pre_hook(lambda _, args: asked.append([x[:1].clone() for x in args[0]]))
    denoised_of(stock(patched), LATENT)
    hook.remove()
    whole, video, audio = asked[:3]
    assert_pair_close(video, [whole[0] * 0.5, whole[1]], 0.0)
    assert_pair_close(audio, [whole[0], whole[1] * 0.5], 0.0)
    assert [tuple(out.shape) for out in seen[:2]] == [tuple(shape) for shape in SHAPES]


# --- what has no effect -----------------------------------------------------------------------------------------------

def warnings_of(model):
    lines = []
    guider = make_guider(model, *CONDS, 4.0, 3.0, -1, lines.append)
    denoised_of(guider, LATENT)
    return lines


def test_attention_guidance_reaches_both_streams(model):
    patched = NAGuidance.execute(model, 5.0, 0.5, 1.5).result[0]
    for a, b in zip(denoised_of(stock(patched), LATENT)[0], denoised_of(stock(model), LATENT)[0], strict=True):
        assert relative_l2(a, b) > 1e-3
    assert warnings_of(patched) == []


def test_patches_without_effect_are_named_once(model, caplog):
    patched = PerturbedAttentionGuidance.execute(model, 3.0).result[0]
    line, = warnings_of(patched)
    assert line.startswith("Without effect on Ovi: PerturbedAttentionGuidance (attn1 of middle 0). ")
    unet = model.clone()
    unet.set_model_output_block_patch(Momentum())  # as 'FreeU'
    assert warnings_of(unet)[0].startswith("Without effect on Ovi: Momentum (output_block_patch). ")
    with caplog.at_level(logging.WARNING):
        denoised_of(stock(patched), LATENT)
    assert caplog.text.count("Without effect on Ovi: PerturbedAttentionGuidance") == 1
    assert warnings_of(SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, "1", "7, 8").result[0]) == []
    assert "(double_block 7" in warnings_of(SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, "7", "").result[0])[0]


def test_a_function_for_another_kind_of_model_gets_a_sentence(model):
    def broken(args):
        return args["denoised"].attribute_of_another_model

    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(broken)
    with pytest.raises(ValueError, match=r"guidance function of 'test_a_function_for_another.*Ovi's picture, a latent "
                                         r"\[1, 48, 2, 4, 6\].*take its node out"):
        denoised_of(stock(patched), LATENT)
    with pytest.raises(ValueError, match="'SelfAttentionGuidance' cannot be used on Ovi's picture"):
        nodes.KSampler().sample(SelfAttentionGuidance.execute(model, 0.5, 2.0).result[0], 7, 2, 4.0, "euler", "simple",
                                *CONDS, {"samples": joint(6, 12, 12)})


# --- before and after the steps ---------------------------------------------------------------------------------------

def test_streams_of_different_length_are_reported_with_both_lengths(model, caplog):
    with caplog.at_level(logging.WARNING):
        nodes.KSampler().sample(model, 7, 1, 4.0, "euler", "simple", *CONDS, {"samples": joint(3, 2, 2, audio=40)})
        assert "The picture lasts 0.38 s, the sound 1.28 s" in caplog.text
        caplog.clear()
        nodes.KSampler().sample(model, 7, 1, 4.0, "euler", "simple", *CONDS, {"samples": joint(3, 2, 2, audio=11)})
        assert "lasts" not in caplog.text


@pytest.mark.parametrize("tower, stream", [("video_model", "picture"), ("audio_model", "sound")])
def test_a_result_that_is_not_finite_is_refused(tower, stream):
    weights = draw_weights(Sizes(blocks=1))
    weights[f"{tower}.head.head.weight"][0, 0] = float("nan")
    broken = load(weights)
    for run in (lambda: OviSampler.execute(broken, *CONDS, {"samples": LATENT}, 7, 1, "euler", 5.0, 4.0, 3.0, -1, 1.0),
                lambda: nodes.KSampler().sample(broken, 7, 1, 4.0, "euler", "simple", *CONDS, {"samples": LATENT})):
        with pytest.raises(RuntimeError, match=rf"sampled {stream} is not finite.*damaged model file.*LoRA.*fp16"):
            run()


def test_a_conditioning_without_text_gets_a_sentence(model):
    guider = DualModelGuider.execute(model, CONDS[0], 4.0, model.clone()).result[0]
    with pytest.raises(ValueError, match=r"holds no text.*Ovi Prompt"):
        denoised_of(guider, LATENT)


def test_functions_under_the_dual_model_guider(model):
    guider = DualModelGuider.execute(NODES["RescaleCFG"](model), CONDS[0], 4.0, model.clone(), CONDS[1]).result[0]
    for a, b in zip(denoised_of(guider, LATENT), denoised_of(stock(NODES["RescaleCFG"](model)), LATENT), strict=True):
        assert all(relative_l2(x, y) < 1e-5 for x, y in zip(a, b, strict=True))


def test_settings_of_nodes_before_that_are_replaced_are_named(model):
    from ovi_native.nodes.sampling import OviSkipLayer

    audio = OviAudioGuidance.execute(model, 9.0).result[0]
    negative = OviSkipLayer.execute(CONDS[1], 1).result[0]
    assert overridden(model, CONDS[1], 3.0, -1) == []
    assert overridden(audio, negative, 9.0, 1) == []
    first, second = overridden(audio, negative, 3.0, -1)
    assert "'Ovi Audio Guidance' with 9 before this node has no effect: its own audio_guidance of 3" in first
    assert "'Ovi Skip Layer' with 1 on the negative" in second and "skip_layer of -1" in second
    shifted = ModelSamplingSD3().patch(model, 8.0)[0]
    assert overridden_schedule(model, 5.0) == overridden_schedule(shifted, 8.0) == []
    assert "shift of 8 from a node before this one" in overridden_schedule(shifted, 5.0)[0]
    assert "another kind of schedule" in overridden_schedule(
        ModelSamplingFlux().patch(model, 1.15, 0.5, 1024, 1024)[0], 5.0)[0]


def test_the_sampler_node_shows_all_of_it(model):
    patched = ModelSamplingSD3().patch(PerturbedAttentionGuidance.execute(
        OviAudioGuidance.execute(model, 9.0).result[0], 3.0).result[0], 8.0)[0]
    out = OviSampler.execute(patched, *CONDS, {"samples": joint(2, 4, 6, audio=40)}, 7, 1, "euler", 5.0, 4.0, 3.0, -1,
                             1.0)
    shown = out.ui.as_dict()["text"][0]
    for part in ("⚠ 'Ovi Audio Guidance' with 9", "⚠ A shift of 8", "⚠ The picture lasts", "⚠ Without effect on Ovi"):
        assert part in shown


def test_prompt_and_latent_are_compared_where_the_model_is_unknown(model):
    """A file whose name and metadata do not tell its variant."""
    prompt = [[CONDS[0][0][0], {"ovi_variant": "720x720_5s"}]]
    latent = {"samples": joint(2, 2, 2, audio=6), "ovi_variant": "960x960_10s"}
    out = OviSampler.execute(model, prompt, CONDS[1], latent, 7, 1, "euler", 5.0, 4.0, 3.0, -1, 1.0)
    shown = out.ui.as_dict()["text"][0]
    assert shown.startswith("⚠ The prompt was made for 720x720_5s, but the latent for 960x960_10s: set the same")


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(model, scale):
    for call in (lambda: OviGuider.execute(model, *CONDS, scale, 3.0, -1),
                 lambda: OviAudioGuidance.execute(model, scale),
                 lambda: OviGuider.execute(model, *CONDS, 4.0, scale, -1),
                 lambda: guidance.set_guidance_range(model, scale, 1.0),
                 lambda: step_cache.set_step_cache(model, step_cache.Settings(scale, 0.1, 0.0, 1.0)),
                 lambda: step_cache.set_step_cache(model, step_cache.Settings(0.1, scale, 0.0, 1.0))):
        with pytest.raises(ValueError, match=r"nan|inf"):
            call()


@pytest.mark.parametrize("latent", [joint(2, 2, 2, batch=0), joint(0, 2, 2, audio=5), joint(2, 2, 2, audio=0)])
def test_an_empty_latent_or_conditioning_is_refused(model, latent):
    with pytest.raises(ValueError, match="empty joint latent"):
        OviSampler.execute(model, *CONDS, {"samples": latent}, 7, 1, "euler", 5.0, 4.0, 3.0, -1, 1.0)
    with pytest.raises(ValueError, match="empty joint latent"):
        SamplerCustomAdvanced.execute(
            RandomNoise.execute(7).result[0], OviGuider.execute(model, *CONDS, 4.0, 3.0, -1).result[0],
            KSamplerSelect.execute("euler").result[0], BasicScheduler.execute(model, "simple", 2, 1.0).result[0],
            {"samples": latent})
    for conds in (([], CONDS[1]), (CONDS[0], [])):
        with pytest.raises(ValueError, match="conditioning is empty"):
            OviGuider.execute(model, *conds, 4.0, 3.0, -1)


# --- memory -----------------------------------------------------------------------------------------------------------

def test_a_record_and_what_others_hand_over_stay_visible():
    """Lists are shared; a variable that an attention patch sets is seen by both streams; counts stay."""
    record, handed, calls = [], None, 0

    def function(stream):
        nonlocal calls
        calls += 1
        record.append((stream, handed))

    memory = StreamMemory()
    for step in range(2):
        handed = step
        for stream in range(2):
            with memory.of(function, stream):
                function(stream)
    memory.end()
    assert record == [(0, 0), (1, 0), (0, 1), (1, 1)] and calls == 2 and handed == 1


def test_nothing_is_left_behind(model):
    patched = NODES["APG"](model)
    denoised_of(stock(patched), LATENT)
    assert model.model.sampling is None and patched.callbacks.get("on_prepare_state", {}) == {}
    function, = patched.model_options["sampler_pre_cfg_function"]
    held = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))
    assert held["running_avg"] == 0 and held["prev_sigma"] is None
