"""Loading checkpoints: layouts, precisions, wrong files, reloading, and the stock loader."""

import json
import re

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.multigpu
import comfy.sd
import comfy.supported_models
import folder_paths
import nodes
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from ovi_native.nodes.loaders import OviModelLoader
from ovi_native.ovi_model.ovi import checkpoint, model_base, supported_models
from safetensors.torch import load_file, save_file
from support import oracle
from tiny.checkpoint import draw_weights
from tiny.compare import assert_pair_close, relative_l2
from tiny.inputs import noise, text
from tiny.models import network, plain_wan_weights, write_checkpoint
from tiny.sizes import Sizes, core_layout

pytestmark = pytest.mark.usefixtures("either_loading")
SMALL = Sizes(blocks=2)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
VIDEO, AUDIO, TEXT = noise(1, 48, 2, 4, 4, seed=1), noise(1, 20, 9, seed=2), text(6, 3)


def predict(patcher):
    """Velocities of the network at one fixed input, computed in float32."""
    net = network(patcher)
    with torch.no_grad():
        return net([VIDEO, AUDIO], torch.tensor([600.0]), TEXT, {})


def truth(weights):
    video, audio = oracle.forward(weights, VIDEO[0], AUDIO[0], 600.0, TEXT[0], TEXT[0])
    return video[None], audio[None]


def worst(found, expected) -> float:
    return max(relative_l2(a, b) for a, b in zip(found, expected, strict=True))


def load(path, *arguments):
    return checkpoint.load_model(str(path), *arguments)


# --- layouts and precisions -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", ["upstream", "core"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_load_as_the_model_they_hold(tmp_path, layout, dtype):
    patcher, report = load(write_checkpoint(tmp_path, layout=layout, dtype=dtype, sizes=SMALL))
    assert isinstance(patcher.model, model_base.OviBaseModel)
    assert_pair_close(predict(patcher), truth(draw_weights(SMALL)), 1e-4 if dtype == torch.float16 else 1e-5)
    assert report.layout == layout and report.blocks == SMALL.blocks and report.width == SMALL.dim
    assert report.parameters == sum(tensor.numel() for tensor in draw_weights(SMALL).values())
    assert str(dtype).removeprefix("torch.") in str(report) and "ovi.safetensors" in str(report)


def test_a_pickle_of_plain_tensors_loads(tmp_path):
    torch.save(draw_weights(SMALL), tmp_path / "ovi.pth")
    assert_pair_close(predict(load(tmp_path / "ovi.pth")[0]), truth(draw_weights(SMALL)), 1e-5)


def test_weights_are_kept_in_the_precision_asked_for(tmp_path):
    path = write_checkpoint(tmp_path, dtype=torch.float32, sizes=SMALL)
    for dtype in (torch.bfloat16, torch.float32):
        patcher, _ = load(path, dtype)
        assert {p.dtype for name, p in network(patcher).named_parameters() if name != "patch_embedding.weight"
                and name != "patch_embedding.bias"} == {dtype}
        assert network(patcher).patch_embedding.weight.dtype == torch.float32  # as core keeps Wan's


def to_fp8(dtype, everything: bool):
    """An editor of weights: linear layers' matrices to fp8, or every tensor."""
    def change(weights):
        return {name: tensor.to(dtype) if everything or (tensor.ndim == 2 and name.endswith(".weight")) else tensor
                for name, tensor in weights.items()}
    return change


def rounded(weights: dict) -> dict:
    return {name: tensor.to(torch.float32) for name, tensor in weights.items()}


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("layout", ["upstream", "core"])
def test_plain_fp8_is_exactly_its_rounded_weights(tmp_path, dtype, everything, layout):
    """What the file holds is what is computed with, in full precision, and it stays one byte a weight."""
    path = write_checkpoint(tmp_path, layout=layout, sizes=SMALL, change=to_fp8(dtype, everything))
    patcher, report = load(path)
    stored = rounded(to_fp8(dtype, everything)(draw_weights(SMALL)))
    assert_pair_close(predict(patcher), truth(stored), 1e-5)
    assert str(dtype).removeprefix("torch.") in str(report)
    assert report.parameters == sum(tensor.numel() for tensor in stored.values())
    layer = network(patcher).blocks[0].ffn[0]
    assert isinstance(layer.weight.data, QuantizedTensor) and layer.weight.data._qdata.dtype == dtype
    assert layer._full_precision_mm_config  # fp8 products are for files that were scaled for them


@pytest.mark.parametrize("dtype", FP8)
def test_core_alone_would_double_the_error_of_fp8(tmp_path, dtype):
    """Norms, biases and tables stay out of fp8; without the pack's records core casts them to it as well."""
    original = truth(draw_weights(SMALL))
    path = write_checkpoint(tmp_path, layout="core", dtype=torch.bfloat16, sizes=SMALL, change=to_fp8(dtype, False))
    patcher, _ = load(path)
    ours = worst(predict(patcher), original)
    block = network(patcher).audio_model.blocks[0]
    for parameter in (block.norm3.weight, block.self_attn.norm_q.weight, block.ffn[0].bias, block.modulation):
        assert parameter.dtype in (torch.bfloat16, torch.float32)
    stock = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": dtype})  # its choice on fp8 hardware
    assert network(stock).blocks[0].norm3.weight.dtype == dtype
    assert ours < 0.75 * worst(predict(stock), original)


