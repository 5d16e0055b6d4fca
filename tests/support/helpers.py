"""Small random Ovi models, latents and conditioning shared by the tests.

Weights follow the draw rules of the reference numbers' README: matrices and kernels normal with std 1/sqrt(fan-in)
(x0.7 for the time projection), biases std 0.1, norm gains 1 + 0.25 n, modulation tables 0.3 n. Every parameter is
random, including those training starts at 0 or 1, so that no part of the model can hide. Values are exact in bf16.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import comfy.sd
import torch
from comfy.nested_tensor import NestedTensor
from ovi_native.ovi_model.ovi import model_base
from ovi_native.ovi_model.ovi.conditioning import AUDIO_TEXT_KEY
from ovi_native.ovi_model.ovi.model import OviModel
from safetensors.torch import save_file

AUDIO_PER_FRAME = 157 / 31
GAIN = re.compile(r"norm(_q|_k|3|_k_fusion|_fusion)\.weight$")


@dataclass(frozen=True)
class Sizes:
    """A tiny model: heads of 128 as in the real one."""

    heads: int = 2
    blocks: int = 3
    ffn: int = 192
    text: int = 64
    frequencies: int = 256

    @property
    def dim(self) -> int:
        return 128 * self.heads


TINY = Sizes()


def tensor_shapes(sizes: Sizes) -> dict[str, list[int]]:
    """Names (upstream layout) and shapes of a joint checkpoint."""
    d, conv_hidden = sizes.dim, 256 * math.ceil(int(8 * sizes.dim / 3) / 256)
    shapes: dict[str, list[int]] = {}

    def layer(name, out_dim, *in_dims):
        shapes[f"{name}.weight"] = [out_dim, *in_dims]
        shapes[f"{name}.bias"] = [out_dim]

    for tower, channels, volume in (("video_model", 48, 4), ("audio_model", 20, 1)):
        layer(f"{tower}.text_embedding.0", d, sizes.text)
        layer(f"{tower}.text_embedding.2", d, d)
        layer(f"{tower}.time_embedding.0", d, sizes.frequencies)
        layer(f"{tower}.time_embedding.2", d, d)
        layer(f"{tower}.time_projection.1", 6 * d, d)
        for i in range(sizes.blocks):
            block = f"{tower}.blocks.{i}"
            for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k",
                         "cross_attn.v", "cross_attn.o", "cross_attn.k_fusion", "cross_attn.v_fusion"):
                layer(f"{block}.{name}", d, d)
            for name in ("self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k",
                         "cross_attn.norm_k_fusion"):
                shapes[f"{block}.{name}.weight"] = [d]
            layer(f"{block}.norm3", d)
            layer(f"{block}.cross_attn.pre_attn_norm_fusion", d)
            layer(f"{block}.ffn.0", sizes.ffn, d)
            layer(f"{block}.ffn.2", d, sizes.ffn)
            shapes[f"{block}.modulation.modulation"] = [1, 6, d]
        shapes[f"{tower}.head.modulation"] = [1, 2, d]
        layer(f"{tower}.head.head", volume * channels, d)
    layer("video_model.patch_embedding", d, 48, 1, 2, 2)
    layer("audio_model.patch_embedding.0", d, 20, 7)
    shapes["audio_model.patch_embedding.2.w1.weight"] = [conv_hidden, d, 7]
    shapes["audio_model.patch_embedding.2.w2.weight"] = [d, conv_hidden, 7]
    shapes["audio_model.patch_embedding.2.w3.weight"] = [conv_hidden, d, 7]
    return shapes


def draw_weights(sizes: Sizes = TINY, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random joint checkpoint in the upstream layout, float32 holding bf16 values."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(sizes).items():
        n = torch.randn(shape, generator=generator)
        if "modulation" in name:
            n *= 0.3
        elif GAIN.search(name):
            n = 1 + 0.25 * n
        elif name.endswith(".bias"):
            n *= 0.1
        else:
            n *= (0.7 if "time_projection" in name else 1.0) / math.sqrt(math.prod(shape[1:]))
        weights[name] = n.to(torch.bfloat16).float()
    return weights


def core_layout(weights: dict) -> dict:
    """The same tensors under core's names: the video tower at the root, tables one level up."""
    return {name.removeprefix("video_model.").replace(".modulation.modulation", ".modulation"): tensor
            for name, tensor in weights.items()}


def load(weights: dict, dtype: torch.dtype = torch.float32):
    """MODEL from upstream-layout weights, computing in `dtype` itself."""
    patcher = comfy.sd.load_diffusion_model_state_dict(
        core_layout({k: v.to(dtype) for k, v in weights.items()}), model_options={"dtype": dtype})
    patcher.model.manual_cast_dtype = None
    assert isinstance(patcher.model, model_base.OviBaseModel)
    return patcher


