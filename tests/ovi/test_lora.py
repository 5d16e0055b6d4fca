"""LoRA on the two towers: every naming lands on the right layers, by its strength; what comes to nothing is said."""

import comfy.hooks
import comfy.lora
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from ovi_native.nodes.lora import TITLES, describe
from ovi_native.ovi_model.files import quantise
from ovi_native.ovi_model.ovi import lora_keys, quant_recipe
from ovi_native.ovi_model.ovi.lora_keys import GROUPS, apply_lora, group_of, read_lora
from support.loras import EVEN, RANK, assert_same, factors, load, make_lora, matrices, ovi, stock, weights
from tiny.checkpoint import draw_weights
from tiny.compare import relative_l2
from tiny.inputs import noise
from tiny.models import tiny_model
from tiny.sizes import Sizes, core_layout

pytestmark = pytest.mark.usefixtures("either_loading")


@pytest.fixture
def model(either_loading):  # noqa: ARG001 (the state comes first)
    return tiny_model(sizes=Sizes(heads=1, blocks=1))


# --- strengths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strengths", [
    {"video": 0.8, "audio": 0.0, "sound_to_picture": -1.5, "picture_to_sound": 2.0}, dict.fromkeys(GROUPS, 0.0),
    {**dict.fromkeys(GROUPS, 0.0), "sound_to_picture": 1.0}, {**dict.fromkeys(GROUPS, 0.0), "audio": 0.3}])
def test_each_group_has_its_strength(model, strengths):
    lora, expected = {}, weights(model)
    before = {key: weight.clone() for key, weight in expected.items()}
    for seed, (layer, weight) in enumerate(matrices(model).items()):
        down, up = factors(weight, 2 * seed)
        lora |= {f"{ovi(layer)}.lora_down.weight": down, f"{ovi(layer)}.lora_up.weight": up,
                 f"{ovi(layer)}.alpha": torch.tensor(1.5)}
        group = ("picture_to_sound" if "fusion" in layer else "audio") if layer.startswith("audio_model") else (
            "sound_to_picture" if "fusion" in layer else "video")
        expected[f"diffusion_model.{layer}.weight"] += strengths[group] * 1.5 / RANK * (up @ down)
    gain, bias = "cross_attn.norm_k_fusion.weight", "cross_attn.pre_attn_norm_fusion.bias"
    lora["video_model.blocks.0.cross_attn.norm_k_fusion.diff"] = difference = noise(128)
    lora["audio_model.blocks.0.cross_attn.pre_attn_norm_fusion.diff_b"] = difference
    expected[f"diffusion_model.blocks.0.{gain}"] += strengths["sound_to_picture"] * difference
    expected[f"diffusion_model.audio_model.blocks.0.{bias}"] += strengths["picture_to_sound"] * difference

    found = weights(load(model, lora, **strengths))
    for key, weight in expected.items():
        if strengths[group_of(key)] == 0:
            assert torch.equal(found[key], before[key]), key
        else:
            assert relative_l2(found[key], weight) < 1e-6, key
    assert_same(weights(model), before)


def test_several_add_up_and_changing_the_order_changes_nothing(model):
    first, second = make_lora(model, "^blocks", ovi), make_lora(model, "attn", lambda name: f"transformer.{name}")
    both = weights(load(load(model, first, video=0.5), second, audio=2.0))
    turned = weights(load(load(model, second, audio=2.0), first, video=0.5))
    one, other, before = weights(load(model, first, video=0.5)), weights(load(model, second, audio=2.0)), weights(model)
    for key in both:
        assert relative_l2(both[key], turned[key]) < 1e-6
        assert relative_l2(both[key], one[key] + other[key] - before[key]) < 1e-6


# --- tables of modulation ---------------------------------------------------------------------------------------------

