"""Which weights full training touches, and with which streams: the stages of Ovi's paper (arXiv
2510.01284, section 4).

The audio tower is trained alone, the video tower is Wan's; then both are joined by fresh fusion
attention, and their attention is trained together while the feed-forward layers, half of all
weights, stay frozen: 5.7 of 11.7 billion.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfy.quant_ops import QuantizedTensor
from torch import nn

from ..ovi.layouts import AUDIO_PREFIX
from .loop import trainable

FUSION = re.compile(r"\.cross_attn\.(k_fusion|v_fusion|pre_attn_norm_fusion|norm_k_fusion)\.")
"""The weights with which a tower reads the other."""
BLOCK = re.compile(r"(audio_model\.)?blocks\.")


def of_audio(name: str) -> bool:
    return name.startswith(AUDIO_PREFIX) and not FUSION.search(name)


def of_video(name: str) -> bool:
    return not name.startswith(AUDIO_PREFIX) and not FUSION.search(name)


def of_attention(name: str) -> bool:
    """All of the blocks but their feed-forward."""
    return bool(BLOCK.match(name)) and ".ffn." not in name


def of_fusion(name: str) -> bool:
    return bool(FUSION.search(name))


@dataclass(frozen=True)
class Recipe:
    """A stage of training."""

    streams: str  # "both", or the one that is there: "video", "audio"
    wants: Callable[[str], bool]  # whether a weight, by its name, is trained
    title: str


RECIPES = {
    "audio": Recipe("audio", of_audio, "the audio tower alone, on sound alone"),
    "video": Recipe("video", of_video, "the video tower alone, on pictures alone"),
    "fusion": Recipe("both", of_attention, "all attention of both towers, the feed-forward frozen"),
    "fusion layers": Recipe("both", of_fusion,
                            "only the layers with which a tower reads the other"),
    "everything": Recipe("both", lambda _: True, "every weight"),
}


def prepare(network: nn.Module, name: str) -> int:
    """Let the weights of a recipe ask for a gradient, and no others; returns how many numbers they
    are.

    ValueError for an unknown recipe, or for weights that have no gradient because they are
    quantised.
    """
    if name not in RECIPES:
        raise ValueError(f"Unknown recipe {name!r}: expected one of {', '.join(RECIPES)}.")
    wanted = [key for key, _ in network.named_parameters() if RECIPES[name].wants(key)]
    for key in wanted:
        weight = network.get_parameter(key)
        if isinstance(weight.data, QuantizedTensor) or weight.dtype.itemsize < 2:
            raise ValueError(f"{key} is quantised, and quantised weights cannot be trained. Load "
                             "the model in bf16 or fp32 for full training, or train a LoRA.")
    return trainable(network, wanted)


@torch.no_grad()
def fresh_fusion(network: nn.Module, seed: int) -> int:
    """Begin the fusion attention anew; returns how many weights that are.

    Keys are random and values zero, so that each tower at first does what it did alone.
    """
    random = torch.Generator().manual_seed(seed)
    names = [name for name, _ in network.named_parameters() if FUSION.search(name)]
    for name in names:
        weight = network.get_parameter(name)
        if name.endswith(".k_fusion.weight"):
            weight.copy_(torch.randn(weight.shape, generator=random) / math.sqrt(weight.shape[1]))
        else:
            weight.fill_(1.0 if "norm" in name and name.endswith(".weight") else 0.0)
    return len(names)
