"""ComfyUI's own nodes on Ovi's MODEL and LATENT: what comes out, not only that something does."""

import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import latent_preview
import nodes
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.ldm.modules.attention import attention_pytorch
from comfy.nested_tensor import NestedTensor
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_custom_sampler import (
    BasicGuider,
    BasicScheduler,
    CFGGuider,
    CFGOverride,
    DualCFGGuider,
    KSamplerSelect,
    RandomNoise,
    SamplerCustom,
    SamplerCustomAdvanced,
)
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_hooks import ConditioningSetProperties, CreateHookLora
from comfy_extras.nodes_lt import LTXVConcatAVLatent, LTXVSeparateAVLatent
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from comfy_extras.nodes_model_merging import ModelMergeSimple, ModelSave
from comfy_extras.nodes_slg import SkipLayerGuidanceDiTSimple
from ovi_native.nodes.sampling import OviGuider, OviSkipLayer
from ovi_native.ovi_model.ovi import checkpoint, model_base
from ovi_native.ovi_model.ovi.conditioning import AUDIO_TEXT_KEY
from ovi_native.ovi_model.sampling import solvers
from safetensors.torch import save_file
from support import oracle
from tiny.checkpoint import draw_weights
from tiny.compare import assert_pair_close, assert_pair_equal, relative_l2
from tiny.inputs import conditioning, first_frame_mask, joint, noise
from tiny.models import Batches, load, network
from tiny.sizes import TINY, Sizes, core_layout

# isort: split
import comfy_extras.nodes_post_processing  # noqa: F401 (core's nodes_latent imports it, and it nodes_latent)
from comfy_extras.nodes_latent import LatentAdd, LatentMultiply, LatentSubtract


@pytest.fixture(scope="module")
def weights():
    return draw_weights()


@pytest.fixture(scope="module")
def model(weights):
    return load(weights)


@pytest.fixture(scope="module")
def conds():
    return conditioning(7, 1), conditioning(5, 2, audio_tokens=4)


def small(seed=None, **sizes) -> NestedTensor:
    return joint(2, 2, 2, seed=seed, **sizes)


def ksampler(model, positive, negative, latent, sampler="euler", scheduler="simple", steps=2, cfg=4.0, seed=7,
             denoise=1.0) -> NestedTensor:
    latent = latent if isinstance(latent, dict) else {"samples": latent}
    return nodes.KSampler().sample(model, seed, steps, cfg, sampler, scheduler, positive, negative, latent, denoise)[0][
        "samples"]


def advanced(guider, model, latent, sampler="euler", scheduler="simple", steps=2, seed=7, output=0) -> NestedTensor:
    return SamplerCustomAdvanced.execute(
        RandomNoise.execute(seed).result[0], guider, KSamplerSelect.execute(sampler).result[0],
        BasicScheduler.execute(model, scheduler, steps, 1.0).result[0], {"samples": latent}).result[output]["samples"]


def assert_sampled(out: NestedTensor, latent: NestedTensor) -> None:
    for stream, given in zip(out.unbind(), latent.unbind(), strict=True):
        assert stream.shape == given.shape and torch.isfinite(stream).all() and stream.std() > 0.05


# --- samplers and schedulers -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_every_stock_sampler_with_one_cfg(model, conds, sampler):
    """Image to video, so that masks and the clean frame go through every sampler as well."""
    latent = small(seed=1)
    out = ksampler(model, *conds, {"samples": latent, "noise_mask": first_frame_mask(latent)}, sampler)
    assert_sampled(out, latent)
    assert relative_l2(out.unbind()[0][:, :, 1:], latent.unbind()[0][:, :, 1:]) > 0.1
    if sampler not in ("dpm_fast", "dpm_adaptive"):  # these stop at the last level above 0
        tolerance = 2e-2 if sampler.startswith("uni_pc") else 1e-4  # and core's uni_pc at 0.001
        assert relative_l2(out.unbind()[0][:, :, :1], latent.unbind()[0][:, :, :1]) < tolerance


@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_every_stock_scheduler(model, conds, scheduler):
    assert_sampled(ksampler(model, *conds, small(), scheduler=scheduler), small())


