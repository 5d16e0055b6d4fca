"""A tiny 48-channel TAEHV, which stands in for the Wan2.2 VAE."""

from __future__ import annotations

import math

import torch

from .draws import Draws, Tensors
from .sizes import VIDEO_CHANNELS

TAEHV_ENCODER = {2: 2, 7: 2, 12: 1}  # index of each temporal pooling -> stride; a strided kernel and 3 blocks follow
TAEHV_DECODER = {3: (256, 128, 1), 9: (128, 64, 2), 15: (64, 64, 2)}  # first block -> (width, next width, time growth)
TAEHV_PATCH = 2


def video_vae(seed: int) -> Tensors:
    """The tiny Wan2.2 autoencoder of the `taew2_2` files: 16x in space, 4x in time, RGB in 0..1."""
    w = Draws(seed, "taew2_2", torch.float16)
    pixels = 3 * TAEHV_PATCH**2
    w.layer("encoder.0", 64, pixels, 3, 3, gain=1.4)
    for index, stride in TAEHV_ENCODER.items():
        name = f"encoder.{index}.conv.weight"
        w.put(name, _time_mix(w, name, 64, stride) / stride)
        w.kernel(f"encoder.{index + 1}.weight", 64, 64, 3, 3, gain=1.4)
        for block in range(index + 2, index + 5):
            _taehv_block(w, f"encoder.{block}", 64)
    kernel = _balanced(w.draw("encoder.17.weight", VIDEO_CHANNELS, 64, 3, 3))
    w.put("encoder.17.weight", kernel * (1.4 / math.sqrt(kernel[0].numel())))
    w.random("encoder.17.bias", VIDEO_CHANNELS, std=0.05)
    w.layer("decoder.1", 256, VIDEO_CHANNELS, 3, 3, gain=1.4)
    for index, (width, after, growth) in TAEHV_DECODER.items():
        for block in range(index, index + 3):
            _taehv_block(w, f"decoder.{block}", width)
        name = f"decoder.{index + 4}.conv.weight"
        mix = _time_mix(w, name, width, growth).reshape(width, growth, width)
        w.put(name, mix.transpose(0, 1).reshape(growth * width, width, 1, 1))
        w.kernel(f"decoder.{index + 5}.weight", after, width, 3, 3, gain=1.4)
    colour = w.draw("decoder.22.weight", 3, 64, 3, 3).repeat_interleave(TAEHV_PATCH**2, dim=0)
    texture = w.draw("decoder.22.texture", pixels, 64, 3, 3)
    kernel = _balanced(colour + 0.2 * texture)
    w.put("decoder.22.weight", kernel * (0.2 / math.sqrt(kernel[0].numel())))
    w.put("decoder.22.bias", torch.full((pixels,), 0.5))
    return w.tensors


def _balanced(kernel: torch.Tensor) -> torch.Tensor:
    """Each output's weights sum to 0, so that what all inputs share (they are never negative) adds no constant."""
    return kernel - kernel.mean(dim=(1, 2, 3), keepdim=True)


def _taehv_block(w: Draws, block: str, width: int) -> None:
    """A residual block that also sees the frame before; its last kernel is weak, so that depth does not add scale."""
    w.layer(f"{block}.conv.0", width, 2 * width, 3, 3, gain=1.4)
    w.layer(f"{block}.conv.2", width, width, 3, 3, gain=1.4)
    w.layer(f"{block}.conv.4", width, width, 3, 3, gain=0.3)


def _time_mix(w: Draws, name: str, width: int, frames: int) -> torch.Tensor:
    """[width, frames * width, 1, 1]: each frame passed on almost unchanged, so that neighbouring frames stay alike."""
    same = torch.eye(width).repeat(1, frames)
    noise = w.draw(name, width, frames * width) * (0.5 / math.sqrt(width))
    return (same + noise).reshape(width, -1, 1, 1)
