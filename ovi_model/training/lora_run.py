"""Training a LoRA on a MODEL, as the node and the command line do it.

A copy of the MODEL is trained beside: loaded anew by ComfyUI from the same files, with the same
patches on it, and let go at the end. So the MODEL itself is never touched, whatever happens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..files.names import printable
from .cache import fingerprint
from .copy import train_copy
from .job import Job, MakeLog, plain_log
from .lora import Lora, LoraSettings
from .run import BASE_KEY, Progress, checkpoints, metadata_of

NAME = re.compile(r"[\w][\w .()+-]{0,99}$")
LONGEST_NAME = 200  # bytes: disks take 255, with the endings


@dataclass(frozen=True, kw_only=True)
class LoraJob(Job):
    """Everything that a LoRA's training depends on, but the model and the clips."""

    lora: LoraSettings = field(default_factory=LoraSettings)


@dataclass(frozen=True)
class Place:
    """Where a run writes: its LoRA, and the folder of its checkpoints and its log."""

    lora: Path
    folder: Path

    @property
    def begun(self) -> bool:
        return bool(checkpoints(self.folder))

    @property
    def free(self) -> bool:
        """Whether nothing was learnt there; a run that failed before may have left its folder."""
        return not self.lora.exists() and not self.begun


def find_place(name: str, loras: Path, runs: Path, resume: bool) -> Place:
    """The place of a run by the name a user gave it; nothing that is already there is ever
    overwritten by another run.

    resume: the last run of that name if there is one. A new run gets the next free number.
    ValueError for a name that is no plain file name.
    """
    if not NAME.match(name) or len(name.encode()) > LONGEST_NAME or name.endswith((" ", ".")):
        raise ValueError("The name of a LoRA must be a plain file name of at most 100 letters, "
                         "digits, spaces and _-+.(), without folders, but got "
                         f"{printable(name[:120])!r}.")
    name = name.removesuffix(".safetensors")
    last, number = None, 1
    while True:
        stem = name if number == 1 else f"{name}_{number}"
        place = Place(loras / f"{stem}.safetensors", runs / stem)
        if place.free:
            return last if resume and last is not None else place
        last, number = place if place.begun else last, number + 1


def check_resumable(job: LoraJob, place: Place) -> None:
    """ValueError in words if the run there is one with other adapters."""
    found = checkpoints(place.folder)
    said = metadata_of(found[0]) if found else {}
    for key, value in job.lora.metadata().items():
        if said.get(key, value) != value:
            raise ValueError(f"{place.lora.stem} was begun with {key} {said[key]}, and cannot go "
                             f"on with {key} {value}. Set {key} as it was, or switch resume off to "
                             "begin another beside it.")


@dataclass(frozen=True)
class Outcome:
    """What a run came to, as far as it came."""

    place: Place
    step: int
    steps: int
    said: list[str]
    parameters: int
    layers: int
    skipped: int

    @property
    def lines(self) -> list[str]:
        """For the user."""
        lines = [f"{self.place.lora.name}: {self.layers} layers, {self.parameters:,} numbers, "
                 f"trained {self.step} of {self.steps} steps"]
        if self.skipped:
            lines.append(f"{self.skipped} steps were skipped, as their loss was not finite.")
        return lines + self.said


def train_lora(patcher, dataset, job: LoraJob, place: Place,
               on_step: Callable[[Progress], None] = lambda _: None,
               log: MakeLog = plain_log) -> Outcome:
    """Train, and write the LoRA whenever a checkpoint is written; goes on where the run at that
    place stopped.

    on_step may raise to end the run: a checkpoint and the LoRA so far are written first. Raises
    ValueError and RuntimeError in words.
    """
    check_resumable(job, place)
    base = fingerprint(patcher)

    def train(copy) -> Outcome:
        return _train(copy, dataset, job, place, on_step, log, base)

    return train_copy(patcher, dataset, train)


def _train(copy, dataset, job: LoraJob, place: Place, on_step, log: MakeLog, base: str) -> Outcome:
    network, dtype = copy.model.diffusion_model, copy.model.get_dtype_inference()
    with Lora(network, job.lora, job.settings.seed, copy.load_device) as lora:
        run = job.run(copy, dataset, place.folder, {**job.lora.metadata(), BASE_KEY: base}, log,
                      parameters=lora.parameters)
        trainer = run.trainer

        def write(step: int) -> None:
            half = dtype if dtype in (torch.bfloat16, torch.float32) else torch.bfloat16
            lora.save(place.lora, {**job.metadata, "steps": str(step)}, half)

        run.on_step, run.on_save = on_step, write
        said = run.resume()
        run.go()
        if not place.lora.exists():  # finished before, and taken away since
            with trainer.averaged():
                write(trainer.step)
        numbers = sum(p.numel() for p in lora.parameters.values())
        return Outcome(place, trainer.step, job.settings.steps, said, numbers, len(lora.layers),
                       trainer.skipped)
