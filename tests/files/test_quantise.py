"""The quantisation recipe: which layers, the bits core reads, quantising while loading, and what cannot run."""

import json

import comfy.ops
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from ovi_native.nodes.loaders import WEIGHT_DTYPES
from ovi_native.ovi_model.files import quant_records, quantise
from ovi_native.ovi_model.files.quantise import SLAB
from ovi_native.ovi_model.ovi import checkpoint
from ovi_native.ovi_model.ovi.quant_recipe import FORMATS, PLAIN_FP8
from support import oracle
from tiny.checkpoint import draw_weights
from tiny.compare import assert_pair_close, relative_l2
from tiny.inputs import noise, text
from tiny.models import network, write_checkpoint
from tiny.sizes import Sizes, core_layout, tensor_shapes

SMALL = Sizes(blocks=2)
LAYER = "blocks.0.ffn.0"
ROUNDING = {"fp8_scaled": 0.03, "int8": 0.012, "mxfp8": 0.03, "nvfp4": 0.11}
"""Most that storing a random matrix may change it, relative L2."""
VIDEO, AUDIO, TEXT = noise(1, 48, 2, 4, 4, seed=1), noise(1, 20, 9, seed=2), text(6, 3)


def predict(patcher):
    with torch.no_grad():
        return network(patcher)([VIDEO, AUDIO], torch.tensor([600.0]), TEXT, {})


def truth():
    video, audio = oracle.forward(draw_weights(SMALL), VIDEO[0], AUDIO[0], 600.0, TEXT[0], TEXT[0])
    return video[None], audio[None]


def matrix(rows=384, columns=256, seed=0):
    return noise(rows, columns, seed=seed, dtype=torch.bfloat16) / 256


def as_core_reads(stored, rows, columns):
    """The matrix core's own linear layer makes of stored tensors."""
    linear = comfy.ops.mixed_precision_ops({}, torch.float32).Linear(columns, rows, bias=False)
    linear.load_state_dict({key.removeprefix(f"{LAYER}."): tensor for key, tensor in stored.items()})
    assert isinstance(linear.weight.data, QuantizedTensor)
    return linear.weight.dequantize()


# --- which layers -----------------------------------------------------------------------------------------------------

def test_only_the_matrices_of_the_blocks_are_quantised():
    weights = core_layout(draw_weights(SMALL))
    out = quantise.quantise_tensors(weights, FORMATS["int8"])
    quantised = {key.removesuffix(".comfy_quant") for key in out if key.endswith(".comfy_quant")}
    per_block = {"self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k",
                 "cross_attn.v", "cross_attn.o", "cross_attn.k_fusion", "cross_attn.v_fusion", "ffn.0", "ffn.2"}
    assert quantised == {f"{tower}blocks.{i}.{name}" for tower in ("", "audio_model.") for i in range(2)
                         for name in per_block}
    for key in weights.keys() - {f"{layer}.weight" for layer in quantised}:
        assert torch.equal(out[key], weights[key].to(torch.bfloat16)) and out[key].dtype == torch.bfloat16, key
    assert all(out[f"{layer}.weight"].dtype == torch.int8 for layer in quantised)


@pytest.mark.parametrize("name", FORMATS)
def test_the_first_two_of_thirty_blocks_stay_bf16(name):
    target = FORMATS[name].for_blocks(30)
    weight = torch.zeros(4, 4)
    for tower in ("", "audio_model."):
        assert target.wants(f"{tower}blocks.2.ffn.0", weight)
        assert not target.wants(f"{tower}blocks.1.ffn.0", weight)
    assert FORMATS[name].for_blocks(3).first_block == 0


def test_the_depth_is_read_from_the_weights():
    sizes = Sizes(blocks=15, ffn=32, text=32, frequencies=32)
    weights = {key: torch.zeros(1).expand(shape) for key, shape in core_layout(tensor_shapes(sizes)).items()
               if ".blocks." in f".{key}"}
    out = quantise.quantise_tensors({key: w for key, w in weights.items() if "ffn" in key}, FORMATS["fp8_scaled"])
    assert "blocks.0.ffn.0.comfy_quant" not in out and "audio_model.blocks.0.ffn.2.comfy_quant" not in out
    assert "blocks.1.ffn.0.comfy_quant" in out and "audio_model.blocks.14.ffn.2.comfy_quant" in out


# --- one matrix -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_comes_back_within_its_formats_rounding(name):
    weight = matrix()
    stored = quantise.quantise(LAYER, weight, FORMATS[name])
    back = quantise.dequantise(LAYER, stored)
    assert relative_l2(back, weight) < ROUNDING[name]
    assert torch.equal(as_core_reads(stored, *weight.shape), back)
    assert sum(tensor.nbytes for tensor in stored.values()) < 0.6 * weight.nbytes


