"""A narrow TAEHV: the topology of core's `comfy.taesd.taehv.TAEHV(latent_channels=48)` with fewer channels.

Core fixes the widths of a TAEHV at 64 for the encoder and 256, 128, 64 and 64 for the decoder, 11.4 million numbers. A
channel whose weights and biases are 0 stays 0 through every layer, so a narrower network is one of core's whose further
channels are 0: see `zero_channels`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import comfy.ops
import torch
from comfy.taesd.taehv import Clamp, MemBlock, TGrow, TPool, apply_model_with_memblocks
from torch import nn

from .zero_channels import DECODER_LEVELS, ENCODER_POOLS

LATENT_CHANNELS, PATCH, PIXELS = 48, 2, 12


@dataclass(frozen=True)
class Widths:
    """Channels that are used. A block's `inner` ones are those between its convolutions."""

    pixels: int = 12
    pooled: tuple[int, int, int] = (24, 64, 64)
    encoder: tuple[int, int, int] = (64, 64, 64)
    encoder_inner: tuple[int, ...] = (1, 64, 1, 1, 64, 1, 1, 1, 1)
    decoder: tuple[int, int, int, int] = (80, 128, 64, 64)
    grown: tuple[int, int, int] = (80, 48, 56)  # of each frame
    decoder_inner: tuple[int, ...] = (98, 40, 40, 96, 96, 64, 64, 64, 64)
    decoder_kernels: tuple[tuple[int, int, int], ...] = ((1, 1, 3), *[(3, 3, 3)] * 2, *[(3, 1, 1)] * 6)


class Block(MemBlock):
    """Core's block with its own number of inner channels; a kernel of size 1 is the centre of core's."""

    def __init__(self, width: int, inner: int, sizes: tuple[int, int, int] = (3, 3, 3)) -> None:
        nn.Module.__init__(self)
        self.act = nn.ReLU(inplace=True)
        a, b, c = sizes
        self.conv = nn.Sequential(conv(2 * width, inner, a), self.act, conv(inner, inner, b), self.act,
                                  conv(inner, width, c))
        self.skip = nn.Identity()
        with torch.no_grad():
            self.conv[4].weight.mul_(0.2)


class Pool(TPool):
    """Core's pooling of frames with its own number of outputs."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__(1, stride)
        self.conv = conv(width * stride, out, 1, bias=False)


class Grow(TGrow):
    """Core's growth of frames with its own number of outputs for each."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__(1, stride)
        self.conv = conv(width, out * stride, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, h, w] -> [stride N, out, h, w]."""
        return self.conv(x).unflatten(1, (self.stride, -1)).flatten(0, 1)


def conv(inputs: int, outputs: int, size: int = 3, gain: float = 1.4, **options) -> nn.Conv2d:
    """A convolution with weights of variance gain^2 / inputs, from torch's generator, and no bias yet."""
    made = comfy.ops.disable_weight_init.Conv2d(inputs, outputs, size, padding=size // 2, **options)
    with torch.no_grad():
        made.weight.normal_(std=gain / math.sqrt(inputs * size**2))
        if made.bias is not None:
            made.bias.zero_()
    return made


def encoder(widths: Widths) -> nn.Sequential:
    """[N T, 12, H / 2, W / 2] -> [N T / 4, 48, H / 16, W / 16]."""
    layers, width, blocks = [conv(PIXELS, widths.pixels), nn.ReLU(inplace=True)], widths.pixels, 0
    for pooled, out, stride in zip(widths.pooled, widths.encoder, ENCODER_POOLS.values(), strict=True):
        layers += [Pool(width, pooled, stride), conv(pooled, out, stride=2, bias=False)]
        layers += [Block(out, inner) for inner in widths.encoder_inner[blocks:blocks + 3]]
        width, blocks = out, blocks + 3
    return nn.Sequential(*layers, conv(width, LATENT_CHANNELS, gain=1.0))


def decoder(widths: Widths) -> nn.Sequential:
    """[N T, 48, h, w] -> [4 N T, 12, 8 h, 8 w]."""
    layers: list[nn.Module] = [Clamp(), conv(LATENT_CHANNELS, widths.decoder[0]), nn.ReLU(inplace=True)]
    for level, stride in enumerate(DECODER_LEVELS.values()):
        width, grown = widths.decoder[level], widths.grown[level]
        three = slice(3 * level, 3 * level + 3)
        layers += [Block(width, *inner) for inner in zip(widths.decoder_inner[three], widths.decoder_kernels[three],
                                                         strict=True)]
        layers += [nn.Upsample(scale_factor=2), Grow(width, grown, stride),
                   conv(grown, widths.decoder[level + 1], bias=False)]
    last = conv(widths.decoder[3], PIXELS, gain=0.3)
    nn.init.constant_(last.bias, 0.6)
    return nn.Sequential(*layers, nn.ReLU(inplace=True), last)


class Narrow(nn.Module):
    """The narrow autoencoder, on batches as core has them; its state dict has core's names."""

    def __init__(self, widths: Widths = Widths()) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder(widths), decoder(widths)

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """[B, 3, T, H, W] in 0..1 -> [B, 48, ceil(T / 4), H / 16, W / 16]; the last frame fills the last four."""
        x = frames.movedim(2, 1)
        x = torch.cat([x, x[:, -1:].expand(-1, -x.shape[1] % 4, -1, -1, -1)], 1)
        return apply_model_with_memblocks(self.encoder, x, True, False, patch_size=PATCH).movedim(2, 1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, 48, T, h, w] -> [B, 3, 4T - 3, 16 h, 16 w]."""
        x = latents.movedim(2, 1)
        x = apply_model_with_memblocks(self.decoder, x, True, False, patch_size=PATCH, decode=True)
        return x[:, 3:].movedim(2, 1)
