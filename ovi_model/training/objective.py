"""What a joint model is taught: flow matching on both streams, each generated or given.

A noise level sigma mixes clean latents and noise, x = (1 - sigma) clean + sigma noise, and the
network learns the velocity noise - clean (Ovi, arXiv 2510.01284, section 3). Both streams share one
sigma by default. What is given stays clean, stands at timestep 0, and is no part of the loss: with
that one switch, text to both, first frame, picture to sound, sound to picture, extension and
inpainting are the same training. A stream that is None is left out altogether: the other tower then
runs alone, and no weight of the absent one takes part.

Shapes: B clips, T latent frames, h x w latent pixels, A audio latents, L text tokens, C text width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

TIMESTEPS = 1000
DISTRIBUTIONS = ("logit-normal", "uniform")
TEXT_TOKENS = 512
"""What both towers attend to: a text's own tokens and padding."""


@dataclass(frozen=True)
class Batch:
    """Clips of one size and length, and what of them is given. One of the streams may be None."""

    video: Tensor | None  # [B, 48, T, h, w] as the network sees it (normalised)
    audio: Tensor | None  # [B, 20, A]
    text: Tensor  # [B, L, C], from `join_texts`
    text_bias: Tensor  # [B, L]
    video_generated: Tensor  # [B, 1, T, 1, 1] or [B, 1, T, h, w]: 1 generated, 0 given
    audio_generated: Tensor  # [B, 1, 1] or [B, 1, A]
    video_weight: Tensor | None = None  # [B] in the loss: 0 where a clip has no picture
    audio_weight: Tensor | None = None  # [B] 0 where it has no sound

    @property
    def size(self) -> int:
        """Clips in it."""
        return len(self.text)

    def only(self, stream: str) -> Batch:
        """The same clips with one stream, 'video' or 'audio', alone."""
        return replace(self, audio=None) if stream == "video" else replace(self, video=None)

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        return Batch(**{field.name: value if (value := getattr(self, field.name)) is None
                        else value.to(device)
                        for field in fields(self)})


@dataclass(frozen=True)
class Levels:
    """How noise levels are drawn: logit-normal or uniform, then shifted towards noise as sampling
    does."""

    distribution: str = "logit-normal"
    shift: float = 5.0

    def __post_init__(self) -> None:
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError("distribution of the noise levels must be one of "
                             f"{', '.join(DISTRIBUTIONS)}, but got {self.distribution!r}.")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift of the noise levels must be above 0, but got {self.shift}.")

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        """[count] sigmas in 0..1."""
        if self.distribution == "uniform":
            u = torch.rand(count, generator=random)
        else:
            u = torch.sigmoid(torch.randn(count, generator=random))
        return self.shift * u / (1 + (self.shift - 1) * u)


@dataclass(frozen=True)
class Switches:
    """Shares of the clips in which a stream, or the first frame, is given."""

    video_given: float = 0.0
    audio_given: float = 0.0
    first_frame: float = 0.0

    def __post_init__(self) -> None:
        for name, share in vars(self).items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is a share of the clips and must be from 0 to 1, but got "
                                 f"{share}.")
        if self.video_given + self.audio_given > 1:
            raise ValueError("video_given and audio_given are shares of the same clips and must "
                             f"not exceed 1 together, but got {self.video_given:g} and "
                             f"{self.audio_given:g}. Lower one of them.")

    def draw(self, count: int, latent_frames: int,
             random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Masks of what is generated: video [count, 1, T, 1, 1], audio [count, 1, 1]."""
        kind = torch.rand(count, generator=random)
        video = torch.ones(count, 1, latent_frames, 1, 1)
        audio = torch.ones(count, 1, 1)
        video[kind < self.video_given] = 0
        audio[(kind >= self.video_given) & (kind < self.video_given + self.audio_given)] = 0
        first = torch.rand(count, generator=random) < self.first_frame
        video[first, :, 0] = 0
        return video, audio


def join_texts(texts: list[Tensor], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Texts [n, C] of any lengths as one [B, L, C], and the bias [B, L] that makes the short ones
    exact.

    Sampling pads a text with zeros to 512 tokens and attends to all of them. The padding's keys and
    values are one and the same, so one row of zeros with the logarithm of their number on its logit
    gives the same attention; what is left of a row is masked out.
    """
    longest = max(len(text) for text in texts) + 1
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"A text has {longest - 1} tokens, and only {length - 1} fit.")
    out = texts[0].new_zeros(len(texts), length, texts[0].shape[-1])
    bias = torch.full((len(texts), length), -1e4)
    for i, text in enumerate(texts):
        out[i, :len(text)] = text
        bias[i, :len(text)] = 0
        if len(text) < TEXT_TOKENS:
            bias[i, len(text)] = math.log(TEXT_TOKENS - len(text))
    return out, bias


def mix(clean: Tensor, noise: Tensor, sigma: Tensor, generated: Tensor) -> Tensor:
    """Latents [B, ...] at levels sigma [B], where they are generated; clean where they are
    given."""
    level = sigma.view(-1, *[1] * (clean.ndim - 1)) * generated
    return torch.lerp(clean, noise, level)


def stream_losses(predicted: Tensor, clean: Tensor, noise: Tensor, generated: Tensor) -> Tensor:
    """[B] mean squared errors of the velocity over what is generated; 0 where nothing is."""
    error = (predicted.float() - (noise - clean)) ** 2 * generated
    count = generated.expand_as(clean).flatten(1).sum(1).clamp(min=1)
    return error.flatten(1).sum(1) / count


def losses(velocity, batch: Batch, sigma: Tensor, video_noise: Tensor | None,
           audio_noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean squared errors of each clip's picture and sound, [B] each, unweighted; zeros for a
    stream that is None.

    velocity: called as the network is, with lists of both streams.
    """
    streams = ((batch.video, video_noise, batch.video_generated),
               (batch.audio, audio_noise, batch.audio_generated))
    noisy = [None if clean is None or noise is None else mix(clean, noise, sigma, generated)
             for clean, noise, generated in streams]
    predicted = velocity(noisy, sigma * TIMESTEPS, batch.text, text_bias=batch.text_bias,
                         denoise_mask=batch.video_generated,
                         audio_denoise_mask=batch.audio_generated)
    video, audio = (sigma.new_zeros(batch.size) if clean is None or noise is None else
                    stream_losses(found, clean, noise, generated)
                    for found, (clean, noise, generated) in zip(predicted, streams, strict=True))
    return video, audio


def weighted(video: Tensor, audio: Tensor, batch: Batch, video_share: float = 0.85) -> Tensor:
    """One loss from both [B]: each clip's streams by the shares and by the batch's own weights.

    A stream that is alone counts in full, whatever its share.
    """
    if batch.video_weight is not None:
        video = video * batch.video_weight
    if batch.audio_weight is not None:
        audio = audio * batch.audio_weight
    if batch.video is None:
        return audio.mean()
    if batch.audio is None:
        return video.mean()
    return video_share * video.mean() + (1 - video_share) * audio.mean()
