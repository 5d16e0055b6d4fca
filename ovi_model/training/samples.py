"""Clips sampled on the way, to see what has been learnt: the same captions and noise each time.

Written as joint latents for 'Ovi Load Latent', as decoding needs models that have no place beside a
training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import comfy.latent_formats
import comfy.model_management
import torch
from comfy.nested_tensor import NestedTensor
from torch import Tensor

from ..ovi import latents
from .objective import TIMESTEPS, Batch, Switches


@dataclass(frozen=True)
class SampleSettings:
    """How often clips are sampled, and how."""

    every: int = 0  # steps; 0: never
    clips: int = 1
    steps: int = 25
    shift: float = 5.0
    video_guidance: float = 4.0
    audio_guidance: float = 3.0
    seed: int = 0


@torch.no_grad()
def sample(velocity: Callable, batch: Batch, empty: Batch,
           settings: SampleSettings) -> list[Tensor]:
    """Euler's method, guided against the same clips without captions; video [B, 48, T, h, w] and
    audio [B, 20, A]."""
    assert batch.video is not None and batch.audio is not None
    random = torch.Generator().manual_seed(settings.seed)
    streams = [torch.randn(x.shape, generator=random).to(x.device)
               for x in (batch.video, batch.audio)]
    sigmas = torch.linspace(1, 0, settings.steps + 1)
    sigmas = settings.shift * sigmas / (1 + (settings.shift - 1) * sigmas)
    for now, after in pairwise(sigmas.tolist()):
        comfy.model_management.throw_exception_if_processing_interrupted()
        time = batch.text_bias.new_full((batch.size,), now * TIMESTEPS)
        yes, no = (velocity(streams, time, one.text, text_bias=one.text_bias)
                   for one in (batch, empty))
        scales = settings.video_guidance, settings.audio_guidance
        streams = [x + (after - now) * (b + scale * (a - b)).float()
                   for x, a, b, scale in zip(streams, yes, no, scales, strict=True)]
    return streams


class Sampler:
    """Samples the clips of a data set and writes them to a folder."""

    def __init__(self, velocity: Callable, dataset, settings: SampleSettings, folder: Path,
                 device) -> None:
        self.velocity, self.settings, self.folder = velocity, settings, folder
        self.batch, self.empty = (
            dataset.draw(settings.clips, torch.Generator().manual_seed(settings.seed), Switches(),
                         dropout).to(device)
            for dropout in (0.0, 1.0))

    def __call__(self, step: int) -> None:
        """Write `sample_{step}`; nothing if it is not finite."""
        found = sample(self.velocity, self.batch, self.empty, self.settings)
        video, audio = (x.cpu() for x in found)
        if bool(video.isfinite().all() and audio.isfinite().all()):
            samples = NestedTensor((comfy.latent_formats.Wan22().process_out(video), audio))
            path = self.folder / f"sample_{step:08}{latents.ENDING}"
            latents.save({"samples": samples}, path, {}, "samples")
