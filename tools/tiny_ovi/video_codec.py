"""Training of the tiny Ovi's video codec: a narrow TAEHV that gives and takes the latents of `latents.Codec`.

The encoder is written down, not trained: it is the linear codec but for a few hundredths (`encoder_start`). The decoder
begins as the linear codec too (`decoder_start`) and learns pictures from latents with a little noise on them, so that
it forgives a diffusion model's errors and knows, unlike the linear codec, that edges are crisp. What both exchange are
raw latents: Wan2.2's fixed normalisation, which the model applies, turns them into whitened ones.

A step's batch depends on the seed and the step alone, so a run that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import comfy.latent_formats
import numpy as np
import torch
from ovi_native.tiny_world.picture import FPS, render_frames
from ovi_native.tiny_world.scenes import draw_scene
from safetensors.torch import load_file, save_file

from . import decoder_start, encoder_start
from .latents import SIZE, Codec, load_codec
from .taehv import Narrow
from .zero_channels import cut, expand, pack

STATE = ("step", "exp_avg", "exp_avg_sq")  # of the optimiser
PACKED, EXPANDED = "tiny_ovi_video_vae.safetensors", "tiny_ovi_taew2_2.safetensors"
COARSE_SHAPES = ((64, 17, 4), (64, 33, 2), (96, 9, 3), (128, 9, 2))  # side of the frames, their number, clips
FINE_SHAPES = ((64, 13, 2), (64, 21, 1), (64, 9, 2), (64, 9, 2))
SHARES = (0.65, 0.15, 0.12, 0.08)
LONGEST_START = 60  # frames of a scene before a crop
NOISE = 0.15  # at most, on whitened latents
MOVING, MOVING_WEIGHT, EDGE_WEIGHT = 0.02, 3.0, 1.0
COARSE, FINE = (400, 5e-5), (900, 1.2e-4)  # steps, learning rate
STEPS, WARMUP, LAST_RATE = COARSE[0] + FINE[0], 50, 0.03
AVERAGE = 0.995  # of the weights, step by step
START_CLIPS, START_FRAMES = 100, 17  # that the decoder's first weights are told from
WAN = comfy.latent_formats.Wan22()


def rate(step: int) -> float:
    """Learning rate of a step: in each phase a short rise, then half a cosine down."""
    step, (steps, highest) = (step, COARSE) if step < COARSE[0] else (step - COARSE[0], FINE)
    fall = LAST_RATE + (1 - LAST_RATE) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    return highest * fall * min(1.0, (step + 1) / WARMUP)


def draw_clips(random: np.random.Generator, codec: Codec, size: int, frames: int, clips: int, held_out: bool = False
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops in time of random scenes: frames [B, 3, T, S, S] in 0..1 and whitened latents [B, 48, T', S / 16, S / 16].

    One in eight stands still.
    """
    pictures, latents = [], []
    for _ in range(clips):
        first = int(random.integers(LONGEST_START + 1)) * int(random.random() < 0.8)
        scene = draw_scene(random, (first + frames) / FPS, held_out)
        clip = render_frames(scene, first + frames, size)[first:]
        if random.random() < 1 / 8:
            clip = np.repeat(clip[:1], frames, 0)
        pictures.append(torch.from_numpy(clip).movedim(-1, 0))
        latents.append(codec.encode_video(clip))
    return torch.stack(pictures).float() / 255, torch.stack(latents)


