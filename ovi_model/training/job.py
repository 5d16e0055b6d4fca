"""What every training is told, whatever weights it changes, and the run that this makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .log import Log
from .loop import Settings, Trainer
from .network import Velocity
from .objective import Levels, Switches
from .run import Run
from .samples import Sampler, SampleSettings

MakeLog = Callable[[Path], Log]


def plain_log(folder: Path) -> Log:
    """The log of a run in its folder."""
    return Log(folder / "log.jsonl")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a training depends on, but the model, the clips and which weights change."""

    settings: Settings
    levels: Levels = field(default_factory=Levels)
    switches: Switches = field(default_factory=Switches)
    batch: int = 1
    save_every: int = 500
    keep: int = 2
    blocks: int | None = None  # that keep no activations; None: all
    samples: SampleSettings = field(default_factory=SampleSettings)  # of both streams
    metadata: dict[str, str] = field(default_factory=dict)  # of the result, beside its settings

    def run(self, copy, dataset, folder: Path, metadata: Mapping[str, str],
            log: MakeLog = plain_log, streams: str = "both",
            parameters: Mapping[str, torch.nn.Parameter] | None = None) -> Run:
        """The run of this job in a folder, on a MODEL's copy that is loaded.

        metadata: what its checkpoints say, and must say to be gone on with. streams: "both" or the
        one that is there. parameters: what is trained, if not what of the network asks for a
        gradient.
        """
        network, device = copy.model.diffusion_model, copy.load_device
        dtype = copy.model.get_dtype_inference()
        blocks = len(network.blocks) if self.blocks is None else self.blocks
        velocity = Velocity(network, dtype, blocks)

        def draw(_step: int, random: torch.Generator):
            batch = dataset.draw(self.batch, random, self.switches)
            return batch if streams == "both" else batch.only(streams)

        whole = parameters is None and device.type == "cuda" and dtype == torch.float32
        trainer = Trainer(network, self.settings, self.levels, draw, velocity,
                          parameters=parameters, device=device,
                          autocast=torch.bfloat16 if whole else None)
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(trainer, folder, save_every=self.save_every, keep=self.keep, metadata=metadata,
                  log=log(folder), sample_every=self.samples.every if streams == "both" else 0)
        if run.sample_every:
            run.on_sample = Sampler(velocity, dataset, self.samples, folder, device)
        return run
