"""The optimisation itself: learning rates, gradient norm, averaged weights, and checkpoints that resume bit for bit.

A step is a function of the settings, the seed and its number alone: what is random in it is drawn from a generator
seeded with both. So a checkpoint holds the weights, the optimiser's state and the number of the step, and a run that
was stopped anywhere goes on as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .objective import Batch, Levels, losses, weighted


@dataclass(frozen=True)
class Settings:
    """How weights are optimised."""

    steps: int
    learning_rate: float = 1e-4
    audio_learning_rate: float | None = None  # of the audio tower; None: the same
    warmup: int = 100  # steps of rising learning rate
    tail: int = 0  # last steps, in which it falls linearly to 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    largest_norm: float = 1.0  # of the gradient
    average: float = 0.0  # decay of the averaged weights a step; 0: none
    video_share: float = 0.85  # of the loss; the rest is sound's
    seed: int = 0

    def factor(self, step: int) -> float:
        """Of the learning rate at a step, counted from 0."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        fall = min(1.0, (self.steps - step) / self.tail) if self.tail else 1.0
        return max(0.0, rise * fall)


@dataclass(frozen=True)
class StepResult:
    """What one step measured: means over its batch."""

    step: int
    loss: float
    video_loss: float
    audio_loss: float
    norm: float
    sigma: Tensor  # [B]
    video_losses: Tensor  # [B]
    audio_losses: Tensor  # [B]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Trainer:
    """Trains the parameters of a network that ask for a gradient."""

    def __init__(self, network: nn.Module, settings: Settings, levels: Levels,
                 draw: Callable[[int, torch.Generator], Batch], velocity: Callable | None = None) -> None:
        """draw: the batch of a step, a function of the step's number and generator. velocity: the network as it is to
        be called (compiled, say); the network itself by default."""
        self.network, self.settings, self.levels, self.draw = network, settings, levels, draw
        self.velocity = velocity or network
        self.step = 0
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("Nothing is to be trained: no parameter of the model asks for a gradient.")
        self.optimiser = torch.optim.AdamW(self._groups(), betas=settings.betas, fused=True)
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()} if settings.average else {}

    def _groups(self) -> list[dict]:
        s = self.settings
        audio_rate = s.learning_rate if s.audio_learning_rate is None else s.audio_learning_rate
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, parameter in self.parameters.items():
            groups.setdefault((name.startswith("audio_model."), parameter.ndim > 1), []).append(parameter)
        return [{"params": parameters, "lr": audio_rate if audio else s.learning_rate,
                 "peak": audio_rate if audio else s.learning_rate, "weight_decay": s.weight_decay if matrix else 0.0}
                for (audio, matrix), parameters in groups.items()]

    def random(self, step: int) -> torch.Generator:
        """The generator of a step."""
        return torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)

    def train_step(self) -> StepResult:
        """One step of the optimiser. A step whose loss is not finite changes nothing."""
        s, random = self.settings, self.random(self.step)
        batch = self.draw(self.step, random)
        sigma = self.levels.draw(len(batch.video), random)
        video_noise = torch.randn(batch.video.shape, generator=random)
        audio_noise = torch.randn(batch.audio.shape, generator=random)
        self.optimiser.zero_grad(set_to_none=True)
        video, audio = losses(self.velocity, batch, sigma, video_noise, audio_noise)
        loss = weighted(video, audio, batch, s.video_share)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), s.largest_norm)
        result = StepResult(self.step, float(loss.detach()), float(video.detach().mean()),
                            float(audio.detach().mean()), float(norm), sigma, video.detach(), audio.detach())
        if result.finite:
            for group in self.optimiser.param_groups:
                group["lr"] = group["peak"] * s.factor(self.step)
            self.optimiser.step()
            self._average()
        self.step += 1
        return result

    @torch.no_grad()
    def _average(self) -> None:
        if self.averages:
            decay = min(self.settings.average, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.averages.values()), [p.detach() for p in self.parameters.values()],
                                 1 - decay)

    # checkpoints

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on; the file is there whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"weight.{name}"] = parameter.detach()
            for key, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        tensors |= {f"average.{name}": value for name, value in self.averages.items()}
        part = path.with_name(path.name + ".part")
        save_file({name: value.contiguous() for name, value in tensors.items()}, part, {"step": str(self.step)})
        part.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. ValueError if it is not of this training."""
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            missing = [name for name in self.parameters if f"weight.{name}" not in names]
            if missing:
                raise ValueError(f"{path.name} is no checkpoint of this training: {len(missing)} of "
                                 f"{len(self.parameters)} tensors are missing, {missing[0]} among them.")
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(file.get_tensor(f"weight.{name}"))
                    self.optimiser.state[parameter] = {key: file.get_tensor(f"{key}.{name}")
                                                       for key in ("step", "exp_avg", "exp_avg_sq")
                                                       if f"{key}.{name}" in names}
                    if name in self.averages:
                        self.averages[name].copy_(file.get_tensor(f"average.{name}"))
            self.step = int(file.metadata()["step"])


def trainable(network: nn.Module, names: Iterable[str]) -> int:
    """Let exactly these parameters ask for a gradient; returns how many numbers they are."""
    wanted, count = set(names), 0
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in wanted)
        count += parameter.numel() if name in wanted else 0
    return count
