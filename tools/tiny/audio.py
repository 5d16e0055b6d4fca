"""A tiny MMAudio 16 kHz VAE and its BigVGAN vocoder, under the names and in the form in which they are published."""

from __future__ import annotations

import math

import torch

from .draws import Draws, Tensors
from .sizes import AUDIO_CHANNELS

MEL_BANDS = 80
VOCODER_KERNELS, VOCODER_RES_KERNELS = (8, 8, 4, 4, 4, 4), (3, 7, 11)


def audio_vae(seed: int, width: int = 64) -> Tensors:
    """The MMAudio 16 kHz VAE as published: kernels not yet normalised, constants of the mel scale included."""
    w = Draws(seed, "mmaudio_vae", torch.float32)
    widths = [width * factor for factor in (1, 2, 4)]
    w.put("data_mean", mel_mean().reshape(1, -1, 1))
    w.put("data_std", torch.ones(1, MEL_BANDS, 1))
    for part in ("encoder", "decoder"):
        w.put(f"{part}.learnable_gain", torch.tensor(0.0))
        _audio_vae_block(w, f"{part}.mid.block_1", widths[2], widths[2])
        w.kernel(f"{part}.mid.attn_1.qkv.weight", 3 * widths[2], widths[2], 1)
        w.kernel(f"{part}.mid.attn_1.proj_out.weight", widths[2], widths[2], 1)
        _audio_vae_block(w, f"{part}.mid.block_2", widths[2], widths[2])
    w.kernel("encoder.conv_in.weight", widths[0], MEL_BANDS, 3)
    w.kernel("encoder.conv_out.weight", 2 * AUDIO_CHANNELS, widths[2], 3)
    w.kernel("decoder.conv_in.weight", widths[2], AUDIO_CHANNELS, 3)
    w.kernel("decoder.conv_out.weight", MEL_BANDS, widths[0], 3)
    for level, width in enumerate(widths):
        for block in range(2):
            before = widths[max(level - 1, 0)] if block == 0 else width
            _audio_vae_block(w, f"encoder.down.{level}.block.{block}", before, width)
        for block in range(3):
            before = widths[min(level + 1, 2)] if block == 0 else width
            _audio_vae_block(w, f"decoder.up.{level}.block.{block}", before, width)
    for conv in ("conv1", "conv2"):
        w.kernel(f"encoder.down.0.downsample.{conv}.weight", widths[0], widths[0], 1)
    w.kernel("decoder.up.1.upsample.conv.weight", widths[1], widths[1], 3)
    return w.tensors


def mel_mean() -> torch.Tensor:
    """[bands] typical log magnitude, falling with frequency as in speech and music."""
    return torch.linspace(-1.2, -3.0, MEL_BANDS)


def _audio_vae_block(w: Draws, block: str, before: int, width: int) -> None:
    w.kernel(f"{block}.conv1.weight", width, before, 3)
    w.kernel(f"{block}.conv2.weight", width, width, 3)
    if before != width:
        w.kernel(f"{block}.nin_shortcut.weight", width, before, 1)


def vocoder(seed: int, width: int = 256) -> Tensors:
    """The BigVGAN generator as published: weight norm not folded, snake parameters on a logarithmic scale."""
    w = Draws(seed, "mmaudio_vocoder", torch.float32)
    low_pass = anti_alias_filter()
    _normed(w, "conv_pre", width, MEL_BANDS, 7, gain=1.0)
    g, v = w.tensors["conv_pre.weight_g"], w.tensors["conv_pre.weight_v"]
    kernel = v * (g / torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True))
    w.put("conv_pre.bias", -(kernel.sum(2) * mel_mean()).sum(1))  # only what differs from the mean is heard
    for stage, kernel in enumerate(VOCODER_KERNELS):
        _normed(w, f"ups.{stage}.0", width, width // 2, kernel, gain=1.0, transposed=True)
        width //= 2
        for index, res_kernel in enumerate(VOCODER_RES_KERNELS, start=3 * stage):
            for conv in range(3):
                _normed(w, f"resblocks.{index}.convs1.{conv}", width, width, res_kernel, gain=0.5)
                _normed(w, f"resblocks.{index}.convs2.{conv}", width, width, res_kernel, gain=0.5)
            for activation in range(6):
                _snake(w, f"resblocks.{index}.activations.{activation}", width, low_pass)
    _snake(w, "activation_post", width, low_pass)
    _normed(w, "conv_post", 1, width, 7, gain=0.1)
    v = w.tensors["conv_post.weight_v"]
    w.put("conv_post.weight_v", v - v.mean(dim=2, keepdim=True))  # no constant offset in the sound
    w.put("conv_post.bias", torch.zeros(1))
    return w.tensors


def _normed(w: Draws, name: str, first: int, second: int, kernel: int, gain: float, transposed: bool = False) -> None:
    """A weight-normed kernel [first, second, kernel]: `weight_g` holds the length of each row of `weight_v`."""
    w.random(f"{name}.weight_g", first, 1, 1, mean=gain, std=0.1 * gain)
    w.random(f"{name}.weight_v", first, second, kernel, std=1.0)
    w.random(f"{name}.bias", second if transposed else first, std=0.05)


def _snake(w: Draws, name: str, width: int, low_pass: torch.Tensor) -> None:
    w.random(f"{name}.act.alpha", width, std=0.3)
    w.random(f"{name}.act.beta", width, std=0.3)
    w.put(f"{name}.upsample.filter", low_pass)
    w.put(f"{name}.downsample.lowpass.filter", low_pass)


def anti_alias_filter(taps: int = 12, ratio: int = 2) -> torch.Tensor:
    """[1, 1, taps] windowed sinc of BigVGAN's activations (Lee et al. 2023; the window of StyleGAN3)."""
    cutoff, half_width = 0.5 / ratio, 0.6 / ratio
    attenuation = 2.285 * (taps // 2 - 1) * math.pi * 4 * half_width + 7.95
    beta = 0.1102 * (attenuation - 8.7)  # Kaiser's rule above 50 dB; here 51 dB
    time = torch.arange(-(taps // 2), taps // 2, dtype=torch.float64) + 0.5
    window = torch.kaiser_window(taps, beta=beta, periodic=False, dtype=torch.float64)
    kernel = window * torch.sinc(2 * cutoff * time)
    return (kernel / kernel.sum()).float().reshape(1, 1, taps)