def test_the_stock_sampling_nodes_agree(model, conds):
    """KSampler, SamplerCustom and SamplerCustomAdvanced with CFGGuider are one computation."""
    latent = small(seed=2)
    whole = ksampler(model, *conds, latent)
    sigmas = BasicScheduler.execute(model, "simple", 2, 1.0).result[0]
    custom = SamplerCustom.execute(model, True, 7, 4.0, *conds, KSamplerSelect.execute("euler").result[0], sigmas,
                                   {"samples": latent}).result[0]["samples"]
    assert_pair_equal(custom, whole)
    guider = CFGGuider.execute(model, *conds, 4.0).result[0]
    assert_pair_equal(advanced(guider, model, latent), whole)
    assert_pair_close(advanced(guider, model, latent, output=1), whole, 1e-5)  # the last clean estimate
    assert_pair_equal(advanced(OviGuider.execute(model, *conds, 4.0, 4.0, -1).result[0], model, latent), whole)


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_cfg_guider(model, conds, style):
    """One step from noise returns the combined estimates."""
    third = conditioning(3, 5)
    a, b, n = (advanced(BasicGuider.execute(model, c).result[0], model, small(), steps=1).unbind()
               for c in (conds[0], third, conds[1]))
    guider = DualCFGGuider.execute(model, conds[0], third, conds[1], 4.0, 2.0, style).result[0]
    for out, x, y, z in zip(advanced(guider, model, small(), steps=1).unbind(), a, b, n, strict=True):
        expected = (z + 2.0 * (y - z) + 4.0 * (x - y)) if style == "regular" else (
            z + 2.0 * ((y + 4.0 * (x - y)) - z))
        assert relative_l2(out, expected) < 1e-5


def test_denoise_and_batches(model, conds):
    latent = small(seed=3, batch=2)
    part, full = ksampler(model, *conds, latent, denoise=0.3), ksampler(model, *conds, latent)
    assert_sampled(part, latent)
    for a, b, given in zip(part.unbind(), full.unbind(), latent.unbind(), strict=True):
        assert relative_l2(a, given) < relative_l2(b, given)
        assert relative_l2(a[:1], a[1:]) > 0.1


def test_two_stages_of_ksampler_advanced(model, conds):
    """The first stage leaves noise in the latent. Core's second, without new noise, cannot read joint latents."""
    node, latent = nodes.KSamplerAdvanced(), {"samples": small(seed=4)}
    full, = node.sample(model, "enable", 7, 3, 4.0, "euler", "simple", *conds, latent, 0, 10000, "disable")
    assert_pair_equal(full["samples"], ksampler(model, *conds, latent, steps=3))
    first, = node.sample(model, "enable", 7, 3, 4.0, "euler", "simple", *conds, latent, 0, 2, "enable")
    assert_sampled(first["samples"], latent["samples"])
    assert relative_l2(first["samples"].unbind()[0], full["samples"].unbind()[0]) > 1e-2


def test_the_shift_node_moves_the_schedule(model, conds):
    shifted = ModelSamplingSD3().patch(model, 3.0)[0]
    sigmas, ours = (BasicScheduler.execute(m, "simple", 4, 1.0).result[0] for m in (shifted, model))
    levels = torch.linspace(1.0, 0.0, 5)
    assert sigmas == pytest.approx(3 * levels / (1 + 2 * levels), abs=2e-3)
    assert ours == pytest.approx(5 * levels / (1 + 4 * levels), abs=2e-3)  # the released shift is the default
    video, _ = ksampler(shifted, *conds, small()).unbind()
    assert relative_l2(video, ksampler(model, *conds, small()).unbind()[0]) > 1e-2


# --- latents ----------------------------------------------------------------------------------------------------------

def test_arithmetic_on_joint_latents():
    a, b = small(seed=5), small(seed=6)
    pairs = list(zip(a.unbind(), b.unbind(), strict=True))
    for found, expected in (
        (LatentAdd.execute({"samples": a}, {"samples": b}).result[0], [x + y for x, y in pairs]),
        (LatentSubtract.execute({"samples": a}, {"samples": b}).result[0], [x - y for x, y in pairs]),
        (LatentMultiply.execute({"samples": a}, 0.5).result[0], [0.5 * x for x, _ in pairs]),
        (nodes.LatentBlend().blend({"samples": a}, {"samples": b}, 0.25)[0], [0.25 * x + 0.75 * y for x, y in pairs]),
    ):
        assert_pair_close(found["samples"], expected, 1e-6)