def picture_loss(found: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Absolute error, more where things move, and of the differences between neighbours, which keeps edges crisp."""
    moving = ((frames - frames.mean(2, keepdim=True)).abs().amax(1, keepdim=True) > MOVING).float()
    weight = 1 + (MOVING_WEIGHT - 1) * moving
    error = found - frames
    edges = sum((error.diff(dim=axis).abs() * weight.narrow(axis, 1, weight.shape[axis] - 1)).mean() for axis in (3, 4))
    return (error.abs() * weight).mean() + EDGE_WEIGHT * edges + 2 * (error.square() * weight).mean()


class Training:
    """The decoder in training: weights, optimiser, average; saved and gone on with."""

    def __init__(self, folder: Path, codec: Codec, seed: int = 0, start: Path | None = None) -> None:
        """start: a packed codec whose decoder the fine phase begins with, unless `folder` holds a checkpoint."""
        self.path, self.codec, self.seed, self.step = folder / "decoder.safetensors", codec, seed, 0
        torch.manual_seed(seed)
        self.network = Narrow()
        frames, z = draw_clips(np.random.default_rng(seed), codec, SIZE, START_FRAMES, START_CLIPS)
        self.clips = decoder_start.Clips(frames, z, WAN.process_out)
        decoder_start.start_coarse(self.network, self.clips)
        self.weights, self.free = dict(self.network.decoder.named_parameters()), decoder_start.trainable(self.network)
        self.average = {name: value.detach().clone() for name, value in self.weights.items()}
        self._restart()
        if self.path.exists():
            self._resume()
        elif start is not None:
            self._begin_with(expand({name: value.float() for name, value in load_file(start).items()}))

    def _begin_with(self, full: dict[str, torch.Tensor]) -> None:
        shapes = {f"decoder.{name}": value.shape for name, value in self.weights.items()}
        for name, value in cut(full, shapes).items():
            self.weights[name.removeprefix("decoder.")].data.copy_(value)
        self.average = {name: value.detach().clone() for name, value in self.weights.items()}
        self.step = COARSE[0] + 1

    def train(self, until: float) -> None:
        """Until all steps are done or the clock (`time.time()`) says so."""
        losses: list[float] = []
        begun = time.time()
        while self.step < STEPS and time.time() < until:
            losses.append(self.train_step())
            if self.step % 25 == 0:
                self._log(losses, time.time() - begun)
                losses = []
            if self.step % 100 == 0:
                self.save()
        self.save()

    def _restart(self) -> None:
        self.optimiser = torch.optim.Adam(self.weights.values(), betas=(0.9, 0.99))

    def save(self) -> None:
        tensors = {"step": torch.tensor(self.step)}
        for name, value in self.weights.items():
            state = self.optimiser.state[value]
            tensors |= {f"weight.{name}": value.detach(), f"average.{name}": self.average[name]}
            tensors |= {f"{part}.{name}": state[part] for part in STATE if part in state}
        save_file(tensors, self.path.with_suffix(".part"))
        os.replace(self.path.with_suffix(".part"), self.path)

    def _resume(self) -> None:
        tensors = load_file(self.path)
        self.step = int(tensors["step"])
        for name, value in self.weights.items():
            value.data.copy_(tensors[f"weight.{name}"])
            self.average[name] = tensors[f"average.{name}"]
            if f"exp_avg.{name}" in tensors:
                self.optimiser.state[value] = {part: tensors[f"{part}.{name}"] for part in STATE}

    def _log(self, losses: list[float], seconds: float) -> None:
        line = {"step": self.step, "loss": round(sum(losses) / len(losses), 5), "seconds": round(seconds, 1)}
        with (self.path.parent / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def train_step(self) -> float:
        """One step; its loss."""
        coarse = self.step < COARSE[0]
        if self.step == COARSE[0]:
            self.begin_fine()
        random, shapes = np.random.default_rng((self.seed, self.step)), COARSE_SHAPES if coarse else FINE_SHAPES
        frames, latents = draw_clips(random, self.codec, *shapes[random.choice(len(SHARES), p=SHARES)])
        noise = torch.Generator().manual_seed(int(random.integers(2**31)))
        strength = NOISE * torch.rand((len(latents), 1, 1, 1, 1), generator=noise)
        noisy = latents + strength * torch.randn(latents.shape, generator=noise)
        loss = (self._coarse_loss if coarse else self._fine_loss)(WAN.process_out(noisy), frames)
        loss.backward()
        for name, value in self.weights.items():
            if value.grad is not None:
                value.grad *= self.free[name]
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = rate(self.step)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        for name, value in self.weights.items():
            self.average[name].lerp_(value.detach(), 1 - min(AVERAGE, self.step / (self.step + 10)))
        return loss.item()

    def begin_fine(self) -> None:
        """Levels 2 and 3 begin from what the average of levels 0 and 1 gives."""
        for name, value in self.weights.items():
            value.data.copy_(self.average[name])
        decoder_start.start_fine(self.network, self.clips)
        self.average = {name: value.detach().clone() for name, value in self.weights.items()}
        self._restart()

    def _coarse_loss(self, raw: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        return decoder_start.coarse_loss(self.network, self.clips.parts, raw, decoder_start.pixels(frames))

    def _fine_loss(self, raw: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        return picture_loss(self.network.decode(raw), frames)


def train(folder: Path, minutes: float, seed: int = 0, start: Path | None = None) -> bool:
    """Go on with the codec in `folder` / vcodec for so many minutes; whether it is done. Its files are then written.

    folder: with `bases.safetensors`, the linear codec. start: see `Training`.
    """
    until, codec, own = time.time() + 60 * minutes, load_codec(folder / "bases.safetensors"), folder / "vcodec"
    own.mkdir(exist_ok=True)
    training = Training(own, codec, seed, start)
    training.train(until)
    write(training, own)
    return training.step == STEPS


def write(training: Training, folder: Path) -> None:
    """The packed and the expanded file, float16 both, of the averaged weights so far."""
    if training.step < COARSE[0]:
        training.begin_fine()
    encoder_start.start(training.network, training.codec, WAN)
    encoder = {f"encoder.{name}": value for name, value in training.network.encoder.state_dict().items()}
    full = expand({name: value.detach().half() for name, value in encoder.items()}
                  | {f"decoder.{name}": value.half() for name, value in training.average.items()})
    save_file(full, folder / EXPANDED)
    save_file(pack(full), folder / PACKED, {"steps": str(training.step)})
