"""A model that core does not load dynamically owns its memory: files may change under it, and LoRA hooks may write.

Files are written over in place, as `cp`, `rsync --inplace` and `wget -O` do. Everything runs without DynamicVRAM and
in the static copy that core asks for where it is on.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from comfy.ops import QuantizedTensor
from ovi_native.ovi_model.files import quantise
from ovi_native.ovi_model.media import audio_vae
from ovi_native.ovi_model.ovi import checkpoint, quant_recipe
from ovi_native.ovi_model.text import umt5
from safetensors.torch import load_file, save_file
from support.embeddings import encode
from support.lora_hooks import lora, sample, with_hooks
from tiny.compare import assert_pair_equal
from tiny.inputs import conditioning
from tiny.models import network, tiny_model, write_checkpoint
from tiny.sizes import Sizes

pytestmark = pytest.mark.usefixtures("either_loading")
NAME = "model_960x960.safetensors"
SMALL = Sizes(heads=1, blocks=2)


def static_copy(path: Path, dtype=None):
    """What core loads for hooks, torch.compile and a second GPU; the model itself where DynamicVRAM is off."""
    return checkpoint.reload_patcher(str(path), None, dtype, None, disable_dynamic=True)


def parts(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a model, the scales of quantised ones too."""
    found = {}
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        data = tensor.data
        if isinstance(data, QuantizedTensor):
            found |= {f"{key}.{name}": getattr(data, name) for name in data.__tensor_flatten__()[0]}
        else:
            found[key] = data
    return found


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_kept(module: torch.nn.Module, kept: dict[str, torch.Tensor]) -> None:
    for key, tensor in parts(module).items():
        assert torch.equal(as_bytes(tensor), as_bytes(kept[key])), key


def overwrite(path: Path) -> None:
    """Other weights of the same length, in place."""
    with path.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(start)
        file.write(b"\x11" * (path.stat().st_size - start))


def quantised(folder: Path, name: str) -> Path:
    """A checkpoint in one of our formats, by the recipe of the loader."""
    source = write_checkpoint(folder, "source.safetensors", SMALL, dtype=torch.bfloat16)
    tensors, _ = checkpoint.read_checkpoint(str(source))
    out = {}
    for layer, group in quantise.by_layer(tensors).items():
        out |= quantise.convert_layer(layer, group, quant_recipe.FORMATS[name])
    save_file({key: tensor.contiguous() for key, tensor in out.items()}, folder / NAME)
    return folder / NAME


@pytest.mark.parametrize(("stored", "dtype"), [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16), ("fp8_scaled", None), ("int8", None), ("nvfp4", None)])
def test_a_loaded_model_does_not_follow_its_file(tmp_path, stored, dtype):
    plain = not isinstance(stored, str)
    path = write_checkpoint(tmp_path, NAME, SMALL, dtype=stored) if plain else quantised(tmp_path, stored)
    before = path.read_bytes()
    model = network(static_copy(path, dtype))
    kept = {key: tensor.clone() for key, tensor in parts(model).items()}
    overwrite(path)
    assert path.read_bytes() != before
    assert_kept(model, kept)
    with path.open("r+b") as file:  # a page that is gone ends the process
        file.truncate(4096)
    assert_kept(model, kept)


def test_files_are_let_go(tmp_path):
    """On Windows a file that is still mapped can be neither replaced nor deleted."""
    if sys.platform != "linux":
        pytest.skip("looks into /proc")
    path = write_checkpoint(tmp_path, NAME, SMALL, dtype=torch.bfloat16)
    model = static_copy(path, torch.bfloat16)
    assert model is not None and str(path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_static_model_has_the_dtype_it_declares(tmp_path, stored, dtype):
    """Layers that compute in the model's dtype do not cast: another one stops them, or changes what they compute."""
    patcher = static_copy(write_checkpoint(tmp_path, NAME, SMALL, dtype=stored), dtype)
    found = {key: tensor.dtype for key, tensor in network(patcher).named_parameters()}
    assert found == {key: torch.float32 if key.startswith("patch_embedding.") else dtype for key in found}
    assert patcher.model.get_dtype() == dtype


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_lora_hooks(tmp_path, stored):
    """They change what is computed, never the file, and are gone after. (Core has none for quantised models.)"""
    path = write_checkpoint(tmp_path, NAME, SMALL, dtype=stored)
    before = path.read_bytes()
    patcher = static_copy(path)
    plain, weights = sample(patcher, conditioning(7, 1)), lora(patcher)
    hooked = sample(patcher, with_hooks(conditioning(7, 1), weights))
    assert all(torch.isfinite(stream).all() for stream in hooked.unbind())
    assert all(not torch.equal(a, b) for a, b in zip(hooked.unbind(), plain.unbind(), strict=True))
    assert_pair_equal(sample(patcher, conditioning(7, 1)), plain)
    assert path.read_bytes() == before


def test_lora_hooks_compute_what_they_should(tmp_path):
    """The reference is a model of the same weights in memory of its own."""
    patcher = static_copy(write_checkpoint(tmp_path, NAME, SMALL, dtype=torch.float32), torch.float32)
    truth = tiny_model(sizes=SMALL)
    positive = with_hooks(conditioning(7, 1), lora(patcher))
    assert_pair_equal(sample(patcher, positive), sample(truth, positive))


# --- text encoder and audio VAE ---------------------------------------------------------------------------------------


def fp8_scaled(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The text encoder as Comfy-Org's scaled fp8 file has it."""
    out = {}
    for key, tensor in weights.items():
        if tensor.ndim == 2 and key.startswith("encoder.") and "relative" not in key:
            layer = key.removesuffix(".weight")
            out[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()),
                                                       dtype=torch.uint8)
            out[f"{layer}.weight_scale"], tensor = torch.tensor(0.5), (2 * tensor.float()).to(torch.float8_e4m3fn)
        out[key] = tensor
    return out


@pytest.mark.parametrize("change", [dict, fp8_scaled], ids=["plain", "fp8"])
def test_a_text_encoder_does_not_follow_its_file(tiny_models, tmp_path, change):
    path = tmp_path / "umt5.safetensors"
    save_file(change(load_file(next(tiny_models.rglob("*umt5*")))), path)
    clip = umt5.load_text_encoder(str(path))
    before = encode(clip, "a red house by the sea")[0]
    kept = {key: tensor.clone() for key, tensor in parts(clip.cond_stage_model).items()}
    overwrite(path)
    assert_kept(clip.cond_stage_model, kept)
    assert torch.equal(encode(clip, "a red house by the sea")[0], before)


def test_an_audio_vae_does_not_follow_its_files(tiny_models, tmp_path):
    paths = []
    for name in ("mmaudio_vae", "vocoder"):
        source = next(tiny_models.rglob(f"*{name}*"))
        paths.append(tmp_path / source.name)
        paths[-1].write_bytes(source.read_bytes())
    vae = audio_vae.load_audio_vae(*map(str, paths))
    kept = {key: tensor.clone() for key, tensor in parts(vae.first_stage_model).items()}
    for path in paths:
        overwrite(path)
    assert_kept(vae.first_stage_model, kept)
