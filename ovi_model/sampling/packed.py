"""The packed latent [B, 1, n] of several streams: one of them taken out, all put back.

Shapes: B clips, n elements of a clip. `shapes` are those of the streams, as core gives them.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

STREAMS = ("picture", "sound")


def take(shapes: list, stream: int, shape: list, value: Any):
    """One stream of a packed tensor, or of each in a list, as [B, *shape]; all else as it is."""
    if isinstance(value, list | tuple) and any(isinstance(part, Tensor) for part in value):
        return type(value)(take(shapes, stream, shape, part) for part in value)
    sizes = [math.prod(s[1:]) for s in shapes]
    if not isinstance(value, Tensor) or value.ndim != 3:
        return value
    if tuple(value.shape[1:]) != (1, sum(sizes)):
        return value
    start = sum(sizes[:stream])
    return value[..., start:start + sizes[stream]].reshape(value.shape[0], *shape)


def pack(parts, shapes: list) -> Tensor | None:
    """Both streams, in any shapes of the right size, as one packed tensor."""
    if any(part is None for part in parts):
        return None
    return torch.cat([part.reshape(part.shape[0], 1, math.prod(shape[1:]))
                      for part, shape in zip(parts, shapes, strict=True)], dim=-1)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity. Waits for the device once."""
    finite = [tensor.isfinite().all() for tensor in tensors.values()]
    answers = torch.stack([answer.to(finite[0].device) for answer in finite]).tolist()
    return [name for name, fine in zip(tensors, answers, strict=True) if not fine]


def check_finite(latent: Tensor, shapes: list) -> None:
    """Raise RuntimeError if the result of a sampling, packed [B, 1, n], is not finite.

    Waits for the device once.
    """
    broken = not_finite({name: take(shapes, stream, [-1], latent)
                         for stream, name in enumerate(STREAMS)})
    if broken:
        raise RuntimeError(
            f"The sampled {' and '.join(broken)} {'is' if len(broken) == 1 else 'are'} not finite "
            "(NaN or infinity). There is nothing to decode. Likely causes: a damaged model file, "
            "or two files that do not belong together (load the model again, or download it "
            "again); a LoRA or its strength (take it out); computing in fp16 (start ComfyUI "
            "without --fp16-unet and --force-fp16); settings of guidance nodes; a schedule that "
            "ends at a noise level of 1 ('SplitSigmas' at step 0, 'FlipSigmas').")
