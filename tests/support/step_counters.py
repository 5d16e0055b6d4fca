"""Counters for what one step does: operations, bytes, products, casts, waits for the device. Counts, never seconds."""

import math
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
PACK = (str(ROOT / "ovi_model"), str(ROOT / "nodes"))


def place() -> str:
    """'file.py:function' of the innermost frame in the pack or in ComfyUI."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(PACK) or "/comfy/" in path:
            return f"{Path(path).name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return ""


@dataclass(frozen=True)
class Spec:
    """A tensor without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def spec(tensor: Tensor) -> Spec:
    return Spec(tuple(tensor.shape), tensor.dtype, tensor.device)


@dataclass(frozen=True)
class Operation:
    """One operation that computes, copies or allocates; `made`: the tensors it allocates, none if it works in place."""

    name: str
    inputs: tuple[Spec, ...]
    made: tuple[Spec, ...]
    where: str

    @property
    def is_launch(self) -> bool:
        """Whether a GPU would have something to do."""
        return "empty" not in self.name

    @property
    def macs(self) -> int:
        """Multiply-adds of a product of matrices, convolution or attention; 0 for everything else."""
        if self.name in ("mm", "addmm", "bmm"):
            a, b = self.inputs[-2:]
            return a.numel * b.shape[-1]
        if self.name == "convolution":
            return self.made[0].numel * math.prod(self.inputs[1].shape[1:])
        if self.name.startswith("_scaled_dot_product"):
            q, k = self.inputs[:2]
            return 2 * q.numel * k.shape[-2]
        return 0

    @property
    def cast(self) -> tuple[torch.dtype, torch.dtype] | None:
        """(from, to) if it changes the floating dtype of a tensor and nothing else."""
        if self.name not in ("_to_copy", "copy_"):
            return None
        source, target = (self.inputs[0], self.made[0]) if self.made else (self.inputs[1], self.inputs[0])
        changes = source.dtype != target.dtype and source.dtype.is_floating_point and target.dtype.is_floating_point
        return (source.dtype, target.dtype) if changes else None


class Operations(TorchDispatchMode):
    """Records every operation but those that only look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.list: list[Operation] = []
        self.marks: list[int] = []

    def mark(self) -> None:
        """To be called once a step, from a sampler's callback."""
        self.marks.append(len(self.list))

    def steps(self) -> list[list[Operation]]:
        """The operations from each mark to the next."""
        return [self.list[start:end] for start, end in pairwise(self.marks)]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        storages = {x.untyped_storage()._cdata for x in inputs}
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in storages]
        name = func._schema.name.partition("::")[2]
        if made or func._schema.is_mutable or name == "_local_scalar_dense":
            self.list.append(Operation(name, tuple(map(spec, inputs)), tuple(map(spec, made)), place()))
        return result


def casts(operations: list[Operation]) -> Counter:
    """Changes of floating dtype: 'file.py:function: from -> to' and how often."""
    names = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
    return Counter(f"{op.where}: {names[op.cast[0]]} -> {names[op.cast[1]]}" for op in operations if op.cast)


def largest(operations: list[Operation]) -> int:
    """Elements of the largest tensor made."""
    return max(tensor.numel for op in operations for tensor in op.made)


WAITS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__", "nonzero",
         "argwhere", "equal", "allclose", "is_nonzero", "unique", "masked_select"}


class Waits(TorchFunctionMode):
    """Records every call that makes the host wait for a device, as 'call in file.py:function'.

    It sees what Python asks for (`float(x)`, `if x`, `x.tolist()`) on any device; on a CPU nothing waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.list: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in WAITS and args and isinstance(args[0], Tensor):
            self.list.append(f"{name.strip('_')} in {place()}")
        return func(*args, **(kwargs or {}))
