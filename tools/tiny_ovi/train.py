"""Fusion training of the tiny Ovi: both towers at once on the pool of clips, from nothing or from a checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import torch
from ovi_native.nodes.prompt import AUDIO_NEGATIVE, VIDEO_NEGATIVE
from ovi_native.ovi_model.training.attention import plain_attention
from ovi_native.ovi_model.training.log import Log
from ovi_native.ovi_model.training.loop import Settings, Trainer
from ovi_native.ovi_model.training.objective import Batch, Levels, Switches, join_texts
from safetensors.torch import load_file, save_file
from tiny.models import network

from .network import fresh_model
from .pool import Clips, Length, read_pool

TEXT_LENGTH = 48  # tokens that every caption is brought to, so that shapes are the same in all steps
NO_TEXT = ("", VIDEO_NEGATIVE, AUDIO_NEGATIVE)
"""What a clip without its caption is given: the texts that guidance moves away from."""
SWITCHES, LEVELS, DROPOUT = Switches(video_given=0.15, audio_given=0.25, first_frame=0.15), Levels(shift=3.0), 0.1


@dataclass
class Source:
    """Batches of the clips of one length."""

    clips: Clips
    texts: dict[str, torch.Tensor]
    batch: int

    def draw(self, _step: int, random: torch.Generator) -> Batch:
        index = torch.randint(len(self.clips.captions), (self.batch,), generator=random)
        dropped = torch.rand(self.batch, generator=random) < DROPOUT
        instead = torch.randint(len(NO_TEXT), (self.batch,), generator=random)
        texts = [self.texts[NO_TEXT[other] if drop else self.clips.captions[i]]
                 for i, drop, other in zip(index.tolist(), dropped.tolist(), instead.tolist(), strict=True)]
        text, bias = join_texts(texts, TEXT_LENGTH)
        video = self.clips.video[index].float()
        masks = SWITCHES.draw(self.batch, video.shape[2], random)
        return Batch(video, self.clips.audio[index].float(), text, bias, *masks)


def encode_captions(folder: Path, captions: set[str]) -> dict[str, torch.Tensor]:
    """Each caption through the frozen encoder; kept beside the pool."""
    from ovi_native.ovi_model.text.umt5 import load_text_encoder

    from .text import encode

    path = folder / "texts.safetensors"
    known = load_file(path) if path.exists() else {}
    known = {"" if name == "none" else name: value for name, value in known.items()}
    missing = sorted((captions | set(NO_TEXT)) - set(known))
    if missing:
        clip = load_text_encoder(str(folder / "umt5.safetensors"))
        with torch.no_grad():
            known |= encode(clip, missing)
        save_file({name or "none": value.contiguous() for name, value in known.items()}, path)
    return known


def train(folder: Path, length: Length, settings: Settings, batch: int, until: float | None = None, *,
          save_every: int = 200, start: dict[str, torch.Tensor] | None = None, name: str = "fusion",
          compiled: bool = True) -> Trainer:
    """Train and keep `folder/{name}.safetensors`; goes on from it if it is there, else from `start`, else afresh.

    until: the time (as of `time.time()`) to stop at. start: weights by the network's names.
    """
    clips = read_pool(folder / "pool", length)
    texts = encode_captions(folder, set(clips.captions))
    net = network(fresh_model(settings.seed)).requires_grad_(True)
    if start is not None:
        net.load_state_dict(start, strict=False)
    comfy.model_management.in_training = True  # core then takes operations that have gradients
    call = torch.compile(net) if compiled else net

    def velocity(x, timestep, text, **conditions):
        options = {"optimized_attention_override": plain_attention}
        return call(x, timestep, text, options, **conditions)

    trainer = Trainer(net, settings, LEVELS, Source(clips, texts, batch).draw, velocity)
    checkpoint = folder / f"{name}.safetensors"
    if checkpoint.exists():
        trainer.load(checkpoint)
    log = Log(folder / f"{name}.jsonl", every=100)
    while trainer.step < settings.steps and (until is None or time.time() < until):
        if line := log.add(trainer.train_step()):
            print(line, flush=True)
        if trainer.step % save_every == 0:
            trainer.save(checkpoint)
    trainer.save(checkpoint)
    return trainer

