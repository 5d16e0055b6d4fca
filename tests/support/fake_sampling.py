"""Sampling steps on GPUs of fake tensors: the device of every tensor shows, and mixing two devices is an error."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.utils import pack_latents
from ovi_native.ovi_model.sampling import solvers
from support.step_counters import Operations
from tiny.fake_gpu import flash_attention
from tiny.models import load
from torch import Tensor
from torch._subclasses import FakeTensorMode

STEPS = 4


class FakeGpus:
    """Brings models and conditioning to fake devices, 'cuda:0' and on."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def tensor(self, tensor: Tensor, device) -> Tensor:
        with self.mode:
            return torch.empty_like(tensor, device=device)

    def patcher(self, weights: dict, device: str) -> ModelPatcher:
        """MODEL in bf16 with its weights on a device, as a sampler has it in use."""
        patcher = load(weights, torch.bfloat16)
        patcher.load_device = torch.device(device)
        for module in patcher.model.modules():
            for group in (module._parameters, module._buffers):
                for name, tensor in group.items():
                    if tensor is not None:
                        group[name] = self.tensor(tensor.data, device)
        patcher.model.current_patcher = patcher
        return patcher

    def moved(self, value: Any, device, known: dict[int, Any] | None = None) -> Any:
        """A copy of lists, dictionaries and objects of any kind with their tensors on a device."""
        known = {} if known is None else known
        if id(value) in known:
            return known[id(value)]
        if isinstance(value, Tensor):
            return known.setdefault(id(value), self.tensor(value, device))
        if isinstance(value, dict):
            return {key: self.moved(item, device, known) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.moved(item, device, known) for item in value)
        if hasattr(value, "__dict__") and not callable(value):
            known[id(value)] = result = copy.copy(value)
            result.__dict__.update(self.moved(vars(value), device, known))
            return result
        return value


def endless_memory(monkeypatch) -> None:
    """Keep ComfyUI from asking a driver, which is not there, for free memory and for a switch of device."""
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda *_: 1 << 50)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_: 1 << 50)
    monkeypatch.setattr(comfy.model_management, "set_torch_device", lambda _: None)


def prepared(guider, latent, mask=None) -> dict[str, list]:
    """A guider's conditionings as ComfyUI prepares them for the steps, from a real run of one step on the CPU."""
    caught: dict[str, list] = {}
    guider.sample(copy.deepcopy(latent), latent, solvers.make_sampler("euler"), torch.tensor([1.0, 0.0]),
                  denoise_mask=mask, callback=lambda *_: caught.update(guider.conds), disable_pbar=True)
    return caught


def sample(gpus: FakeGpus, guider, latent, conds: dict[str, list], solver: str, mask=None, clones=None,
           watch: Operations | None = None) -> Tensor:
    """Run STEPS steps on the guider's device, from where ComfyUI has made everything ready; returns the packed latent.

    guider: of a patcher from `gpus`. conds: from `prepared`, with the same settings on a real model.
    clones: ComfyUI's table {device: patcher} when the passes are split over several. watch: records the steps, and
    where each begins.
    """
    device, options = guider.model_patcher.load_device, guider.model_patcher.model_options
    x = gpus.tensor(pack_latents(latent.unbind())[0], device)
    guider.inner_model, guider.conds = guider.model_patcher.model, gpus.moved(conds, device)
    guider.inner_model._latent_shapes = [stream.shape for stream in latent.unbind()]  # as `extra_conds` does
    sigmas = gpus.tensor(levels := solvers.make_sigmas(solver, STEPS), device)
    sigmas.tolist = levels.tolist  # a fake tensor has no numbers; our solvers ask for these once a run
    transformer_options = {**options["transformer_options"], "optimized_attention_override": flash_attention,
                           "sample_sigmas": sigmas}
    options = {**options, "transformer_options": transformer_options, **({"multigpu_clones": clones} if clones else {})}
    if mask is not None:
        full = [part.expand_as(stream) for part, stream in zip(mask.unbind(), latent.unbind(), strict=True)]
        mask = gpus.tensor(pack_latents(full)[0], device)
    model = comfy.samplers.KSamplerX0Inpaint(guider, sigmas)
    with gpus.mode, torch.no_grad():
        model.latent_image, model.noise = torch.clone(x), torch.clone(x)
        x.any = lambda: True  # nor has it content; our solvers ask once a run
        sampler, extra = solvers.make_sampler(solver), {"model_options": options, "seed": 1, "denoise_mask": mask}
        with watch or nullcontext():
            return sampler.sampler_function(model, x, sigmas, extra, lambda _: watch and watch.mark(), disable=True)
