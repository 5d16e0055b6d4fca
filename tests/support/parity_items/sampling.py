"""Whole sampling loops: ComfyUI's guider, packed latents, masks, the pack's solvers, guidance and skip layer."""

import json
from collections.abc import Iterator
from pathlib import Path

import comfy.latent_formats
import torch
from comfy.nested_tensor import NestedTensor
from golden import relative_l2
from ovi_native.ovi_model.ovi.conditioning import AUDIO_TEXT_KEY
from ovi_native.ovi_model.ovi.guider import make_guider
from ovi_native.ovi_model.sampling import solvers
from safetensors.torch import load_file

from . import BF16_LOOP, FP32, LOOP, Item
from .fusion import load_fusion


def items(golden: Path) -> Iterator[Item]:
    folder = golden / "sampling"
    config = json.loads((folder / "config.json").read_text())
    inputs = load_file(folder / "inputs.safetensors")
    for run in config["runs"]:
        yield from loop_items(golden, run, config, inputs, torch.float32)
    if not list(folder.glob("*_bf16.safetensors")):
        yield Item("loop bf16", float("inf"), BF16_LOOP, f"no bf16 run in {folder}")
    for file in sorted(folder.glob("*_bf16.safetensors")):
        run = {"file": file.name, "solver": file.name.split("_")[1], "i2v": file.name.startswith("i2v")}
        yield from loop_items(golden, run, config, inputs, torch.bfloat16)


def loop_items(golden: Path, run: dict, config: dict, inputs: dict, dtype: torch.dtype) -> Iterator[Item]:
    truth = load_file(golden / "sampling" / run["file"])
    name = "loop " + run["file"].removesuffix(".safetensors")
    exact = dtype == torch.float32
    for stream in ("video", "audio"):  # bf16 runs drew their own noise
        if f"{stream}.noise_bf16" in truth:
            inputs = {**inputs, f"{stream}_noise": truth[f"{stream}.noise_bf16"]}
    steps, final = sample(golden, run, config, inputs, dtype)
    clean = 1 if run["i2v"] else 0
    for stream, value in (("video", final[0][0]), ("audio", final[1][0].T)):
        yield Item(f"{name} {stream}.final", relative_l2(value, truth[f"{stream}.final"].float()),
                   LOOP if exact else BF16_LOOP)
    if not exact:
        return
    for i, (video, audio) in enumerate(steps):
        wanted = truth[f"video.after_step{i}"]
        yield Item(f"{name} video.after_step{i}", relative_l2(video[0][:, clean:], wanted[:, clean:]), LOOP)
        yield Item(f"{name} audio.after_step{i}", relative_l2(audio[0].T, truth[f"audio.after_step{i}"]), LOOP)
    sigmas = solvers.make_sigmas(run["solver"], config["steps"], config["shift"])
    yield Item(f"{name} sigmas", relative_l2(sigmas, truth["video.sigmas"]), FP32)


def sample(golden: Path, run: dict, config: dict, inputs: dict, dtype: torch.dtype):
    """Sample through ComfyUI as 'Ovi Sampler' does, with the golden's noise; returns (states after each step, final).

    Everything is in the network's normalised space: the clean frame goes in, and the result comes out, through the
    Wan2.2 statistics that ComfyUI's side of the model applies.
    """
    patcher, _, _ = load_fusion(golden / "fusion", dtype)
    latents = comfy.latent_formats.Wan22()
    video_noise, audio_noise = inputs["video_noise"][None].float(), inputs["audio_noise"].T[None].float()
    latent, mask = NestedTensor([torch.zeros_like(video_noise), torch.zeros_like(audio_noise)]), None
    if run["i2v"]:
        clean = torch.zeros_like(video_noise)
        clean[:, :, :1] = inputs["first_frame_latent"]
        latent = NestedTensor([latents.process_out(clean), torch.zeros_like(audio_noise)])
        video_mask = torch.ones(1, 1, *video_noise.shape[2:])
        video_mask[:, :, 0] = 0
        mask = NestedTensor([video_mask, torch.ones(1, 1, audio_noise.shape[-1])])

    def cond(text, **extra):
        return [[inputs[text][None], {"pooled_output": None, **extra}]]

    negative = cond("text_video_neg", **{AUDIO_TEXT_KEY: inputs["text_audio_neg"][None]})
    guider = make_guider(patcher, cond("text_pos"), negative, config["vg"], config["ag"], config["slg"])
    sigmas = solvers.make_sigmas(run["solver"], config["steps"], config["shift"])
    states: list = []
    record = StateRecorder(states)
    sampler = solvers.make_sampler(run["solver"])
    sampler.sampler_function = record.around(sampler.sampler_function)
    final = guider.sample(NestedTensor([video_noise, audio_noise]), latent, sampler, sigmas, denoise_mask=mask,
                          disable_pbar=True, seed=0).unbind()
    shapes = [video_noise.shape, audio_noise.shape]
    steps = [torch.split(state.flatten(1), [video_noise[0].numel(), audio_noise[0].numel()], dim=1) for state in states]
    steps = [(video.reshape(shapes[0]), audio.reshape(shapes[1])) for video, audio in steps]
    return steps, [latents.process_in(final[0]), final[1]]


class StateRecorder:
    """Notes the state a solver hands the model at each step after the first, and what it returns."""

    def __init__(self, states: list):
        self.states = states

    def around(self, function):
        def run(model, x, sigmas, **kwargs):
            result = function(RecordingModel(model, self.states), x, sigmas, **kwargs)
            self.states.append(result)
            return result

        return run


class RecordingModel:
    def __init__(self, model, states: list):
        self.model, self.states, self.calls = model, states, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, x, *args, **kwargs):
        if self.calls:
            self.states.append(x.clone())
        self.calls += 1
        return self.model(x, *args, **kwargs)
