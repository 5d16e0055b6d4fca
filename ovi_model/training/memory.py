"""What a training will take of the device's memory, by counting.

Activations are counted in bytes for a token and a unit of width, as measured on tensors without
data at the released size (`tools/tiny/fake_gpu.py`, which a test holds this to). A block that keeps
its activations takes 36 vectors of 16 bits; one that is run again keeps the residual, and one such
block is at work at a time. The sound's tokens are a hundredth of the picture's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..files.disk import human
from .lora import BLOCK_LAYER, LoraSettings, count

BETWEEN = 20  # bytes a token and unit of width that are there whatever the blocks keep
RESIDUAL = 2  # of a block that is run again
KEPT = 54, 4  # of a block that keeps its activations: of its width, and of its feed-forward's
NUMBERS = 4  # a trained number's own, its gradient's and twice AdamW's, in its own precision
BYTES = {"bf16": 2.0, "fp32": 4.0, "int8": 1.0, "fp8_scaled": 1.0, "fp8_e4m3fn": 1.0, "mxfp8": 1.03,
         "nvfp4": 0.57}
BLOCK_MATRIX = re.compile(r"(audio_model\.)?blocks\.\d+\..+\.weight$")


@dataclass(frozen=True)
class Need:
    """Bytes of each kind."""

    what: str
    weights: int
    trained: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.activations

    def __str__(self) -> str:
        return (f"{human(self.total)}: weights {human(self.weights)}, what is trained "
                f"{human(self.trained)}, activations {human(self.activations)}")


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and the bytes of its weights on the device."""

    dim: int
    ffn: int
    blocks: int
    weights: int
    layers: dict[str, tuple[int, int]]  # names, rows and columns of what a LoRA may change
    item: int = 2  # bytes of a weight that can be trained

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], weight_dtype: str = "default") -> Shape:
        """From a checkpoint's tensors under core's names."""
        layers = {name.removesuffix(".weight"): (int(tensor.shape[0]), int(tensor.shape[1]))
                  for name, tensor in tensors.items() if tensor.ndim == 2
                  and BLOCK_LAYER.match(name) and name.endswith(".weight")}
        ffn, dim = tensors["blocks.0.ffn.0.weight"].shape
        blocks = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
        weights = sum(stored(name, tensor, weight_dtype) for name, tensor in tensors.items())
        single = weight_dtype == "fp32" or (
            weight_dtype == "default" and tensors["blocks.0.ffn.0.weight"].dtype.itemsize == 4)
        return cls(int(dim), int(ffn), blocks, int(weights), layers, 4 if single else 2)

    def lora(self, settings: LoraSettings) -> int:
        """Numbers that a LoRA trains."""
        return count((size for name, size in self.layers.items() if settings.wants(name)),
                     settings.rank)

    def activations(self, tokens: int, kept: int = 0) -> int:
        """Bytes at the highest point of a step on `tokens` video tokens, all clips of a batch
        together.

        kept: how many blocks keep theirs.
        """
        block = KEPT[0] + KEPT[1] * self.ffn / self.dim
        again = self.blocks - min(kept, self.blocks)
        each = BETWEEN + block * (self.blocks - again + (1 if again else 0)) + RESIDUAL * again
        return round(tokens * self.dim * each)

    def need(self, tokens: int, trained: int, kept: int = 0, full: bool = False,
             average: bool = False) -> Need:
        """What a training takes. full: it is the weights themselves that are trained, not numbers
        beside them."""
        size = self.item if full else 4  # a LoRA's numbers are float32
        copies = NUMBERS - full + average  # of the weights themselves the numbers are there already
        return Need(f"{tokens} tokens", self.weights, trained * size * copies,
                    self.activations(tokens, kept))


def stored(name: str, tensor: Tensor, weight_dtype: str) -> float:
    """Bytes of a tensor on the device."""
    if weight_dtype == "default":
        return tensor.nbytes
    if weight_dtype in ("bf16", "fp32"):
        return tensor.numel() * BYTES[weight_dtype]
    matrix = tensor.ndim == 2 and BLOCK_MATRIX.match(name)
    return tensor.numel() * (BYTES[weight_dtype] if matrix else 2.0)