def test_scaled_fp8_of_both_kinds_loads_under_upstream_names(tmp_path):
    """ComfyUI's older `scale_weight` files and its metadata records, whose layer names are the file's own."""
    weights = draw_weights(SMALL)
    scaled, kept, layers = {}, {}, {}
    for name, tensor in weights.items():
        if ".blocks." in name and tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            scaled[name] = (tensor / scale).to(torch.float8_e4m3fn)
            layers[name.removesuffix(".weight")] = scale.reshape(())
            kept[name] = scaled[name].float() * scale
        else:
            scaled[name] = kept[name] = tensor
    expected = truth(kept)
    older = {**scaled, "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
             **{f"{layer}.scale_weight": scale for layer, scale in layers.items()}}
    save_file(older, tmp_path / "older.safetensors")
    record = {"layers": {layer: {"format": "float8_e4m3fn", "full_precision_matrix_mult": True} for layer in layers}}
    save_file({**scaled, **{f"{layer}.weight_scale": scale for layer, scale in layers.items()}},
              tmp_path / "newer.safetensors", metadata={"_quantization_metadata": json.dumps(record)})
    for name in ("older.safetensors", "newer.safetensors"):
        patcher, _ = load(tmp_path / name)
        assert isinstance(network(patcher).blocks[0].ffn[0].weight.data, QuantizedTensor)
        assert_pair_close(predict(patcher), expected, 1e-5)


# --- wrong files ------------------------------------------------------------------------------------------------------

def without(*parts):
    return lambda weights: {name: tensor for name, tensor in weights.items()
                            if not any(part in name for part in parts)}


def with_tensor(name, change):
    return lambda weights: {**weights, name: change(weights.get(name))}


def keep(prefix):
    return lambda weights: {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}


WRONG = {
    "a block lost a tensor": (without("video_model.blocks.1.cross_attn.k_fusion.weight"),
                              r"lacks 1 of \d+ tensors \(blocks\.1\.cross_attn\.k_fusion\.weight\)"),
    "no norms": (without("norm_q"), r"lacks 8 of .*, …"),
    "no video head": (without("video_model.head.head"), r"lacks the tensor 'head\.head\.weight'"),
    "no video head table": (without("video_model.head.modulation"), r"lacks the tensor 'head\.modulation'"),
    "no time embedding": (without("audio_model.time_embedding"), r"lacks the tensor 'audio_model\.time_embedding"),
    "a shorter audio tower": (without("audio_model.blocks.1."), "video tower has 2 blocks, its audio tower 1"),
    "a shorter video tower": (without("video_model.blocks.1."), "video tower has 1 blocks, its audio tower 2"),
    "a gap": (without("blocks.0."), "incomplete"),
    "a wrong shape": (with_tensor("audio_model.blocks.1.ffn.2.weight", lambda x: x[:, :7].clone()),
                      r"wrong shape for 1 of \d+ tensors \(audio_model\.blocks\.1\.ffn\.2\.weight \[256, 7\] instead"),
    "a flattened kernel": (with_tensor("audio_model.patch_embedding.0.weight", lambda x: x.flatten(1)), "dimensions"),
    "another Wan": (with_tensor("video_model.img_emb.proj.0.bias", lambda _: torch.zeros(4)), "i2v"),
    "only the audio tower": (keep("audio_model."), "only Ovi's audio tower"),
    "only the video tower": (keep("video_model."), "only Ovi's video tower"),
}


@pytest.mark.parametrize("case", WRONG)
def test_damaged_files_say_what_is_wrong(tmp_path, case):
    change, sentence = WRONG[case]
    path = write_checkpoint(tmp_path, "broken.safetensors", sizes=SMALL, change=change)
    with pytest.raises(RuntimeError, match=sentence) as error:
        load(path)
    assert str(error.value).startswith("broken.safetensors") and re.search("Download|Choose", str(error.value))


def lora(_):
    return {f"diffusion_model.blocks.{i}.self_attn.q.lora_{way}.weight": torch.zeros(4, 256) for i in range(2)
            for way in "AB"}