@pytest.mark.parametrize("name", FORMATS)
def test_slabs_change_nothing(name):
    """More rows than one slab, not a multiple of any tile: the bits of quantising the whole at once."""
    target, weight = FORMATS[name], matrix(SLAB + 160, 64).float()
    options = dict(target.options)
    if target.largest is not None:
        options["scale"] = weight.abs().max() / target.largest
    whole = QuantizedTensor.from_float(weight, target.layout, **options).state_dict("weight")
    stored = quantise.quantise(LAYER, weight, target)
    for leaf, tensor in whole.items():
        found = stored[f"{LAYER}.{leaf}"]
        assert found.shape == tensor.shape
        assert torch.equal(quantise.as_bytes(found), quantise.as_bytes(tensor)), leaf


@pytest.mark.parametrize("name", FORMATS)
def test_bf16_weights_are_rounded_once(name):
    """Scaling them in bf16 first would round them twice."""
    once, stored = (quantise.quantise(LAYER, weight, FORMATS[name]) for weight in (matrix().float(), matrix()))
    assert all(torch.equal(quantise.as_bytes(stored[key]), quantise.as_bytes(once[key])) for key in once)


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_of_zeros_stays_zeros(name):
    """As fresh layers are; a scale computed from it would divide by zero."""
    stored = quantise.quantise(LAYER, torch.zeros(64, 64, dtype=torch.bfloat16), FORMATS[name])
    assert torch.equal(quantise.dequantise(LAYER, stored), torch.zeros(64, 64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("target", [FORMATS["int8"], FORMATS["nvfp4"], PLAIN_FP8], ids=lambda t: t.name)
def test_values_that_are_not_finite_are_refused(target, value):
    weight = matrix()
    weight[300, 7] = value
    with pytest.raises(RuntimeError, match=r"blocks\.0\.ffn\.0\.weight holds values that are not finite.*download"):
        quantise.quantise(LAYER, weight, target)


def test_bare_fp8_saturates_instead_of_overflowing():
    weight = matrix() * 1e6
    stored = quantise.quantise(LAYER, weight, PLAIN_FP8)
    assert set(stored) == {f"{LAYER}.weight"} and stored[f"{LAYER}.weight"].float().abs().max() == 448


# --- layers that are quantised already --------------------------------------------------------------------------------

def layer_tensors(target):
    return {f"{LAYER}.bias": torch.ones(384), **quantise.quantise(LAYER, matrix(), target)}


@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_in_the_wanted_format_keeps_its_bits(name):
    before = layer_tensors(FORMATS[name])
    after = quantise.convert_layer(LAYER, before, FORMATS[name])
    assert before.keys() == after.keys() and after[f"{LAYER}.bias"].dtype == torch.bfloat16
    assert all(after[key] is before[key] or key.endswith((".bias", ".comfy_quant")) for key in before)
    assert quant_records.read_record(after[f"{LAYER}.comfy_quant"]) == FORMATS[name].record


def test_int8_asks_for_no_full_products():
    """ComfyUI 0.30 ignores that request; a file that has it, such as a converted quanto one, loses it."""
    asking = {**layer_tensors(FORMATS["int8"]), f"{LAYER}.comfy_quant": quant_records.encode_record(
        {"format": "int8_tensorwise", "full_precision_matrix_mult": True})}
    found = quantise.convert_layer(LAYER, asking, FORMATS["int8"])
    assert found[f"{LAYER}.weight"] is asking[f"{LAYER}.weight"]
    assert quant_records.read_record(found[f"{LAYER}.comfy_quant"]) == {"format": "int8_tensorwise"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_layer_is_computed_back(name, dtype):
    before = layer_tensors(FORMATS[name])
    after = quantise.convert_layer(LAYER, before, dtype)
    assert set(after) == {f"{LAYER}.weight", f"{LAYER}.bias"} and {t.dtype for t in after.values()} == {dtype}
    assert torch.equal(after[f"{LAYER}.weight"], as_core_reads(
        {key: t for key, t in before.items() if not key.endswith("bias")}, 384, 256).to(dtype))


def test_one_format_becomes_another():
    after = quantise.convert_layer(LAYER, layer_tensors(FORMATS["int8"]), FORMATS["fp8_scaled"])
    assert after[f"{LAYER}.weight"].dtype == torch.float8_e4m3fn
    assert relative_l2(quantise.dequantise(LAYER, after), matrix()) < 0.035


def test_what_cannot_be_computed_back_is_named():
    smoothed = {**layer_tensors(FORMATS["nvfp4"]), f"{LAYER}.pre_quant_scale": torch.ones(256)}
    with pytest.raises(RuntimeError, match=r"blocks\.0\.ffn\.0 scales its input too.*--dtype keep"):
        quantise.convert_layer(LAYER, smoothed, torch.bfloat16)
    assert quantise.convert_layer(LAYER, smoothed, None) is smoothed
    record = quant_records.encode_record({"format": "int3"})
    unknown = {**layer_tensors(FORMATS["int8"]), f"{LAYER}.comfy_quant": record}
    with pytest.raises(RuntimeError, match=r"'int3', which this ComfyUI does not read .*int8_tensorwise"):
        quantise.convert_layer(LAYER, unknown, torch.bfloat16)


# --- while loading ----------------------------------------------------------------------------------------------------

@pytest.mark.usefixtures("either_loading")
@pytest.mark.parametrize("name", FORMATS)
def test_a_bf16_file_runs_quantised(tmp_path, name):
    path = str(write_checkpoint(tmp_path, dtype=torch.bfloat16, sizes=SMALL))
    patcher, report = checkpoint.load_model(path, WEIGHT_DTYPES[name])
    block = network(patcher).audio_model.blocks[1]
    assert isinstance(block.ffn[0].weight.data, QuantizedTensor)
    assert not isinstance(network(patcher).head.head.weight.data, QuantizedTensor)
    assert block.norm3.weight.dtype in (torch.bfloat16, torch.float32)
    out = predict(patcher)
    assert_pair_close(out, truth(), 4 * ROUNDING[name])
    assert f"quantised to {name} while loading" in str(report) and report.bytes < 0.85 * 2 * report.parameters

    function, arguments = patcher.cached_patcher_init
    for options in ({}, {"disable_dynamic": True}):
        assert_pair_close(predict(function(*arguments, **options)), out, 1e-5)  # core's clones and delegates


def test_the_recipe_beats_casting_everything():
    """On the same model and in the same arithmetic; the control for leaving norms, biases and tables alone."""
    def error(weights):
        return [relative_l2(a, b) for a, b in zip(
            (x[None] for x in oracle.forward(weights, VIDEO[0], AUDIO[0], 600.0, TEXT[0], TEXT[0])), truth(),
            strict=True)]

    weights = draw_weights(SMALL)
    everything = {key: tensor.to(torch.float8_e4m3fn).float() for key, tensor in weights.items()}
    recipe = {}
    for key, tensor in weights.items():
        core = next(iter(core_layout({key: None})))
        layer = core.removesuffix(".weight")
        if FORMATS["fp8_scaled"].wants(layer, tensor):
            tensor = quantise.dequantise(layer, quantise.quantise(layer, tensor, FORMATS["fp8_scaled"]))
        recipe[key] = tensor
    assert all(ours < 0.8 * plain for ours, plain in zip(error(recipe), error(everything), strict=True))


# --- what cannot run --------------------------------------------------------------------------------------------------

def test_every_format_runs_on_the_cpu():
    assert all(quantise.obstacle(target, "cpu") is None for target in FORMATS.values())


@pytest.mark.parametrize(("name", "device", "capability", "sentence"), [
    ("fp8_scaled", "mps", None, "no 8-bit floats; choose bf16"),
    ("mxfp8", "mps", None, "no 8-bit floats; choose bf16"),
    ("nvfp4", "mps", None, "no 8-bit floats; choose bf16"),
    ("int8", "cuda", (7, 0), "7.5 or newer, this one has 7.0; choose fp8_scaled"),
    ("int8", "cuda", (8, 6), None),
    ("fp8_scaled", "cuda", (7, 0), None),  # core computes in bf16 then
    ("nvfp4", "cuda", (8, 6), None),
])
def test_what_a_device_cannot_do_is_said(name, device, capability, sentence):
    found = quantise.obstacle(FORMATS[name], device, capability)
    assert found is None if sentence is None else sentence in found


def test_a_format_this_comfyui_does_not_know_is_said():
    target = quantise.Format("future", "int2_magic", "")
    with pytest.raises(ValueError, match=r"'future' does not run here: this ComfyUI reads .*mxfp8.*comfy-kitchen"):
        quantise.quantise_tensors({}, target)


def test_the_loader_offers_every_format():
    assert set(FORMATS) < set(WEIGHT_DTYPES)
    assert json.dumps(FORMATS["int8"].record) == '{"format": "int8_tensorwise"}'
