"""What a training measured: one JSON object a line, and TensorBoard's event files if they are asked
for."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from .loop import StepResult

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Bounds of the noise levels that losses are told apart by."""
NO_TENSORBOARD = ("TensorBoard logs were asked for, but the package tensorboard is not installed: "
                  "pip install tensorboard, or leave them out. The same figures are in the .jsonl "
                  "file.")


def by_level(values: Tensor, sigma: Tensor) -> list[float | None]:
    """Means of losses [n] by the noise level [n] that they were drawn at; None where none was."""
    chosen = [values[(sigma >= low) & (sigma < high)] for low, high in pairwise(LEVELS)]
    return [round(float(part.mean()), 4) if len(part) else None for part in chosen]


class Log:
    """Appends a line for each `every` steps."""

    def __init__(self, path: Path, every: int = 10, tensorboard: Path | None = None) -> None:
        """tensorboard: the folder of its event files. RuntimeError if the package for it is
        missing."""
        self.path, self.every = path, every
        self.results: list[StepResult] = []
        self.begun = time.monotonic()
        self.writer = None if tensorboard is None else event_writer(tensorboard)

    def add(self, result: StepResult) -> dict | None:
        """Take a step in; returns the line if it completed one."""
        self.results.append(result)
        return self.write() if len(self.results) >= self.every else None

    def write(self) -> dict | None:
        """Write what has come together so far."""
        if not self.results:
            return None
        line = summary(self.results, time.monotonic() - self.begun)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise RuntimeError(f"The log {self.path} could not be written ({error}). Make room on "
                               "its disk, and go on.") from error
        if self.writer is not None:
            for name, value in flat(line).items():
                self.writer.add_scalar(name, value, line["step"])
            self.writer.flush()
        self.results, self.begun = [], time.monotonic()
        return line


def summary(results: list[StepResult], seconds: float) -> dict:
    """One line of several steps: means over those with a finite loss."""
    finite = [result for result in results if result.finite]
    sigma = torch.cat([result.sigma for result in results])
    speed = len(sigma) / max(seconds, 1e-6)
    line: dict = {"step": results[-1].step + 1, "clips_per_s": round(speed, 2)}
    if len(finite) < len(results):
        line["skipped"] = len(results) - len(finite)
    if finite:
        sigma = torch.cat([result.sigma for result in finite])
        line |= {name: round(math.fsum(getattr(result, name) for result in finite) / len(finite), 4)
                 for name in ("loss", "norm")}
        for name in ("video", "audio"):
            values = torch.cat([getattr(result, f"{name}_losses") for result in finite])
            line[name] = round(float(values.mean()), 4)
            line[f"{name}_levels"] = by_level(values, sigma)
    return line


def flat(line: dict) -> dict[str, float]:
    """The numbers of a line, each by its name."""
    out: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, list):
            out |= {f"{name}/{LEVELS[i]:g}": part for i, part in enumerate(value)
                    if part is not None}
        elif name != "step":
            out[name] = value
    return out


def event_writer(folder: Path):
    if importlib.util.find_spec("tensorboard") is None:
        raise RuntimeError(NO_TENSORBOARD)
    from torch.utils.tensorboard import SummaryWriter  # only with that package

    return SummaryWriter(str(folder))