def test_concat_and_separate_keep_streams_and_masks():
    latent = small(seed=7)
    mask = first_frame_mask(latent)
    video, audio = LTXVSeparateAVLatent.execute({"samples": latent, "noise_mask": mask}).result
    assert torch.equal(video["samples"], latent.unbind()[0]) and torch.equal(audio["samples"], latent.unbind()[1])
    again = LTXVConcatAVLatent.execute(video, audio).result[0]
    assert_pair_equal(again["samples"], latent)
    assert_pair_equal(again["noise_mask"], mask)


def test_a_latent_put_together_by_hand_samples(model, conds):
    video, audio = small(seed=8).unbind()
    made = LTXVConcatAVLatent.execute({"samples": video}, {"samples": audio}).result[0]
    assert_pair_equal(ksampler(model, *conds, made, denoise=0.5), ksampler(model, *conds, small(seed=8), denoise=0.5))


def test_a_noise_mask_for_images_keeps_parts_of_the_picture(model, conds):
    """Left half given, right half sampled, in all frames; the sound is sampled whole."""
    latent = {"samples": joint(2, 4, 4, seed=9)}
    mask = torch.ones(1, 64, 64)
    mask[:, :, :32] = 0
    masked = nodes.SetLatentNoiseMask().set_mask(latent, mask)[0]
    video, audio = ksampler(model, *conds, masked).unbind()
    given, sound = latent["samples"].unbind()
    assert relative_l2(video[..., :1], given[..., :1]) < 1e-5 and relative_l2(video[..., 3:], given[..., 3:]) > 0.1
    assert relative_l2(audio, sound) > 0.1


def test_latent2rgb_previews_the_video(model, conds, monkeypatch):
    previews = []
    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK",
                        lambda value, total, preview, **_: previews.append((value, total, preview)))
    ksampler(model, *conds, joint(2, 4, 6), steps=3)
    assert [(value, total) for value, total, _ in previews] == [(1, 3), (2, 3), (3, 3)]
    kinds, images, _ = zip(*(preview for *_, preview in previews), strict=True)
    assert set(kinds) == {"JPEG"} and {image.size for image in images} == {(6, 4)}
    assert latent_preview.get_previewer(model.load_device, model.model.latent_format) is not None


# --- conditioning -----------------------------------------------------------------------------------------------------

def estimate(model, cond):
    """The clean estimates of one conditioning, by one step from noise."""
    return advanced(BasicGuider.execute(model, cond).result[0], model, small(), steps=1).unbind()


def test_combined_conditionings_are_averaged(model, conds):
    found = estimate(model, nodes.ConditioningCombine().combine(*conds)[0])
    for out, a, b in zip(found, estimate(model, conds[0]), estimate(model, conds[1]), strict=True):
        assert relative_l2(out, (a + b) / 2) < 1e-5


def test_concatenated_averaged_and_scaled_texts_are_read_as_such(model, conds):
    a, b = conds[0][0][0], conditioning(4, 9)[0][0]
    other = [[b, {"pooled_output": None}]]
    padded = torch.cat([b, torch.zeros(1, 3, TINY.text)], 1)
    for found, expected in (
        (nodes.ConditioningConcat().concat(conds[0], other)[0], torch.cat([a, b], 1)),
        (nodes.ConditioningAverage().addWeighted(conds[0], other, 0.25)[0], 0.25 * a + 0.75 * padded),
        (nodes.ConditioningMultiply().multiply(conds[0], 0.5)[0], 0.5 * a),
        (nodes.ConditioningZeroOut().zero_out(conds[0])[0], 0 * a),
    ):
        assert_pair_close(estimate(model, found), estimate(model, [[expected, {}]]), 1e-5)


def test_a_text_of_its_own_for_the_audio_survives_the_conditioning_nodes(conds):
    """Core's nodes change the first text only; the audio's own text goes along unchanged."""
    own = conds[1][0][1][AUDIO_TEXT_KEY]
    for changed in (nodes.ConditioningConcat().concat(conds[1], conds[0])[0],
                    nodes.ConditioningZeroOut().zero_out(conds[1])[0],
                    nodes.ConditioningSetTimestepRange().set_range(conds[1], 0.0, 0.5)[0]):
        assert torch.equal(changed[0][1][AUDIO_TEXT_KEY], own)


