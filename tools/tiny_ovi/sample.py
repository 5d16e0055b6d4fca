"""Clips from a checkpoint in training, through the linear codecs: a quick look that needs no other trained part."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from ovi_native.ovi_model.training.objective import join_texts
from safetensors import safe_open

from .latents import Codec
from .network import fresh_model, network
from .pool import Length


def averaged_weights(path: Path) -> dict[str, torch.Tensor]:
    """The averaged weights of a checkpoint of `Trainer`, by the network's names."""
    with safe_open(path, "pt") as file:
        return {name.removeprefix("average."): file.get_tensor(name) for name in file.keys()
                if name.startswith("average.")}


def averaged_network(path: Path):
    net = network(fresh_model())
    net.load_state_dict(averaged_weights(path), strict=False)
    return net


@torch.no_grad()
def sample(net, texts: list[torch.Tensor], empty: torch.Tensor, length: Length, steps: int = 30, shift: float = 5.0,
           video_scale: float = 4.0, audio_scale: float = 3.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Euler's method with guidance for one clip a text [n, C]: latents [B, 48, T, 4, 4] and [B, 20, A]."""
    random, count = torch.Generator().manual_seed(seed), len(texts)
    video = torch.randn(count, 48, length.latent_frames, 4, 4, generator=random)
    audio = torch.randn(count, 20, length.audio_latents, generator=random)
    text, bias = join_texts([*texts, *[empty] * count])
    sigmas = torch.linspace(1, 0, steps + 1)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    for now, after in itertools.pairwise(sigmas.tolist()):
        pair = [video.repeat(2, 1, 1, 1, 1), audio.repeat(2, 1, 1)]
        found = net(pair, torch.full((2 * count,), now * 1000), text, {}, text_bias=bias)
        guided = [no + scale * (yes - no) for scale, (yes, no) in
                  zip((video_scale, audio_scale), (v.chunk(2) for v in found), strict=True)]
        video, audio = (x + (after - now) * v for x, v in zip((video, audio), guided, strict=True))
    return video, audio


def frames_of(codec: Codec, video: torch.Tensor) -> list[np.ndarray]:
    """Frames [4n+1, 64, 64, 3] uint8 of each clip."""
    return [(codec.decode_video(clip) * 255).round().to(torch.uint8).numpy() for clip in video]
