"""Errors between results, each a relative L2 norm."""

from __future__ import annotations

import torch
from comfy.nested_tensor import NestedTensor
from golden import relative_l2


def assert_pair_close(found, truth, tolerance: float) -> None:
    """Both streams of a pair (nested tensor, list or tuple) agree to a relative L2 error."""
    found = found.unbind() if isinstance(found, NestedTensor) else found
    truth = truth.unbind() if isinstance(truth, NestedTensor) else truth
    for name, a, b in zip(("video", "audio"), found, truth, strict=True):
        assert torch.isfinite(a).all(), f"{name} is not finite"
        error = relative_l2(a, b)
        assert error <= tolerance, f"{name} differs by {error:.2e}, allowed {tolerance:.0e}"


def assert_pair_equal(found, truth) -> None:
    for name, a, b in zip(("video", "audio"), found.unbind(), truth.unbind(), strict=True):
        assert torch.equal(a, b), f"{name} is not bit-identical (relative L2 {relative_l2(a, b):.2e})"
