"""Schedules, and solvers stepped with the goldens' closed-form model."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from comfy.model_sampling import CONST
from golden import relative_l2
from ovi_native.ovi_model.sampling import solvers
from safetensors.torch import load_file

from . import EXACT, FP32, TABLE, Item


def items(golden: Path) -> Iterator[Item]:
    entries = json.loads((golden / "schedulers" / "tables.json").read_text())["entries"]
    for entry in entries:
        yield from table_items(entry)
    data = load_file(golden / "schedulers" / "trajectories.safetensors")
    for entry in entries:
        for dtype in (torch.float32, torch.float64):
            kind = "f32" if dtype == torch.float32 else "f64"
            name = f"{entry['solver']}.shift{entry['shift']:g}.steps{entry['steps']}.{kind}"
            if name not in data:
                yield Item(f"trajectory {name}", float("inf"), FP32, "not in trajectories.safetensors")
                continue
            states = run_trajectory(entry, data, dtype)
            yield Item(f"trajectory {name}", relative_l2(states, data[name]), FP32)


def table_items(entry: dict) -> Iterator[Item]:
    name = f"schedule {entry['solver']} shift {entry['shift']:g} steps {entry['steps']}"
    sigmas = solvers.make_sigmas(entry["solver"], entry["steps"], entry["shift"])
    yield Item(f"{name} sigmas", relative_l2(sigmas, torch.tensor(entry["sigmas"])), TABLE)
    if entry["solver"] == "euler":
        found = sigmas[:-1].numpy() * 1000
        error = float(np.abs(found / np.array(entry["timesteps"]) - 1).max())
        yield Item(f"{name} timesteps", error, TABLE)
    else:
        found = solvers.whole_timesteps(entry["solver"], sigmas.tolist())
        wrong = sum(a != b for a, b in zip(found, entry["timesteps"], strict=True))
        yield Item(f"{name} timesteps", wrong / len(found), EXACT, "exact")


class ClosedFormModel:
    """The goldens' linear velocity v = A x + b t / 1000, behind the interface ComfyUI gives a sampler function."""

    def __init__(self, data: dict, dtype: torch.dtype):
        self.a, self.b = data["A"].to(dtype), data["b"].to(dtype)
        self.noise = data["x0"].to(dtype)
        self.latent_image = torch.zeros_like(self.noise)
        self.inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=CONST()))
        self.states: list[torch.Tensor] = []

    def __call__(self, x, sigma, model_options=None, **_):
        t = (model_options or {}).get("transformer_options", {}).get("ovi_timestep")
        t = sigma * 1000 if t is None else float(t)
        self.states.append(x)
        return x - sigma * (torch.einsum("ij,bjn->bin", self.a, x) + self.b * (t / 1000))


def run_trajectory(entry: dict, data: dict, dtype: torch.dtype) -> torch.Tensor:
    """Return the state after every step [steps, C, N], using the schedule and sampler the nodes hand out."""
    model = ClosedFormModel(data, dtype)
    sigmas = solvers.make_sigmas(entry["solver"], entry["steps"], entry["shift"])
    sampler = solvers.make_sampler(entry["solver"])
    start = model.noise * (1 if entry["solver"] == "unipc" else sigmas[0])
    last = sampler.sampler_function(model, start.clone(), sigmas, extra_args={}, callback=None, disable=True)
    return torch.cat([*model.states[1:], last])