def tiny_model(dtype: torch.dtype = torch.float32, sizes: Sizes = TINY, seed: int = 0):
    """A tiny random MODEL."""
    return load(draw_weights(sizes, seed), dtype)


def write_checkpoint(folder: Path, name: str = "ovi.safetensors", sizes: Sizes = TINY, layout: str = "upstream",
                     dtype: torch.dtype = torch.float32, seed: int = 0, change=None) -> Path:
    """Write a random joint checkpoint; `change(weights)` may edit it in its final layout first."""
    weights = draw_weights(sizes, seed)
    if layout == "core":
        weights = core_layout(weights)
    weights = {k: v.to(dtype) for k, v in weights.items()}
    if change is not None:
        weights = change(weights) or weights
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / name)
    return folder / name


def network(patcher) -> OviModel:
    return patcher.model.diffusion_model


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers exact in bf16."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16).to(dtype)


def text(tokens: int, seed: int, width: int = TINY.text) -> torch.Tensor:
    return noise(1, tokens, width, seed=1000 + seed)


def conditioning(tokens: int = 7, seed: int = 0, audio_tokens: int | None = None, width: int = TINY.text, **extra):
    """CONDITIONING as 'Ovi Prompt' makes it; audio_tokens adds a separate text for the audio tower."""
    if audio_tokens is not None:
        extra[AUDIO_TEXT_KEY] = text(audio_tokens, seed + 500, width)
    return [[text(tokens, seed, width), {"pooled_output": None, **extra}]]


def audio_length(frames: int) -> int:
    return max(1, round(frames * AUDIO_PER_FRAME))


def joint(frames: int = 3, height: int = 4, width: int = 6, audio: int | None = None, batch: int = 1,
          seed: int | None = None) -> NestedTensor:
    """A joint latent, zeros or (with a seed) random."""
    audio = audio_length(frames) if audio is None else audio
    if seed is None:
        return NestedTensor((torch.zeros(batch, 48, frames, height, width), torch.zeros(batch, 20, audio)))
    return NestedTensor((noise(batch, 48, frames, height, width, seed=seed), noise(batch, 20, audio, seed=seed + 1)))


def first_frame_mask(latent: NestedTensor) -> NestedTensor:
    """Noise mask of image to video: frame 0 is given, everything else sampled."""
    video, audio = latent.unbind()
    video_mask = torch.ones(video.shape[0], 1, *video.shape[2:])
    video_mask[:, :, 0] = 0
    return NestedTensor((video_mask, torch.ones(audio.shape[0], 1, audio.shape[2])))


def relative_l2(found: torch.Tensor, truth: torch.Tensor) -> float:
    assert found.shape == truth.shape, (found.shape, truth.shape)
    found, truth = found.double(), truth.double()
    return float((found - truth).norm() / truth.norm().clamp(min=1e-30))


def assert_pair_close(found, truth, tolerance: float) -> None:
    """Both streams of a pair (nested tensor, list or tuple) agree to a relative L2 error."""
    found = found.unbind() if isinstance(found, NestedTensor) else found
    truth = truth.unbind() if isinstance(truth, NestedTensor) else truth
    for name, a, b in zip(("video", "audio"), found, truth, strict=True):
        assert torch.isfinite(a).all(), f"{name} is not finite"
        error = relative_l2(a, b)
        assert error <= tolerance, f"{name} differs by {error:.2e}, allowed {tolerance:.0e}"


def assert_pair_equal(found, truth) -> None:
    for name, a, b in zip(("video", "audio"), found.unbind(), truth.unbind(), strict=True):
        assert torch.equal(a, b), f"{name} is not bit-identical (relative L2 {relative_l2(a, b):.2e})"


def plain_wan_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """A Wan2.2 5B at tiny width: the video tower without what Ovi added to it."""
    weights = draw_weights(Sizes(text=4096), seed)
    return {name: tensor for name, tensor in weights.items() if name.startswith("video_model") and "fusion" not in name}


def plain_wan(seed: int = 0):
    """MODEL of a plain Wan2.2 5B at tiny width, as core loads it: what Ovi's nodes must refuse."""
    return comfy.sd.load_diffusion_model_state_dict(core_layout(plain_wan_weights(seed)))


class Batches:
    """Context manager noting the batch size of every joint pass that computes anything (runs block 0)."""

    def __init__(self, patcher):
        self.network, self.sizes = network(patcher), []

    def __enter__(self) -> list[int]:
        self.handle = self.network.blocks[0].register_forward_pre_hook(
            lambda _, args: self.sizes.append(args[0].x.shape[0]))
        return self.sizes

    def __exit__(self, *_):
        self.handle.remove()
