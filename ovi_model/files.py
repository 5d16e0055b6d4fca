"""Opening weight files safely, and saying what a wrong one is.

Nothing here runs code from a file: safetensors carry none, and pickles are read with `weights_only=True`, as
`comfy.utils.load_torch_file` does.
"""

import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import comfy.utils
import safetensors
import torch

StateDict = dict[str, torch.Tensor]

_UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, struct.error,
               pickle.UnpicklingError, safetensors.SafetensorError)


def load_weights(path: str | Path, nested: str | None = None) -> tuple[StateDict, dict[str, str]]:
    """Read a `.safetensors`, `.pt`, `.pth` or `.ckpt` file; returns (tensors by name, metadata).

    nested: a dictionary key, or a prefix in safetensors files, under which the weights may lie one level down.
    Raises RuntimeError with a sentence for the user if the file is missing, damaged, unsafe or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise RuntimeError(f"{path} is not there; check the file name, or press R in ComfyUI to refresh its lists.")
    _refuse_placeholder(path)
    try:
        content, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    except pickle.UnpicklingError as error:
        raise RuntimeError(f"{path.name} cannot be read as plain weights ({_first_line(error)}). Files that carry code "
                           "are never opened; get the safetensors version, or download the file again.") from error
    except _UNREADABLE as error:
        raise RuntimeError(f"{path.name} ({_size(path)}) cannot be read as a weight file ({_first_line(error)}). "
                           "It is damaged or only partly downloaded: download it again.") from error
    tensors = _tensors(content, nested)
    if not tensors:
        raise RuntimeError(f"{path.name} holds no tensors; it is not a weight file. Choose another file.")
    return tensors, metadata or {}


def _tensors(content: object, nested: str | None) -> StateDict:
    if not isinstance(content, Mapping):
        return {}
    if nested is not None:
        inner = content.get(nested)
        if isinstance(inner, Mapping):
            content = inner
        prefix = f"{nested}."
        content = {name.removeprefix(prefix): value for name, value in content.items() if isinstance(name, str)}
    return {name: value for name, value in content.items() if isinstance(name, str) and torch.is_tensor(value)}


def _refuse_placeholder(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise RuntimeError(f"{path.name} is a Git LFS placeholder of {_size(path)}, not the weights; download the file "
                           "itself (`git lfs pull`, or the download button of its page).")
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise RuntimeError(f"{path.name} is a web page, not a weight file; the download needs the direct link of the "
                           "file (on Hugging Face: `/resolve/`, not `/blob/`).")


def _first_line(error: Exception) -> str:
    """The first sentence of an error, without the advice PyTorch adds about unsafe loading."""
    text = str(error).strip().splitlines()
    return text[0].split(". ")[0][:160] if text else type(error).__name__


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size} bytes"


def describe_weights(tensors: Mapping[str, torch.Tensor]) -> str:
    """A noun phrase for what the tensors look like, such as "a CLIP text encoder"; names a few keys if unknown."""
    for landmark, what in _LANDMARKS:
        if landmark in tensors or (landmark[0] == "." and any(name.endswith(landmark) for name in tensors)):
            return what if isinstance(what, str) else what(tensors)
    if any(".lora_" in name or name.startswith("lora_") for name in tensors):
        return "a LoRA"
    examples = ", ".join(sorted(tensors)[:3])
    return f"{len(tensors)} tensors this pack does not know ({examples}, ...)"


def _t5(tensors: Mapping[str, torch.Tensor]) -> str:
    bias = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    family = "a UMT5" if "token_embedding.weight" in tensors or bias in tensors else "a T5"
    embedding = tensors.get("shared.weight", tensors.get("token_embedding.weight"))
    size = "" if embedding is None else f" (vocabulary of {embedding.shape[0]}, width {embedding.shape[1]})"
    return f"{family} text encoder{size}"


def _audio_vae(tensors: Mapping[str, torch.Tensor]) -> str:
    kernel = tensors["decoder.conv_in.weight"]
    if kernel.ndim != 3:
        return "an image or video VAE"
    rate = {20: "16 kHz ", 40: "44 kHz "}.get(kernel.shape[1], "")
    return f"an MMAudio {rate}VAE without its vocoder"


def _wan_vae(tensors: Mapping[str, torch.Tensor]) -> str:
    kernel = tensors.get("encoder.conv1.weight")
    version = {12: "the Wan 2.2 ", 3: "the Wan 2.1 "}.get(0 if kernel is None else kernel.shape[1], "a Wan ")
    return f"{version}video VAE"


def _video_model(tensors: Mapping[str, torch.Tensor]) -> str:
    return f"a Wan video model with {tensors['patch_embedding.weight'].shape[1]} input channels"


# A telling tensor name (with a leading dot: how one ends) and what such a file is; the first match counts.
_LANDMARKS: tuple[tuple[str, str | Callable[[Mapping[str, torch.Tensor]], str]], ...] = (
    ("video_model.patch_embedding.weight", "an Ovi checkpoint"),
    ("audio_model.patch_embedding.0.weight", "an Ovi checkpoint or its audio half"),
    ("patch_embedding.2.w1.weight", "the audio half of an Ovi checkpoint"),
    ("vae.decoder.conv_in.weight", "an MMAudio VAE with its vocoder merged in"),
    ("encoder.block.0.layer.0.SelfAttention.q.weight", _t5),
    ("blocks.0.attn.q.weight", _t5),
    ("text_model.encoder.layers.0.mlp.fc1.weight", "a CLIP text encoder"),
    (".mlp.gate_proj.weight", "a language model"),
    ("vision_model.encoder.layers.0.mlp.fc1.weight", "a CLIP vision encoder"),
    ("conv_pre.weight_v", "a BigVGAN vocoder"),
    ("conv_pre.parametrizations.weight.original1", "a BigVGAN vocoder"),
    ("conv_pre.weight", "a BigVGAN vocoder"),
    ("decoder.conv1.weight", _wan_vae),
    ("decoder.22.bias", "a tiny video VAE (TAEHV)"),
    ("decoder.conv_in.weight", _audio_vae),
    ("decoder.conv_in.conv.weight", "an image or video VAE"),
    ("patch_embedding.weight", _video_model),
    (".double_blocks.0.img_attn.qkv.weight", "a diffusion model"),
    (".input_blocks.0.0.weight", "a Stable Diffusion checkpoint"),
    (".transformer_blocks.0.attn1.to_q.weight", "a diffusion model"),
)
