"""MODELs of tiny random weights, as ComfyUI loads them, and checkpoint files."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import torch
from ovi_native.ovi_model.ovi import model_base
from ovi_native.ovi_model.ovi.model import OviModel
from safetensors.torch import save_file

from .checkpoint import draw_weights
from .sizes import TINY, Sizes, core_layout


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
