"""The optimisation itself: learning rates, gradient norm, averaged weights, and checkpoints that
resume bit for bit.

A step is a function of the settings, the seed and its number alone: what is random in it is drawn
from a generator seeded with both. So a checkpoint holds the weights, the optimiser's state and the
number of the step, and a run that was stopped anywhere goes on as if it had not been.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..files.safetensors_file import write_tensors
from .objective import Batch, Levels, losses, weighted

MOST_SKIPPED = 20  # steps in a row without a finite loss, after which a run is lost


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
    accumulate: int = 1  # batches whose gradients make one step

    def __post_init__(self) -> None:
        limits = (("steps", 1, math.inf), ("learning_rate", 0, 1), ("audio_learning_rate", 0, 1),
                  ("warmup", 0, math.inf), ("tail", 0, math.inf), ("weight_decay", 0, 1),
                  ("average", 0, 0.999999), ("video_share", 0, 1), ("accumulate", 1, math.inf))
        for name, least, most in limits:
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                limit = f"from {least} to {most}" if most < math.inf else f"at least {least}"
                raise ValueError(f"{name} of a training must be {limit}, but got {value}.")

    def factor(self, step: int) -> float:
        """Of the learning rate at a step, counted from 0."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        fall = min(1.0, (self.steps - step) / self.tail) if self.tail else 1.0
        return max(0.0, rise * fall)


