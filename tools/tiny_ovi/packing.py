"""Files small enough for a repository: 8-bit matrices with a scale a row, and back. Needs torch and safetensors alone.

A packed file holds each matrix or kernel [out, ...] as int8 `NAME` and float32 `NAME.scale` [out], everything else in
float16. Rounding costs about 0.9 % of a row's root mean square.
"""

from __future__ import annotations

import torch

SCALE = ".scale"


def pack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor of at least two axes in 8 bits, the others in float16."""
    packed = {}
    for name, tensor in tensors.items():
        tensor = tensor.float()
        if tensor.ndim < 2 or tensor.shape[0] == 1:
            packed[name] = tensor.half().contiguous()
            continue
        scale = (tensor.flatten(1).abs().amax(1) / 127).clamp(min=1e-12)
        packed[name] = (tensor / column(scale, tensor)).round().to(torch.int8).contiguous()
        packed[name + SCALE] = scale
    return packed


def expand(packed: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors again, in `dtype`."""
    out = {}
    for name, tensor in packed.items():
        if name.endswith(SCALE):
            continue
        if tensor.dtype == torch.int8:
            tensor = tensor.float() * column(packed[name + SCALE], tensor)
        out[name] = tensor.to(dtype)
    return out


def column(scale: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return scale.view(-1, *[1] * (tensor.ndim - 1))