def test_timestep_ranges_switch_conditionings(model, conds):
    switch = nodes.ConditioningSetTimestepRange()
    early, late = switch.set_range(conds[0], 0.0, 0.6)[0], switch.set_range(conditioning(3, 5), 0.6, 1.0)[0]
    with Batches(model) as calls:
        both = ksampler(model, early + late, conds[1], small(), steps=4)
    assert calls == [2] * 4  # never more than one positive at a time
    early_only = ksampler(model, conds[0], conds[1], small(), steps=4)
    assert all(relative_l2(a, b) > 1e-3 for a, b in zip(both.unbind(), early_only.unbind(), strict=True))


def test_cfg_override_reaches_both_streams(model, conds):
    overridden = ksampler(CFGOverride.execute(model, 1.0, 0.0, 1.0).result[0], *conds, small())
    assert_pair_close(overridden, ksampler(model, *conds, small(), cfg=1.0), 1e-5)


# --- model patches ----------------------------------------------------------------------------------------------------

def test_the_stock_skip_layer_node_is_ours(model, conds):
    stock = SkipLayerGuidanceDiTSimple.execute(model, 0.0, 1.0, double_layers="1", single_layers="").result[0]
    ours = ksampler(model, conds[0], OviSkipLayer.execute(conds[1], 1).result[0], small())
    assert_pair_close(ksampler(stock, *conds, small()), ours, 1e-5)
    assert relative_l2(ours.unbind()[0], ksampler(model, *conds, small()).unbind()[0]) > 1e-2


LORA_KEYS = {
    "video": ("diffusion_model.blocks.1.self_attn.q", "video_model.blocks.1.self_attn.q"),
    "audio": ("diffusion_model.audio_model.blocks.0.cross_attn.k_fusion",
              "audio_model.blocks.0.cross_attn.k_fusion"),
    "kohya": ("lora_unet_blocks_2_ffn_0", "video_model.blocks.2.ffn.0"),
}


