"""Random tensors that depend on a seed and the tensor's name alone, never on the machine or on the order."""

from __future__ import annotations

import math
import zlib

import torch

Tensors = dict[str, torch.Tensor]


class Draws:
    """Collects named tensors drawn from the seed; `std` is the standard deviation of the uniform draw."""

    def __init__(self, seed: int, part: str, dtype: torch.dtype) -> None:
        self.salt = f"ovi-tiny/{seed}/{part}/"
        self.dtype = dtype
        self.tensors: Tensors = {}

    def draw(self, name: str, *shape: int) -> torch.Tensor:
        """Uniform numbers of variance 1, a function of the salt and the name."""
        generator = torch.Generator().manual_seed(zlib.crc32((self.salt + name).encode()))
        return (torch.rand(shape, generator=generator) * 2 - 1) * math.sqrt(3)

    def put(self, name: str, value: torch.Tensor) -> None:
        """Stores a value in the file's dtype."""
        self.tensors[name] = value.to(self.dtype).contiguous()

    def random(self, name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        """Stores a draw around `mean`."""
        self.put(name, self.draw(name, *shape) * std + mean)

    def kernel(self, name: str, *shape: int, gain: float = 1.0) -> None:
        """Stores a matrix or kernel [out, in, ...] that keeps the variance of its input, times gain squared."""
        self.random(name, *shape, std=gain / math.sqrt(math.prod(shape[1:])))

    def layer(self, name: str, *shape: int, gain: float = 1.0, bias_std: float = 0.1) -> None:
        """Stores a kernel and its bias."""
        self.kernel(f"{name}.weight", *shape, gain=gain)
        self.random(f"{name}.bias", shape[0], std=bias_std)


def round_up(value: int, multiple: int) -> int:
    return multiple * math.ceil(value / multiple)
