"""Full training: the weights of a recipe change, and the result is a whole checkpoint.

Weights that change are trained in the precision they are loaded in: fp32, or bf16 if memory asks
for it, whose 8 bits lose small changes. Frozen ones may be bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..files.safetensors_file import write_tensors
from .cache import fingerprint
from .copy import train_copy
from .job import Job, MakeLog, plain_log
from .recipes import RECIPES, fresh_fusion, prepare
from .run import BASE_KEY, Progress


@dataclass(frozen=True, kw_only=True)
class FullJob(Job):
    """Everything that full training depends on, but the model and the clips."""

    recipe: str
    fresh: bool = False  # begin the fusion attention anew


def train_full(patcher, dataset, job: FullJob, file: Path, folder: Path,
               on_step: Callable[[Progress], None],
               log: MakeLog = plain_log) -> list[str]:
    """Train, with checkpoints in a folder, and write the whole model to a file when all steps are
    done.

    Returns what is worth saying. Goes on where the run in that folder stopped.
    """
    base = fingerprint(patcher)

    def train(copy) -> list[str]:
        network, recipe = copy.model.diffusion_model, RECIPES[job.recipe]
        if job.fresh:
            fresh_fusion(network, job.settings.seed)
        trained = prepare(network, job.recipe)
        metadata = {"recipe": job.recipe, BASE_KEY: base}
        run = job.run(copy, dataset, folder, metadata, log, recipe.streams)
        run.on_step = on_step
        said = [f"{trained / 1e9:.2f} billion weights are trained: {recipe.title}", *run.resume()]
        run.go()
        with run.trainer.averaged():
            said_of_it = {"steps": str(run.trainer.step), "recipe": job.recipe}
            write_model(network, file, {**job.metadata, **said_of_it})
        return said

    return train_copy(patcher, dataset, train)


def write_model(network: nn.Module, file: Path, metadata: dict[str, str]) -> None:
    """A whole checkpoint under core's names, which 'Load Ovi Model' and 'Load Diffusion Model'
    read."""
    try:
        write_tensors(file, network.state_dict(), metadata)
    except OSError as error:
        raise RuntimeError(f"The trained model could not be written ({error}). Make room on the "
                           f"disk of {file.parent}, and start again: its weights are in the last "
                           "checkpoint.") from error