def lora_for(target: str, weight: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """(LoRA file of rank 4, what it adds to the weight at strength 1)."""
    up, down = noise(weight.shape[0], 4, seed=1) * 0.1, noise(4, weight.shape[1], seed=2) * 0.1
    names = ("lora_up", "lora_down") if target.startswith("lora_unet") else ("lora_B", "lora_A")
    return {f"{target}.{names[0]}.weight": up, f"{target}.{names[1]}.weight": down}, up @ down


@pytest.fixture
def loras_folder(tmp_path, monkeypatch):
    """ComfyUI's folder of LoRAs, for one test."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)
    yield tmp_path
    folder_paths.filename_list_cache.pop("loras", None)


@pytest.mark.parametrize("kind", LORA_KEYS)
def test_a_lora_changes_exactly_its_tower(weights, kind, loras_folder):
    """'Load LoRA' on a file: the result is the oracle's with the product added to that one weight."""
    target, name = LORA_KEYS[kind]
    file, delta = lora_for(target, weights[f"{name}.weight"])
    save_file(file, loras_folder / "change.safetensors")
    patcher = load(weights)
    loaded, = nodes.LoraLoaderModelOnly().load_lora_model_only(patcher, "change.safetensors", 0.7)
    assert list(loaded.patches) == list(core_layout({f"diffusion_model.{name}.weight": 0})) or kind != "audio"
    changed = {**weights, f"{name}.weight": weights[f"{name}.weight"] + 0.7 * delta}
    sigmas, prompt = torch.tensor([0.6, 0.0]), conditioning(4, 1)
    latent = small(seed=10)

    def run(m):
        guider = BasicGuider.execute(m, prompt).result[0]
        return guider.sample(latent, NestedTensor([torch.zeros_like(x) for x in latent.unbind()]),
                             solvers.make_sampler("euler"), sigmas, disable_pbar=True)

    video, audio = (0.6 * x[0] for x in latent.unbind())

    def expected(w):
        v, a = oracle.forward(w, video, audio, 600.0, prompt[0][0][0], prompt[0][0][0])
        out = patcher.model.latent_format.process_out((video - 0.6 * v)[None])
        return out, (audio - 0.6 * a)[None]

    assert_pair_close(run(loaded), expected(changed), 1e-5)
    assert relative_l2(run(loaded).unbind()[0], expected(weights)[0]) > 1e-5
    assert_pair_close(run(patcher), expected(weights), 1e-5)  # unloading restores the weights


def test_a_lora_for_one_conditioning_alone(weights, conds, loras_folder):
    """Core's hooks switch weights between the passes: positive with the LoRA, negative without."""
    file, _ = lora_for("diffusion_model.audio_model.blocks.0.ffn.0", weights["audio_model.blocks.0.ffn.0.weight"])
    save_file({name: 5 * tensor for name, tensor in file.items()}, loras_folder / "hook.safetensors")
    hooks, = CreateHookLora().create_hook("hook.safetensors", 1.0, 0.0)
    hooked, = ConditioningSetProperties().set_properties(conds[0], 1.0, "default", hooks=hooks)
    patcher = load(weights)
    with_lora, = nodes.LoraLoaderModelOnly().load_lora_model_only(load(weights), "hook.safetensors", 1.0)
    positive, negative = estimate(with_lora, conds[0]), estimate(patcher, conds[1])
    found = ksampler(patcher, hooked, conds[1], small(), steps=1).unbind()
    for out, p, n in zip(found, positive, negative, strict=True):
        assert relative_l2(out, n + 4.0 * (p - n)) < 1e-5
    assert relative_l2(positive[1], estimate(patcher, conds[0])[1]) > 1e-2


def test_caches_leave_out_steps_and_nothing_when_told_so(model, conds):
    plain = ksampler(model, *conds, small(), steps=8)
    with Batches(model) as all_calls:
        ksampler(model, *conds, small(), steps=8)
    for node in (EasyCacheNode, LazyCacheNode):
        off = node.execute(model, 0.0, 0.0, 1.0, False).result[0]
        assert_pair_close(ksampler(off, *conds, small(), steps=8), plain, 1e-6)
        with Batches(model) as calls:
            out = ksampler(node.execute(model, 3.0, 0.0, 1.0, False).result[0], *conds, small(), steps=8)
        assert_sampled(out, small())
        assert len(calls) < len(all_calls)


def test_a_compiled_model_samples_the_same_in_one_graph(conds):
    """Core's compile wrapper, fullgraph, over a run of the exact solver with guidance and a skipped layer."""
    import torch._dynamo.testing

    weights = draw_weights(Sizes(blocks=2))
    plain, compiled = load(weights), load(weights)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    set_torch_compile_wrapper(compiled, backend=counter, fullgraph=True)
    results = []
    for model in (plain, compiled):
        model.model_options["transformer_options"]["optimized_attention_override"] = (
            lambda _, *a, **kw: attention_pytorch(*a, **kw))  # what GPUs use; core's for CPUs cannot be traced
        latent = small(seed=11)
        guider = OviGuider.execute(model, *conds, 4.0, 3.0, 1).result[0]
        results.append(SamplerCustomAdvanced.execute(
            RandomNoise.execute(7).result[0], guider, solvers.make_sampler("unipc"), solvers.make_sigmas("unipc", 4),
            {"samples": latent, "noise_mask": first_frame_mask(latent)}).result[0]["samples"])
    torch._dynamo.reset()
    assert_pair_close(*results, 1e-5)
    assert counter.frame_count == 1


def test_merging_and_saving_a_model(weights, tmp_path, monkeypatch):
    """A merged model is saved by the stock node and loaded again by the pack and by the stock loader."""
    other = draw_weights(seed=5)
    merged, = ModelMergeSimple().merge(load(weights), load(other), 0.25)
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    ModelSave().save(merged, "ovi_merged")
    file = next(tmp_path.glob("*.safetensors"))
    for loaded in (checkpoint.load_model(str(file))[0], comfy.sd.load_diffusion_model(str(file))):
        assert isinstance(loaded.model, model_base.OviBaseModel)
        state = network(loaded).state_dict()
        for name, expected in core_layout({k: 0.25 * weights[k] + 0.75 * other[k] for k in weights}).items():
            if "modulation" not in name:  # core patches no bare parameters, of Wan's neither
                assert relative_l2(state[name], expected) < 1e-5
