"""The network of the tiny Ovi, and its weights before training."""

from __future__ import annotations

import math

import torch
from tiny.models import load
from tiny.sizes import Sizes, tensor_shapes

from .text import WIDTH

SIZES = Sizes(heads=2, blocks=4, ffn=1024, text=WIDTH, conv_hidden=128)
QUIET = ("head.head.weight", "time_projection.1.weight")  # begin at 0: each block passes its input on


def fresh_weights(seed: int) -> dict[str, torch.Tensor]:
    """Upstream names: matrices of variance 1 / fan-in, gains 1, biases and gates 0."""
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(SIZES).items():
        if name.endswith("modulation"):
            table = torch.randn(shape, generator=random) / math.sqrt(SIZES.dim)
            weights[name] = table
        elif len(shape) == 1:
            weights[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        elif name.endswith(QUIET):
            weights[name] = torch.zeros(shape)
        else:
            gain = 0.5 if name.endswith((".o.weight", "ffn.2.weight")) else 1.0
            weights[name] = torch.randn(shape, generator=random) * gain / math.sqrt(math.prod(shape[1:]))
    return weights


def fresh_model(seed: int = 0):
    """MODEL in float32 with these weights."""
    return load(fresh_weights(seed))

