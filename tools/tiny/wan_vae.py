"""Core's Wan2.2 VAE for the tests: small with random weights, or full-size without any.

The settings around the network (dtype, memory estimate, scaling) are always those that core itself gives to a Wan2.2
VAE file; only the network inside has another size or stands on fake tensors.
"""

from __future__ import annotations

import math

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
from comfy.ldm.wan.vae2_2 import WanVAE

CONFIG = {"z_dim": 48, "temperal_downsample": [False, True, True]}  # of core's own, which has dim 160 and dec_dim 256


def settings(dtype: torch.dtype) -> comfy.sd.VAE:
    """Core's VAE object for a Wan2.2 file, its full-size network on the meta device."""
    with torch.device("meta"):
        return comfy.sd.VAE(sd=WanVAE(**CONFIG).state_dict(), dtype=dtype)


def small_vae(width: int = 8, seed: int = 0) -> comfy.sd.VAE:
    """A float32 VAE whose narrowest layers are `width` wide; its random frames fill the range 0..1 without clipping."""
    generator = torch.Generator().manual_seed(seed)
    model = WanVAE(dim=8, dec_dim=width, **CONFIG).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        n = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma"):
            n = 1 + 0.25 * n
        elif name.endswith("bias"):
            n *= 0.1
        else:
            n /= math.sqrt(math.prod(parameter.shape[1:]))
        parameter.copy_(n)
    model.decoder.head[-1].weight *= 0.3
    return with_model(model, torch.float32)


def with_model(model: WanVAE, dtype: torch.dtype) -> comfy.sd.VAE:
    """Core's VAE object around another network of the same class."""
    vae = settings(dtype)
    vae.first_stage_model, vae.size = model, None
    vae.patcher = comfy.model_patcher.CoreModelPatcher(
        model, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device())
    return vae


def latents(frames: int, batch: int = 1, height: int = 4, width: int = 6, channels: int = 48) -> torch.Tensor:
    return torch.randn(batch, channels, frames, height, width, generator=torch.Generator().manual_seed(frames))