TABLES = {"video_model.blocks.0.modulation.modulation": "blocks.0.modulation",
          "diffusion_model.audio_model.blocks.0.modulation": "audio_model.blocks.0.modulation",
          "diffusion_model.head.modulation": "head.modulation",
          "transformer.blocks.0.scale_shift_table": "blocks.0.modulation",
          "base_model.model.audio_model.head.modulation": "audio_model.head.modulation",
          "blocks.0.modulation": "blocks.0.modulation"}


@pytest.mark.parametrize("name", TABLES)
def test_modulation_tables_change_and_change_back(model, name):
    key = f"diffusion_model.{TABLES[name]}"
    before = weights(model)
    difference = noise(*before[key].shape, seed=3)
    once = load(model, {f"{name}.diff": difference}, video=0.5, audio=0.5)
    twice = load(once, {f"{name}.diff": difference})
    for patched, share in ((once, 0.5), (twice, 1.5)):
        found = weights(patched)
        assert relative_l2(found.pop(key), before[key] + share * difference) < 1e-6
        assert_same(found, {other: weight for other, weight in before.items() if other != key})
    assert_same(weights(model), before)


# --- other kinds of adapters ------------------------------------------------------------------------------------------


def adapters(layer: str, weight: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    rows, columns = weight.shape
    down, up = factors(weight, 5)

    def n(*shape, seed):
        return noise(*shape, seed=seed) / 16

    loha = {"hada_w1_a": n(rows, 2, seed=1), "hada_w1_b": n(2, columns, seed=2), "hada_w2_a": n(rows, 2, seed=3),
            "hada_w2_b": n(2, columns, seed=4), "alpha": torch.tensor(1.0)}
    lokr = {"lokr_w1": n(4, 4, seed=1), "lokr_w2_a": n(rows // 4, 2, seed=2), "lokr_w2_b": n(2, columns // 4, seed=3),
            "alpha": torch.tensor(1.0)}
    pair = {"lora_up.weight": up, "lora_down.weight": down}
    kinds = {
        "LoHa": loha, "LoKr": lokr,
        "LoKr, whole": {"lokr_w1": n(4, 4, seed=1), "lokr_w2": n(rows // 4, columns // 4, seed=2)},
        "DoRA": pair | {"dora_scale": 1 + n(rows, 1, seed=6)}, "difference": {"diff": n(rows, columns, seed=1)},
        "replacement": {"set_weight": n(rows, columns, seed=1)},
        "OFT": {"oft_blocks": n(rows // 8, 8, 8, seed=1), "alpha": torch.tensor(1.0)},
        "BOFT": {"oft_blocks": n(2, rows // 8, 8, 8, seed=1), "alpha": torch.tensor(1.0)},
        "GLoRA": {"a1.weight": n(2, columns, seed=1), "a2.weight": n(columns, 2, seed=2),
                  "b1.weight": n(2, columns, seed=3), "b2.weight": n(rows, 2, seed=4)},
    }
    return {kind: {f"{layer}.{tail}": tensor for tail, tensor in tensors.items()} for kind, tensors in kinds.items()}


@pytest.mark.parametrize("kind", adapters("x", torch.zeros(128, 128)))
@pytest.mark.parametrize("layer", ["blocks.0.self_attn.q", "audio_model.blocks.0.cross_attn.k_fusion"])
def test_all_of_cores_adapters_act_as_in_core(model, kind, layer):
    weight = matrices(model)[layer]
    ours = adapters(ovi(layer), weight)[kind]
    found = read_lora(model.model, ours, "x")
    assert list(found.patches) == [f"diffusion_model.{layer}.weight"] and not found.unmatched
    truth = stock(model, adapters(f"diffusion_model.{layer}", weight)[kind])
    assert_same(weights(apply_lora(model, found, EVEN)), weights(truth))
    assert not torch.equal(weights(truth)[f"diffusion_model.{layer}.weight"], weight)


@pytest.mark.parametrize("tail", [".lora_magnitude_vector", ".lora_magnitude_vector.weight",
                                  ".lora_magnitude_vector.default.weight"])
def test_peft_dora_is_cores(model, tail):
    layer = "blocks.0.ffn.0"
    weight = matrices(model)[layer]
    down, up = factors(weight, 1)
    magnitude = 1 + noise(weight.shape[0], seed=4) / 16
    ours = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up, layer + tail: magnitude}
    truth = {f"diffusion_model.{layer}.lora_A.weight": down, f"diffusion_model.{layer}.lora_B.weight": up,
             f"diffusion_model.{layer}.dora_scale": magnitude.unsqueeze(1)}
    assert_same(weights(load(model, ours)), weights(stock(model, truth)))


def test_bias_of_diffusers_is_a_difference(model):
    lora = make_lora(model, r"^blocks.0.ffn.2$", ovi) | {"video_model.blocks.0.ffn.2.lora_B.bias": noise(128)}
    found, before = weights(load(model, lora)), weights(model)
    key = "diffusion_model.blocks.0.ffn.2.bias"
    assert torch.allclose(found[key], before[key] + noise(128))
    lora["video_model.blocks.0.ffn.2.alpha"] = torch.tensor(1.0)  # whose scale core would not apply to it
    assert read_lora(model.model, lora, "x").unmatched == ["video_model.blocks.0.ffn.2.lora_B.bias"]


# --- what does not fit ------------------------------------------------------------------------------------------------


def wide(width: int) -> dict[str, torch.Tensor]:
    return {f"blocks.{i}.self_attn.{layer}.{tail}": torch.ones(shape)
            for i in range(2) for layer in "qkvo"
            for tail, shape in (("lora_down.weight", (RANK, width)), ("lora_up.weight", (width, RANK)))}


def refusal(model, lora) -> str:
    with pytest.raises(RuntimeError) as error:
        read_lora(model.model, lora, "x.safetensors")
    return str(error.value)


def test_lora_of_another_width_is_refused_by_name(model):
    assert "its layers are 5120 wide (Wan 14B), the model's 128. Choose a LoRA made for Ovi" in refusal(
        model, wide(5120))
    assert "its layers are 160 wide, the model's 128" in refusal(model, wide(160))


@pytest.mark.parametrize("name, what", [
    ("transformer.double_blocks.0.img_attn.qkv.lora_A.weight", "a LoRA for Flux or HunyuanVideo"),
    ("lora_unet_down_blocks_0_attn.lora_down.weight", "a LoRA for Stable Diffusion"),
    ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "a LoRA for a text encoder"),
    ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight", "such as LTX-Video"),
    ("something.lora_A.weight", "a LoRA for another model"), ("decoder.conv1.weight", "it is no LoRA, it holds a Wan")])
def test_lora_for_another_model_is_refused_by_name(model, name, what):
    assert what in refusal(model, {name: torch.zeros(2, 2)})


def test_damaged_lora_is_refused(model):
    lora = make_lora(model, "ffn.0", ovi)
    name = next(iter(lora))
    assert f"{name} holds values that are not finite" in refusal(model, lora | {name: lora[name] * torch.nan})
    del lora["video_model.blocks.0.ffn.0.lora_A.weight"]
    assert "lacks the tensor blocks.0.ffn.0.lora_A.weight" in refusal(model, lora)


def test_half_a_pair_that_core_passes_over_is_counted(model):
    lora = make_lora(model, "ffn.0", ovi)
    del lora["video_model.blocks.0.ffn.0.lora_B.weight"]
    found = read_lora(model.model, lora, "x")
    assert found.unmatched == ["video_model.blocks.0.ffn.0.lora_A.weight"] and len(found.patches) == 1


def test_misfits_among_what_fits_are_skipped_and_said(model, caplog):
    lora = make_lora(model, r"^blocks\.0\.self_attn", ovi)
    lora |= {"audio_model.blocks.0.ffn.0.lora_A.weight": torch.ones(RANK, 5120),
             "audio_model.blocks.0.ffn.0.lora_B.weight": torch.ones(192, RANK),
             "video_model.blocks.0.ffn.2.lora_A.weight": torch.ones(RANK + 1, 192),
             "video_model.blocks.0.ffn.2.lora_B.weight": torch.ones(128, RANK),
             "blocks.0.norm3.diff": torch.ones(5), "blocks.0.modulation.diff": torch.ones(6, 128),
             "blocks.0.cross_attn.q.lokr_w1": torch.ones(2, 2), "blocks.0.cross_attn.q.lokr_w2": torch.ones(2, 2),
             "blocks.0.self_attn.norm_q.diff_b": torch.ones(128)}  # it has no bias
    found = read_lora(model.model, lora, "x")
    assert len(found.patches) == 4 and len(found.misfits) == 5
    assert found.unmatched == ["blocks.0.self_attn.norm_q.diff_b"]
    lines, warnings = describe(found, EVEN, "x.safetensors")
    assert lines[:2] == ["x.safetensors: 4 layers", "picture: 4 layers, strength 1"]
    assert lines[2:] == [f"{TITLES[group]}: 0 layers" for group in GROUPS[1:]]
    skipped, unmatched = warnings
    assert skipped.startswith("Skipped, of another shape in this model: 5 layers (")
    assert "audio_model.blocks.0.ffn.0 [192, 5120]" in skipped and skipped.endswith(", …).")
    assert unmatched == "Skipped, of no layer in this model: 1 name in the file (blocks.0.self_attn.norm_q.diff_b)."
    caplog.clear()
    weights(apply_lora(model, found, EVEN))
    assert not caplog.records, "core met a shape that does not fit"


# --- quantised models, hooks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_format", ["fp8_scaled", "int8"])
def test_quantised_models_take_lora_as_stock_does(weight_format):
    sizes = Sizes(blocks=1)
    tensors = core_layout({key: weight.bfloat16() for key, weight in draw_weights(sizes).items()})
    model = comfy.sd.load_diffusion_model_state_dict(
        quantise.quantise_tensors(tensors, quant_recipe.FORMATS[weight_format]))
    before = dense(weights(model))
    ours, truth = make_lora(model, "attn", ovi), make_lora(model, "attn", lambda name: f"diffusion_model.{name}")
    assert ours
    found, right = dense(weights(load(model, ours))), dense(weights(stock(model, truth)))
    assert_same(found, right)
    assert any(not torch.equal(found[key], before[key]) for key in found)


def dense(tensors):
    return {key: tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
            for key, tensor in tensors.items()}


def test_lora_hooks_come_on_top(model):
    """A LoRA hook of core's on a MODEL with our LoRA on it: both, and the model as it was afterwards."""
    first = make_lora(model, "^blocks.*attn", ovi)
    second = make_lora(model, "ffn", lambda name: f"diffusion_model.{name}")
    patched = load(model, first, video=0.5)
    truth = weights(load(patched, second))
    before = weights(patched)
    patched.patch_model(torch.device("cpu"))
    group = comfy.hooks.create_hook_lora(lora=second, strength_model=1.0, strength_clip=0.0)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    patched.register_all_hook_patches(group, target, {"transformer_options": {}}, comfy.hooks.HookGroup())
    patched.prepare_hook_patches_current_keyframe(torch.tensor([1.0]), group, {})
    patched.patch_hooks(group)
    hooked = {key: comfy.utils.get_attr(patched.model, key).detach().clone() for key in truth}
    patched.unpatch_hooks()
    patched.unpatch_model(torch.device("cpu"))
    for key, weight in truth.items():
        assert relative_l2(hooked[key], weight) < 1e-6, key
    assert_same(weights(patched), before)


def test_names_table_needs_no_model():
    names = lora_keys.Names(["diffusion_model.blocks.0.self_attn.q.weight",
                             "diffusion_model.audio_model.blocks.0.self_attn.q.weight"])
    assert names.find(names.unwrap("base_model.model.audio_model.blocks.0.attn1.to_q"), False) == (
        "diffusion_model.audio_model.blocks.0.self_attn.q.weight")
    assert names.find(names.unwrap("controlnet.blocks.0.self_attn.q"), False) is None
