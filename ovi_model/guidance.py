"""Classifier-free guidance with a scale of its own for each stream (upstream `OviFusionEngine.generate`)."""

import math

import torch
from comfy.samplers import CFGGuider, calc_cond_batch
from torch import Tensor

from .seam import SKIP_LAYER_KEY


def guide(positive, negative, scale: float):
    """Return `negative + scale * (positive - negative)`; exact on velocities and on clean estimates alike."""
    return negative + scale * (positive - negative)


def set_audio_guidance(model, scale: float):
    """Return a clone of MODEL whose audio stream is guided by `scale` whatever the sampler's cfg says.

    The sampler's cfg then drives the video alone. Works below any CFG guider: it replaces the audio slice of the
    packed result after core has combined the two passes.
    """

    def guide_audio(args):
        denoised, negative = args["denoised"], args["uncond_denoised"]
        if negative is None or args["uncond"] is None:  # nothing to guide away from; core may hand over zeros
            return denoised
        shapes = args["cond"][0]["model_conds"]["latent_shapes"].cond
        video_size = math.prod(shapes[0][1:])
        audio = guide(args["cond_denoised"][..., video_size:], negative[..., video_size:], scale)
        out = denoised.clone()
        out[..., video_size:] = audio
        return out

    model = model.clone()
    model.set_model_sampler_post_cfg_function(guide_audio, disable_cfg1_optimization=True)
    return model


def set_skip_layer(conditioning: list, layer: int) -> list:
    """Return a copy of CONDITIONING whose passes leave out block `layer` in both towers; negative for none."""
    return [[text, {**options, SKIP_LAYER_KEY: layer}] for text, options in conditioning]


def check_skip_layer(model, layer: int) -> None:
    """Raise ValueError if the model has no block of that index."""
    blocks = len(model.model.diffusion_model.blocks)
    if layer >= blocks:
        raise ValueError(f"Skip layer {layer} does not exist: this Ovi model has blocks 0 to {blocks - 1}. "
                         "Choose one of them, or -1 to switch skip-layer guidance off.")


def make_guider(model, positive, negative, video_scale: float, audio_scale: float, skip_layer: int = -1) -> CFGGuider:
    """Return a GUIDER that guides each stream by its own scale and skips one block in the negative pass."""
    check_skip_layer(model, skip_layer)
    guider = CFGGuider(set_audio_guidance(model, audio_scale))
    guider.set_conds(positive, set_skip_layer(negative, skip_layer))
    guider.set_cfg(video_scale)
    return guider


def check_range(start: float, end: float) -> None:
    """Raise ValueError unless 0 <= start < end <= 1."""
    if not 0 <= start < end <= 1:
        raise ValueError(f"start_percent must be below end_percent, both from 0 to 1; got {start} and {end}. To switch "
                         "this off, remove the node.")


def step_range(sigmas: Tensor, start: float, end: float) -> tuple[Tensor, Tensor]:
    """Noise levels (highest, lowest) of the steps from share `start` to share `end` of the schedule [steps + 1].

    A level belongs to them if lowest < level <= highest. The schedule may rise, as one from 'FlipSigmas' does.
    """
    steps = len(sigmas) - 1
    margin = 1 + 1e-6 * (sigmas[0] - sigmas[-1]).sign()  # leaves the first level inside and the last outside
    first, last = (sigmas[math.ceil(share * steps - 1e-6)] * margin for share in (start, end))
    return torch.maximum(first, last), torch.minimum(first, last)


def set_guidance_range(model, start: float, end: float):
    """Return a clone of MODEL that runs the negative pass only from share `start` to share `end` of the steps.

    Outside, the positive estimate stands for both, so every scale and every guidance function gives the positive.
    Costs one host-device sync a call. Raises ValueError for an empty range.
    """
    check_range(start, end)
    previous = model.model_options.get("sampler_calc_cond_batch_function")

    def estimate(args):
        if previous is not None:
            return previous(args)
        return calc_cond_batch(args["model"], args["conds"], args["input"], args["sigma"], args["model_options"])

    def estimate_in_range(args):
        positive, negative = args["conds"]
        sigma = args["sigma"][0]
        highest, lowest = step_range(args["model_options"]["transformer_options"]["sample_sigmas"], start, end)
        if negative is None or bool((sigma > lowest) & (sigma <= highest)):
            return estimate(args)
        positive = estimate({**args, "conds": [positive, None]})[0]
        return [positive, positive]

    model = model.clone()
    model.set_model_sampler_calc_cond_batch_function(estimate_in_range)
    return model