OTHERS = {
    "a LoRA": (lora, "LoRA"),
    "a plain Wan2.2": (lambda _: core_layout(plain_wan_weights()), "Wan"),
    "a VAE": (lambda _: {"encoder.conv1.weight": torch.zeros(8, 12, 3, 3, 3), "decoder.conv1.weight": torch.zeros(8)},
              "VAE"),
    "a UMT5": (lambda _: {"shared.weight": torch.zeros(8, 4), "encoder.block.0.layer.0.SelfAttention.q.weight":
                          torch.zeros(4, 4)}, "text encoder"),
    "a stranger": (lambda _: {"alpha": torch.zeros(1), "beta": torch.zeros(1)}, "alpha, beta"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_files_are_refused_by_name(tmp_path, case):
    change, found = OTHERS[case]
    with pytest.raises(RuntimeError, match=found) as error:
        load(write_checkpoint(tmp_path, "other.safetensors", sizes=SMALL, change=change))
    assert "other.safetensors" in str(error.value) and "Choose an Ovi checkpoint" in str(error.value)


def test_a_truncated_file_says_so(tmp_path):
    path = write_checkpoint(tmp_path, sizes=SMALL)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(RuntimeError, match=r"ovi\.safetensors .*partly downloaded: download it again"):
        load(path)


# --- in ComfyUI -------------------------------------------------------------------------------------------------------

@pytest.fixture
def models_folder(tmp_path):
    """A diffusion_models folder known to ComfyUI for one test."""
    paths = folder_paths.folder_names_and_paths["diffusion_models"][0]
    folder_paths.add_model_folder_path("diffusion_models", str(tmp_path))
    yield tmp_path
    paths.remove(str(tmp_path))
    folder_paths.filename_list_cache.pop("diffusion_models", None)


def test_the_loader_node_loads_and_reports(models_folder):
    write_checkpoint(models_folder, sizes=SMALL)
    output = OviModelLoader.execute("ovi.safetensors", "default")
    assert_pair_close(predict(output.result[0]), truth(draw_weights(SMALL)), 1e-5)
    assert "2 x 2 blocks" in str(output.ui.as_dict() if hasattr(output.ui, "as_dict") else output.ui)


def test_the_stock_loader_knows_a_core_layout_file(models_folder):
    write_checkpoint(models_folder, layout="core", sizes=SMALL)
    patcher, = nodes.UNETLoader().load_unet("ovi.safetensors", "default")
    assert isinstance(patcher.model, model_base.OviBaseModel)
    assert_pair_close(predict(patcher), truth(draw_weights(SMALL)), 1e-5)


def test_without_registration_the_stock_loader_would_drop_the_audio(models_folder):
    """The control for the test above, and the reason for registering."""
    write_checkpoint(models_folder, layout="core", sizes=Sizes(blocks=2, text=4096))
    comfy.supported_models.models.remove(supported_models.OviConfig)
    try:
        patcher, = nodes.UNETLoader().load_unet("ovi.safetensors", "default")
    finally:
        supported_models.register()
    assert isinstance(patcher.model, comfy.model_base.WAN22) and not hasattr(network(patcher), "audio_model")
    patcher, = nodes.UNETLoader().load_unet("ovi.safetensors", "default")
    assert isinstance(patcher.model, model_base.OviBaseModel)


def test_registration_leaves_plain_wan_alone():
    patcher = comfy.sd.load_diffusion_model_state_dict(core_layout(plain_wan_weights()))
    assert isinstance(patcher.model, comfy.model_base.WAN22)


# --- loading again ----------------------------------------------------------------------------------------------------

def test_the_recipe_for_loading_again(tmp_path, monkeypatch):
    """ComfyUI calls it for multi-GPU clones, and with disable_dynamic=True for the delegates of hooks and compile."""
    patcher, _ = load(write_checkpoint(tmp_path, sizes=SMALL), torch.bfloat16)
    asked, loader = [], comfy.sd.load_diffusion_model_state_dict
    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", lambda *a, disable_dynamic=False, **k: (
        asked.append(disable_dynamic) or loader(*a, disable_dynamic=disable_dynamic, **k)))
    function, arguments = patcher.cached_patcher_init
    assert function.__qualname__ == function.__name__  # found again by name, not a closure
    for options in ({}, {"disable_dynamic": True}):
        again = function(*arguments, **options)
        assert again.model is not patcher.model and type(again) is comfy.model_patcher.ModelPatcher
        assert again.cached_patcher_init == patcher.cached_patcher_init
        assert network(again).head.head.weight.dtype == torch.bfloat16
        assert_pair_equal_tensors(network(again).state_dict(), network(patcher).state_dict())
    assert asked == [False, True]  # on a CPU both give the same patcher


def assert_pair_equal_tensors(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_deep_clone_loads_fresh_weights(tmp_path):
    """`force_deepcopy` is how core makes an independent copy; it goes through the recipe."""
    patcher, _ = load(write_checkpoint(tmp_path, sizes=SMALL))
    clone = patcher.clone(force_deepcopy=True)
    assert clone.model is not patcher.model
    assert_pair_equal_tensors(network(clone).state_dict(), network(patcher).state_dict())


def test_the_file_on_disk_is_not_changed_by_loading(tmp_path):
    path = write_checkpoint(tmp_path, sizes=SMALL)
    before = {name: tensor.clone() for name, tensor in load_file(path).items()}
    predict(load(path)[0])
    assert_pair_equal_tensors(load_file(path), before)
