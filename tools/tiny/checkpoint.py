"""Random joint checkpoints in the upstream layout: `draw_weights` for tests, `ovi_checkpoint` for the bundle's file.

Both make every tensor of `sizes.tensor_shapes` random, those included that training starts at 0 or 1, so that no part
of the model can hide.
"""

from __future__ import annotations

import math
import re

import torch

from .draws import Draws, Tensors
from .sizes import BUNDLE, TINY, Sizes, tensor_shapes

GAIN = re.compile(r"norm(_q|_k|3|_k_fusion|_fusion)\.weight$")
# What the bundle's file has louder or quieter than a layer that keeps the variance of its input; the first that fits.
LOUDNESS = (
    (re.compile(r"text_embedding\.\d\.weight$|cross_attn\.v\.weight$|\.w2\.weight$"), 2.0),
    (re.compile(r"time_projection\.1\.weight$"), 0.7),
    (re.compile(r"head\.head\.weight$"), 0.6),
)
QUIET_BIAS = re.compile(r"(text_embedding\.\d|head\.head)\.bias$")  # so that rows of padding stay quiet


def draw_weights(sizes: Sizes = TINY, seed: int = 0) -> Tensors:
    """A random joint checkpoint, float32 holding bf16 values.

    The draws follow the README of the reference's numbers: matrices and kernels normal with std 1/sqrt(fan-in) (x0.7
    for the time projection), biases std 0.1, norm gains 1 + 0.25 n, modulation tables 0.3 n.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(sizes).items():
        n = torch.randn(shape, generator=generator)
        if "modulation" in name:
            n *= 0.3
        elif GAIN.search(name):
            n = 1 + 0.25 * n
        elif name.endswith(".bias"):
            n *= 0.1
        else:
            n *= (0.7 if "time_projection" in name else 1.0) / math.sqrt(math.prod(shape[1:]))
        weights[name] = n.to(torch.bfloat16).float()
    return weights


def ovi_checkpoint(seed: int) -> Tensors:
    """The bundle's joint checkpoint, bf16."""
    w = Draws(seed, "ovi", torch.bfloat16)
    for name, shape in tensor_shapes(BUNDLE).items():
        if "modulation" in name:
            w.random(name, *shape, std=0.3)
        elif GAIN.search(name):
            w.random(name, *shape, mean=1.0, std=0.25)
        elif name.endswith(".bias"):
            w.random(name, *shape, std=0.02 if QUIET_BIAS.search(name) else 0.1)
        else:
            w.kernel(name, *shape, gain=next((gain for pattern, gain in LOUDNESS if pattern.search(name)), 1.0))
    return w.tensors
