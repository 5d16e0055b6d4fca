"""Guidance scales and ranges for any sampling of several streams."""

import math

import torch
from comfy.samplers import calc_cond_batch
from torch import Tensor


def check_scale(name: str, scale: float) -> None:
    """Raise ValueError unless a guidance scale is a finite number."""
    if not math.isfinite(scale):
        raise ValueError(f"{name} must be a number from 0 to 100; got {scale}. Released with 4 for "
                         "the picture and 3 for the sound.")


def check_range(start: float, end: float) -> None:
    """Raise ValueError unless 0 <= start < end <= 1."""
    if not 0 <= start < end <= 1:
        raise ValueError(f"start_percent must be below end_percent, both from 0 to 1; got {start} "
                         f"and {end}. To switch this off, remove the node.")


def step_range(sigmas: Tensor, start: float, end: float) -> tuple[Tensor, Tensor]:
    """Sigmas (highest, lowest) of the steps from share `start` to `end` of sigmas [steps + 1].

    A sigma belongs to them if lowest < sigma <= highest. The schedule may rise, as one from
    'FlipSigmas' does.
    """
    steps = len(sigmas) - 1
    margin = 1 + 1e-6 * (sigmas[0] - sigmas[-1]).sign()  # leaves the first inside, the last outside
    first, last = (sigmas[math.ceil(share * steps - 1e-6)] * margin for share in (start, end))
    return torch.maximum(first, last), torch.minimum(first, last)


def set_guidance_range(model, start: float, end: float):
    """Return a clone of MODEL with the negative pass from share `start` to `end` of the steps only.

    Outside, the positive estimate stands for both, so every scale and every guidance function gives
    the positive. Costs one host-device sync a call. Raises ValueError for an empty range.
    """
    check_range(start, end)
    previous = model.model_options.get("sampler_calc_cond_batch_function")

    def estimate(args):
        if previous is not None:
            return previous(args)
        return calc_cond_batch(args["model"], args["conds"], args["input"], args["sigma"],
                               args["model_options"])

    def estimate_in_range(args):
        positive, negative = args["conds"]
        sigma = args["sigma"][0]
        sigmas = args["model_options"]["transformer_options"]["sample_sigmas"]
        highest, lowest = step_range(sigmas, start, end)
        if negative is None or bool((sigma > lowest) & (sigma <= highest)):
            return estimate(args)
        positive = estimate({**args, "conds": [positive, None]})[0]
        return [positive, positive]

    model = model.clone()
    model.set_model_sampler_calc_cond_batch_function(estimate_in_range)
    return model
