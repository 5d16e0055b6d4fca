"""What a weight file is, told from the names of its tensors, for sentences about wrong files."""

from collections.abc import Callable, Mapping

import torch

from ..geometry import MMAUDIO_16K


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
    if embedding is None or embedding.ndim != 2:
        return f"{family} text encoder"
    return f"{family} text encoder (vocabulary of {embedding.shape[0]}, width {embedding.shape[1]})"


def _audio_vae(tensors: Mapping[str, torch.Tensor]) -> str:
    kernel = tensors["decoder.conv_in.weight"]
    if kernel.ndim != 3:
        return "an image or video VAE"
    rate = {MMAUDIO_16K.channels: "16 kHz ", 40: "44 kHz "}.get(kernel.shape[1], "")
    return f"an MMAudio {rate}VAE without its vocoder"


def _wan_vae(tensors: Mapping[str, torch.Tensor]) -> str:
    kernel = tensors.get("encoder.conv1.weight")
    channels = 0 if kernel is None or kernel.ndim < 2 else kernel.shape[1]
    version = {12: "the Wan 2.2 ", 3: "the Wan 2.1 "}.get(channels, "a Wan ")
    return f"{version}video VAE"


def _video_model(tensors: Mapping[str, torch.Tensor]) -> str:
    kernel = tensors["patch_embedding.weight"]
    return f"a Wan video model{f' with {kernel.shape[1]} input channels' if kernel.ndim > 1 else ''}"


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
    ("patchify_proj.weight", "an LTX video model"),
    (".patchify_proj.weight", "an LTX video model"),
    (".double_blocks.0.img_attn.qkv.weight", "a diffusion model"),
    (".input_blocks.0.0.weight", "a Stable Diffusion checkpoint"),
    (".transformer_blocks.0.attn1.to_q.weight", "a diffusion model"),
)
