"""A wide network that is mostly zeros, as its parts that are not: the 48-channel TAEHV of `taehv`, small and full.

Needs torch alone, as whoever writes the model files may have no ComfyUI at hand.
"""

from __future__ import annotations

import torch
from tiny.video_vae import video_vae
from torch import nn

Tensors = dict[str, torch.Tensor]

ENCODER_POOLS, DECODER_LEVELS = {2: 2, 7: 2, 12: 1}, {3: 1, 9: 2, 15: 2}
"""Index of a pooling of frames, or of a level's first block -> how many frames become one, or one becomes."""


def full_shapes() -> dict[str, torch.Size]:
    """Of all tensors of core's network."""
    return {name: value.shape for name, value in video_vae(0).items()}


def groups(name: str) -> tuple[int, int]:
    """Into how many equal parts a weight's outputs and inputs fall, each of which begins with the channels in use."""
    half, index = name.split(".")[:2]
    if name.endswith("conv.weight"):  # of a pooling, whose inputs are frames, or a growth, whose outputs are
        return (1, ENCODER_POOLS[int(index)]) if half == "encoder" else (DECODER_LEVELS[int(index) - 4], 1)
    return 1, 2 if name.endswith("conv.0.weight") else 1  # a block sees its frame and the one before


def pack(full: Tensors) -> Tensors:
    """The parts of a full state dict that are not 0: of every tensor the leading channels up to the last one in use,
    and of kernels that see no neighbours their centre."""
    small = {}
    for name, tensor in full.items():
        for axis, parts in enumerate(groups(name)[:tensor.ndim]):
            x = tensor.unflatten(axis, (parts, -1))
            used = x.transpose(0, axis + 1).flatten(1).any(1).nonzero()
            x = x.narrow(axis + 1, 0, int(used.max()) + 1 if len(used) else 1)
            tensor = x.flatten(axis, axis + 1)
        small[name] = _trim(tensor).contiguous()
    return small


def _trim(tensor: torch.Tensor) -> torch.Tensor:
    """A 3x3 kernel that is 0 around its centre -> 1x1."""
    if tensor.ndim < 4 or tensor.shape[-1] == 1 or tensor.flatten(2)[:, :, [0, 1, 2, 3, 5, 6, 7, 8]].any():
        return tensor
    return tensor[:, :, 1:2, 1:2]


def expand(small: Tensors) -> Tensors:
    """The full state dict of what `pack` gave, or of a `Narrow` network's state dict.

    Raises ValueError if a tensor is missing, unknown or wider than core's.
    """
    shapes = full_shapes()
    if small.keys() != shapes.keys():
        odd = sorted(small.keys() ^ shapes.keys())
        raise ValueError(f"A packed TAEHV has the {len(shapes)} tensors of core's; {', '.join(odd[:3])} "
                         f"{'is' if len(odd) == 1 else 'are'} missing or unknown. Pack it again with `pack`.")
    return {name: _expand(name, tensor, shapes[name]) for name, tensor in small.items()}


def _expand(name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    full = tensor
    if tensor.ndim == 4 and shape[2:] == (3, 3) and tensor.shape[2:] == (1, 1):
        full = nn.functional.pad(tensor, (1, 1, 1, 1))
    for axis, parts in enumerate(groups(name)[:tensor.ndim]):
        missing = (shape[axis] - full.shape[axis]) // parts
        if missing < 0 or full.shape[axis] % parts or full.shape[2:] != shape[2:]:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}; at most {list(shape)} in {parts} equal parts "
                             "was expected. Pack a state dict of a 48-channel TAEHV.")
        x = full.unflatten(axis, (parts, -1))
        room = x.new_zeros(*x.shape[:axis + 1], missing, *x.shape[axis + 2:])
        full = torch.cat([x, room], axis + 1).flatten(axis, axis + 1)
    return full


def cut(full: Tensors, shapes: dict[str, torch.Size]) -> Tensors:
    """The leading channels of a full state dict's tensors, and the centres of its kernels, as a narrower network of the
    same names has them."""
    out = {}
    for name, shape in shapes.items():
        tensor = full[name]
        for axis, parts in enumerate(groups(name)[:tensor.ndim]):
            x = tensor.unflatten(axis, (parts, -1)).narrow(axis + 1, 0, shape[axis] // parts)
            tensor = x.flatten(axis, axis + 1)
        if tensor.ndim == 4 and shape[2:] == (1, 1):
            tensor = tensor[:, :, tensor.shape[2] // 2, tensor.shape[3] // 2][:, :, None, None]
        out[name] = tensor
    return out
