"""LoRA: a low-rank change of chosen layers, trained beside weights that stay as they are.

The adapters are core's own (`comfy.weight_adapter`); each adds its share to what a layer gives, by
a forward hook. So the layer may be quantised, and taking the hooks away leaves the network as it
was. Files bear core's names (`diffusion_model.blocks.0.self_attn.q.lora_up.weight`), which the
stock loaders read.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from comfy.weight_adapter.lora import LoraDiff
from torch import Tensor, nn

from ..files.safetensors_file import write_tensors
from ..ovi.layouts import AUDIO_PREFIX
from ..ovi.lora_keys import ROOT

TOWERS = ("both", "video", "audio")
LAYERS = {
    "self-attention": tuple(f"self_attn.{part}" for part in "qkvo"),
    "text": tuple(f"cross_attn.{part}" for part in "qkvo"),
    "fusion": ("cross_attn.k_fusion", "cross_attn.v_fusion"),
    "feed-forward": ("ffn.0", "ffn.2"),
}
"""Kinds of layers, and their names in a block. A query and an output of `text` serve the fusion as
well."""
BLOCK_LAYER = re.compile(r"(audio_model\.)?blocks\.\d+\.(?P<layer>.+)$")


@dataclass(frozen=True)
class LoraSettings:
    """Which layers are changed, and by how much at most."""

    rank: int = 32
    alpha: float = 32.0  # the change counts alpha / rank times
    towers: str = "both"
    layers: tuple[str, ...] = tuple(LAYERS)

    def __post_init__(self) -> None:
        if self.towers not in TOWERS:
            raise ValueError(f"towers of a LoRA must be one of {', '.join(TOWERS)}, but got "
                             f"{self.towers!r}.")
        unknown = [name for name in self.layers if name not in LAYERS]
        if unknown or not self.layers:
            raise ValueError(f"layers of a LoRA must be some of {', '.join(LAYERS)}, but got "
                             f"{unknown[0] if unknown else 'none'!r}.")
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError("rank of a LoRA must be at least 1 and alpha above 0, but got "
                             f"{self.rank} and {self.alpha}.")

    def wants(self, layer: str) -> bool:
        """Whether a layer of the network, by its name, is changed."""
        match = BLOCK_LAYER.match(layer)
        tower = "audio" if layer.startswith(AUDIO_PREFIX) else "video"
        return (match is not None and self.towers in ("both", tower)
                and any(match["layer"] in LAYERS[kind] for kind in self.layers))

    def metadata(self) -> dict[str, str]:
        """What a file says of itself."""
        return {"rank": str(self.rank), "alpha": f"{self.alpha:g}", "towers": self.towers,
                "layers": ", ".join(self.layers)}


def shapes(network: nn.Module, settings: LoraSettings) -> dict[str, tuple[int, int]]:
    """Names of the layers that settings change, each with its rows and columns."""
    found = {}
    for name, module in network.named_modules():
        if settings.wants(name):
            rows, columns = module.weight.shape
            found[name] = (int(rows), int(columns))
    return found


def count(sizes: Iterable[tuple[int, int]], rank: int) -> int:
    """Trained numbers of a LoRA on layers of these rows and columns."""
    return sum(rank * (rows + columns) for rows, columns in sizes)


class Lora:
    """The adapters of a network, attached while it is used as a context."""

    def __init__(self, network: nn.Module, settings: LoraSettings, seed: int,
                 device: torch.device | str) -> None:
        """Adapters that change nothing yet: random down, zero up, in float32 on a device."""
        self.network, self.settings = network, settings
        with torch.device(device):
            self.layers = {name: adapter(rows, columns, settings, f"{seed} {name}")
                           for name, (rows, columns) in shapes(network, settings).items()}
        if not self.layers:
            raise ValueError(f"No layer of this model is chosen by towers {settings.towers} and "
                             f"layers {', '.join(settings.layers)}.")
        self.handles: list = []

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained; names of the audio tower's begin with `audio_model.`."""
        return {f"{layer}.{name}": parameter for layer, module in self.layers.items()
                for name, parameter in module.named_parameters() if parameter.requires_grad}

    def __enter__(self) -> Lora:
        for name, module in self.layers.items():
            layer = self.network.get_submodule(name)
            self.handles.append(layer.register_forward_hook(adding(module)))
        return self

    def __exit__(self, *_) -> None:
        while self.handles:
            self.handles.pop().remove()

    def tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """What a file holds, on the CPU."""
        out = {}
        for layer, module in self.layers.items():
            for name, value in module.state_dict().items():
                value = value.detach().to("cpu", dtype, copy=True)
                out[f"{ROOT}{layer}.{name}"] = value.contiguous()
        return out

    def save(self, path: Path, metadata: dict[str, str],
             dtype: torch.dtype = torch.float32) -> None:
        """Write the file; it is there whole or not at all."""
        metadata = {**metadata, **self.settings.metadata(), "format": "pt"}
        write_tensors(path, self.tensors(dtype), metadata)


def adapter(rows: int, columns: int, settings: LoraSettings, seed: str) -> LoraDiff:
    """Core's adapter of one layer, on the current device. Random numbers of its own: other layers
    change none."""
    random = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    bound = 1 / math.sqrt(columns)  # as PyTorch begins a linear layer
    down = torch.empty(settings.rank, columns, device="cpu")
    down.uniform_(-bound, bound, generator=random)
    up = torch.zeros(rows, settings.rank)
    module = LoraDiff((up, down, float(settings.alpha), None, None, None))
    module.lora_up.weight.requires_grad_(True)
    module.lora_down.weight.requires_grad_(True)
    return module


def adding(module: LoraDiff):
    """The hook that adds an adapter's share, its products in the precision of the layer's input."""

    def add(_layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        x = inputs[0]
        half = x.dtype in (torch.bfloat16, torch.float16)
        if half and not torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, x.dtype):
                return output + module.h(x, output)
        return output + module.h(x, output).to(output.dtype)

    return add