@dataclass(frozen=True)
class StepResult:
    """What one step measured: means over its clips."""

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
    """Trains the parameters of a network that ask for a gradient, or the ones it is given."""

    def __init__(self, network: nn.Module, settings: Settings, levels: Levels,
                 draw: Callable[[int, torch.Generator], Batch], velocity: Callable | None = None, *,
                 parameters: Mapping[str, nn.Parameter] | None = None,
                 device: torch.device | str = "cpu",
                 autocast: torch.dtype | None = None) -> None:
        """draw: the batch of a step, a function of the step's number and generator. velocity: the
        network as it is to be called (compiled, say); the network itself by default. parameters:
        what is trained, if not what of the network asks for a gradient. device: where batches go.
        autocast: the dtype products are made in; None: that of the weights."""
        self.network, self.settings, self.levels, self.draw = network, settings, levels, draw
        self.velocity = velocity or network
        self.device, self.autocast = torch.device(device), autocast
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.updating = False  # in the middle of changing what a checkpoint holds
        self.parameters = dict(parameters) if parameters is not None else {
            name: p for name, p in network.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("Nothing is to be trained: no parameter of the model asks for a "
                             "gradient.")
        self.optimiser = torch.optim.AdamW(self._groups(), betas=settings.betas, fused=True)
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()
                         if settings.average}

    def _groups(self) -> list[dict]:
        s = self.settings
        audio_rate = s.learning_rate if s.audio_learning_rate is None else s.audio_learning_rate
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, parameter in self.parameters.items():
            kind = name.startswith("audio_model."), parameter.ndim > 1
            groups.setdefault(kind, []).append(parameter)
        return [{"params": parameters, "lr": audio_rate if audio else s.learning_rate,
                 "peak": audio_rate if audio else s.learning_rate,
                 "weight_decay": s.weight_decay if matrix else 0.0}
                for (audio, matrix), parameters in groups.items()]

    def random(self, step: int) -> torch.Generator:
        """The generator of a step."""
        return torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)

    def train_step(self) -> StepResult:
        """One step of the optimiser. A step whose loss is not finite changes nothing, and is
        counted.

        Raises RuntimeError once MOST_SKIPPED in a row were not.
        """
        s, random = self.settings, self.random(self.step)
        self.optimiser.zero_grad(set_to_none=True)
        parts = [self._backward(random) for _ in range(s.accumulate)]
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), s.largest_norm)
        loss, sigma, video, audio = (torch.cat(column) for column in zip(*parts, strict=True))
        result = StepResult(self.step, float(loss.mean()), float(video.mean()), float(audio.mean()),
                            float(norm),
                            sigma, video, audio)
        self.updating = True
        if result.finite:
            for group in self.optimiser.param_groups:
                group["lr"] = group["peak"] * s.factor(self.step)
            self.optimiser.step()
            self._average()
        self.step += 1
        self.updating = False
        self.optimiser.zero_grad(set_to_none=True)
        self._count(result)
        return result

    def _backward(self, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Add one batch's share to the gradient; returns its loss [1], and sigma and both streams'
        losses [B]."""
        batch = self.draw(self.step, random)
        sigma = self.levels.draw(batch.size, random)
        noises = [None if x is None else torch.randn(x.shape, generator=random).to(self.device)
                  for x in (batch.video, batch.audio)]
        batch, on_device = batch.to(self.device), sigma.to(self.device)
        with torch.autocast(self.device.type, self.autocast or torch.bfloat16,
                            enabled=self.autocast is not None):
            video, audio = losses(self.velocity, batch, on_device, *noises)
        loss = weighted(video, audio, batch, self.settings.video_share)
        (loss / self.settings.accumulate).backward()
        return loss.detach()[None].cpu(), sigma, video.detach().cpu(), audio.detach().cpu()

    def _count(self, result: StepResult) -> None:
        self.skipped += not result.finite
        self.skipped_in_a_row = 0 if result.finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise RuntimeError(
                f"The loss was not finite in {MOST_SKIPPED} steps in a row, the last of them step "
                f"{result.step + 1}: training has come apart. Go on from an earlier checkpoint "
                "with a lower learning rate, or look for a clip whose latents are not finite.")

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, where they are kept."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, average in self.averages.items():
            parameter = self.parameters[name]
            parameter.data, self.averages[name] = average, parameter.data

    @torch.no_grad()
    def _average(self) -> None:
        if self.averages:
            decay = min(self.settings.average, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.averages.values()),
                                 [p.detach() for p in self.parameters.values()],
                                 1 - decay)

    # checkpoints

    def save(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write everything that the next step depends on; the file is there whole or not at all.

        OSError if the disk does not take it. metadata: what the file says of itself, beside its
        step.
        """
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"weight.{name}"] = parameter.detach()
            for key, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        tensors |= {f"average.{name}": value for name, value in self.averages.items()}
        write_tensors(path, tensors, {**(metadata or {}), "step": str(self.step)})

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. ValueError if it is not of this training, RuntimeError if it is
        damaged."""
        try:
            with safe_open(path, "pt") as file:
                self._check(file, path.name)
                self._read(file, set(file.keys()))
                self.step = int(file.metadata()["step"])
        except SafetensorError as error:
            raise RuntimeError(f"{path.name} is damaged or no checkpoint ({error}). Delete it, and "
                               "go on from an earlier one.") from error

    def _check(self, file, name: str) -> None:
        names = set(file.keys())
        shapes = {key: tuple(file.get_slice(f"weight.{key}").get_shape()) for key in self.parameters
                  if f"weight.{key}" in names}
        wrong = [key for key, parameter in self.parameters.items()
                 if shapes.get(key) != tuple(parameter.shape)]
        if wrong or "step" not in (file.metadata() or {}):
            of = "has another shape" if wrong and wrong[0] in shapes else "is missing"
            total = len(self.parameters)
            which = f": {wrong[0]} {of}, one of {len(wrong)} of {total} tensors" if wrong else ""
            raise ValueError(f"{name} is no checkpoint of this training{which}. Choose the "
                             "settings that it was trained with, or begin anew.")

    @torch.no_grad()
    def _read(self, file, names: set[str]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(file.get_tensor(f"weight.{name}"))
            state = {key: file.get_tensor(f"{key}.{name}")
                     for key in ("step", "exp_avg", "exp_avg_sq")
                     if f"{key}.{name}" in names}
            self.optimiser.state[parameter] = {key: value.to(parameter.device)
                                               for key, value in state.items()}
            if name in self.averages:
                self.averages[name].copy_(file.get_tensor(f"average.{name}"))


def trainable(network: nn.Module, names: Iterable[str]) -> int:
    """Let exactly these parameters ask for a gradient; returns how many numbers they are."""
    wanted, count = set(names), 0
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in wanted)
        count += parameter.numel() if name in wanted else 0
    return count
