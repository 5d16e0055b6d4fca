"""Full training: the weights of a recipe change, and the result is a whole checkpoint.

Weights that change are trained in the precision they are loaded in: fp32, or bf16 if memory asks for it, whose 8 bits
lose small changes. Frozen ones may be bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..files.safetensors_file import write_tensors
from .copy import train_copy
from .log import Log
from .loop import Settings, Trainer
from .network import Velocity
from .objective import Levels, Switches
from .recipes import RECIPES, fresh_fusion, prepare
from .run import Progress, Run, checkpoints
from .samples import Sampler, SampleSettings


@dataclass(frozen=True)
class FullJob:
    """Everything that full training depends on, but the model and the clips."""

    settings: Settings
    recipe: str
    fresh: bool = False  # begin the fusion attention anew
    levels: Levels = field(default_factory=Levels)
    switches: Switches = field(default_factory=Switches)
    batch: int = 1
    save_every: int = 500
    keep: int = 2
    blocks: int | None = None  # that keep no activations; None: all
    samples: SampleSettings = field(default_factory=SampleSettings)  # of both streams
    metadata: dict[str, str] = field(default_factory=dict)


def train_full(patcher, dataset, job: FullJob, file: Path, folder: Path, on_step: Callable[[Progress], None],
               log: Callable[[Path], Log] = lambda folder: Log(folder / "log.jsonl")) -> list[str]:
    """Train, with checkpoints in a folder, and write the whole model to a file when all steps are done.

    Returns what is worth saying. Goes on where the run in that folder stopped.
    """
    def train(copy) -> list[str]:
        network = copy.model.diffusion_model
        if job.fresh and not checkpoints(folder):
            fresh_fusion(network, job.settings.seed)
        trained = prepare(network, job.recipe)
        run = make_run(copy, dataset, job, folder, log)
        run.on_step = on_step
        said = [f"{trained / 1e9:.2f} billion weights are trained: {RECIPES[job.recipe].title}", *run.resume()]
        run.go()
        with run.trainer.averaged():
            write_model(network, file, {**job.metadata, "steps": str(run.trainer.step), "recipe": job.recipe})
        return said

    return train_copy(patcher, dataset, train)


def make_run(copy, dataset, job: FullJob, folder: Path, log: Callable[[Path], Log]) -> Run:
    network, device, streams = copy.model.diffusion_model, copy.load_device, RECIPES[job.recipe].streams
    dtype = copy.model.get_dtype_inference()

    def draw(_step: int, random: torch.Generator):
        batch = dataset.draw(job.batch, random, job.switches)
        return batch if streams == "both" else batch.only(streams)

    half = torch.bfloat16 if device.type == "cuda" and dtype == torch.float32 else None
    velocity = Velocity(network, dtype, len(network.blocks) if job.blocks is None else job.blocks)
    trainer = Trainer(network, job.settings, job.levels, draw, velocity, device=device, autocast=half)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(trainer, folder, save_every=job.save_every, keep=job.keep, metadata={"recipe": job.recipe},
              log=log(folder), sample_every=job.samples.every if streams == "both" else 0)
    if run.sample_every:
        run.on_sample = Sampler(velocity, dataset, job.samples, folder, device)
    return run


def write_model(network: nn.Module, file: Path, metadata: dict[str, str]) -> None:
    """A whole checkpoint under core's names, which 'Load Ovi Model' and 'Load Diffusion Model' read."""
    try:
        write_tensors(file, network.state_dict(), metadata)
    except OSError as error:
        raise RuntimeError(f"The trained model could not be written ({error}). Make room on the disk of "
                           f"{file.parent}, and start again: its weights are in the last checkpoint.") from error
