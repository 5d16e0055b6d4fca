"""Latents, text and conditioning for the tiny models; every number is exact in bf16."""

from __future__ import annotations

import torch
from comfy.nested_tensor import NestedTensor
from ovi_native.ovi_model.ovi.conditioning import AUDIO_TEXT_KEY

from .sizes import TINY

AUDIO_PER_FRAME = 157 / 31  # audio latents for a video latent frame


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
