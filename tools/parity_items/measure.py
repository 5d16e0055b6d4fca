"""How parity is measured."""

import torch

FP32 = 1e-5
BF16 = 2e-2
LOOP = 1e-4
BF16_LOOP = 3e-2  # the stored run is bf16 itself: both sides round


def relative_l2(found: torch.Tensor, truth: torch.Tensor) -> float:
    """norm(found - truth) / norm(truth); infinite if the shapes differ."""
    if found.shape != truth.shape:
        return float("inf")
    found, truth = found.double(), truth.double()
    return float((found - truth).norm() / truth.norm().clamp(min=1e-30))
