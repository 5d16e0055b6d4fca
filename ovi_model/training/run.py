"""A whole run: steps, checkpoints of which the last few are kept, what is told on the way, and how
it ends.

However it ends, what was learnt is on disk: after the last step, when it is cancelled, and when it
fails.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
from safetensors import SafetensorError, safe_open

from .log import Log
from .loop import StepResult, Trainer

CHECKPOINT = re.compile(r"checkpoint_(\d{8})\.safetensors$")
BASE_KEY = "base"
"""In a checkpoint's metadata: a fingerprint of the model that is trained."""
OTHER_BASE = ("{name} was begun on another model, or on this one in another precision or with "
              "other LoRA on it. Connect the model it was begun with, or begin another run beside "
              "it (resume off, or another name).")
OUT_OF_MEMORY = ("The device ran out of memory in step {step}. Lower one of these, the first ones "
                 "first: the batch; blocks without checkpointing; size or length of the clips in "
                 "the dataset; the rank. Weights in fp8 or int8 ('Load Ovi Model', weight_dtype) "
                 "take half of bf16's. {kept}")


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    result: StepResult
    steps: int
    seconds_left: float

    def __str__(self) -> str:
        r = self.result
        return (f"step {r.step + 1} of {self.steps}, loss {r.loss:.4f} (picture "
                f"{r.video_loss:.4f}, sound {r.audio_loss:.4f}), "
                f"{duration(self.seconds_left)} left")


def duration(seconds: float) -> str:
    """A time for people: 3 h 20 min, 5 min, 40 s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    if minutes >= 10:
        return f"{minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def checkpoints(folder: Path) -> list[Path]:
    """Those of a folder, newest first."""
    found = [path for path in folder.glob("checkpoint_*.safetensors")
             if CHECKPOINT.search(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def metadata_of(path: Path) -> dict[str, str]:
    """What a checkpoint says of itself; empty if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


class Run:
    """A Trainer with a folder."""

    def __init__(self, trainer: Trainer, folder: Path, *, save_every: int = 500, keep: int = 2,
                 sample_every: int = 0, metadata: Mapping[str, str] | None = None,
                 log: Log | None = None) -> None:
        """save_every: steps from checkpoint to checkpoint, 0 for none but the last. keep: how many
        stay."""
        folder.mkdir(parents=True, exist_ok=True)
        self.trainer, self.folder, self.metadata = trainer, folder, dict(metadata or {})
        self.save_every, self.keep, self.sample_every = save_every, max(1, keep), sample_every
        self.log = log or Log(folder / "log.jsonl")
        self.saved_step: int | None = None
        self.on_step: Callable[[Progress], None] = lambda _: None  # may raise to end the run
        self.on_save: Callable[[int], None] = lambda _: None
        self.on_sample: Callable[[int], None] = lambda _: None

    def resume(self) -> list[str]:
        """Go on from the newest checkpoint that can be read, if there is one; returns what is worth
        saying.

        ValueError if it is of another training or of another model.
        """
        said = []
        for path in checkpoints(self.folder):
            base = self.metadata.get(BASE_KEY)
            if metadata_of(path).get(BASE_KEY, base) != base:
                raise ValueError(OTHER_BASE.format(name=self.folder.name))
            try:
                self.trainer.load(path)
            except RuntimeError as error:  # damaged: the one before is as good
                said.append(str(error))
                continue
            step = self.saved_step = self.trainer.step
            said.append(f"goes on after step {step}" if step < self.trainer.settings.steps else
                        f"was trained for {step} steps before, so nothing was trained now: raise "
                        "steps to go on, or begin another run")
            break
        return said

    def go(self) -> None:
        """Train to the last step.

        Whatever ends it, a checkpoint of the last whole step is written first. RuntimeError, in
        words, if memory or the disk run out.
        """
        try:
            self._steps()
        except Exception as error:
            if not comfy.model_management.is_oom(error):
                raise
            failed = True  # what holds the memory is let go with the exception, below
        else:
            failed = False
        finally:
            self.trainer.optimiser.zero_grad(set_to_none=True)
            self.save()
            self.log.write()
        if failed:
            comfy.model_management.soft_empty_cache()
            step = self.trainer.step
            kept = f"What was learnt up to step {step} is kept." if step else ""
            raise RuntimeError(OUT_OF_MEMORY.format(step=step + 1, kept=kept).strip())

    def _steps(self) -> None:
        trainer, steps = self.trainer, self.trainer.settings.steps
        begun, first = time.monotonic(), trainer.step
        while trainer.step < steps:
            result = trainer.train_step()
            self.log.add(result)
            done = trainer.step - first
            if self.save_every and trainer.step % self.save_every == 0:
                self.save()
            if self.sample_every and trainer.step % self.sample_every == 0:
                with trainer.averaged():
                    self.on_sample(trainer.step)
            left = (time.monotonic() - begun) / done * (steps - trainer.step)
            self.on_step(Progress(result, steps, left))

    def save(self) -> None:
        """Write a checkpoint of the step reached, unless there is one or nothing was learnt, and
        forget the oldest.

        Not in the middle of a step, where Ctrl+C may have ended it: the checkpoint before is whole.
        """
        step = self.trainer.step
        if step in (0, self.saved_step) or self.trainer.updating:
            return
        path = self.folder / f"checkpoint_{step:08}.safetensors"
        try:
            self.trainer.save(path, self.metadata)
            self.saved_step = step
            with self.trainer.averaged():
                self.on_save(step)
        except OSError as error:
            raise RuntimeError(f"What was learnt up to step {step} could not be written ({error}). "
                               f"Make room on the disk of {self.folder}; the checkpoint before it "
                               "is kept.") from error
        # later ones are damaged
        older = [each for each in checkpoints(self.folder) if each.name < path.name]
        for old in older[self.keep - 1:]:
            old.unlink(missing_ok=True)
