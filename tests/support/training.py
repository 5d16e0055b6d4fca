"""A data set in memory for training the tiny random models, and networks that learn on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ovi_native.ovi_model.training.objective import Batch, Switches, join_texts
from tiny.inputs import noise
from tiny.sizes import TINY


@dataclass
class MemoryClips:
    """A few random clips with texts: the interface of 'Ovi Dataset'."""

    clips: int = 4
    frames: int = 2
    latents: int = 10
    width: int = TINY.text

    def __len__(self) -> int:
        return self.clips

    @property
    def buckets(self) -> list:
        return [(self.frames, 4, 4, self.latents)]

    def draw(self, batch: int, generator: torch.Generator, switches: Switches | None = None,
             caption_dropout: float | None = None) -> Batch:
        index = torch.randint(self.clips, (batch,), generator=generator)
        video = noise(self.clips, 48, self.frames, 4, 4, seed=1)[index]
        audio = noise(self.clips, 20, self.latents, seed=2)[index]
        text, bias = join_texts([noise(3 + i, self.width, seed=10 + i) for i in index.tolist()], 12)
        if caption_dropout == 1:
            text, bias = join_texts([torch.zeros(1, self.width)] * batch)
        return Batch(video, audio, text, bias, *(switches or Switches()).draw(batch, self.frames, generator))

    def of_step(self, batch: int = 2):
        """As a Trainer draws."""
        return lambda _step, random: self.draw(batch, random)
