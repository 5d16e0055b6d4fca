"""What loading any of the models takes: a file that lacks nothing, and memory that is the model's own.

ComfyUI loads in two ways. With DynamicVRAM a model stays in its file, mapped into memory, and core moves each weight to
the GPU as it is needed: that is left to core. Everywhere else, and for the static copies that LoRA hooks, torch.compile
and a second GPU ask of a dynamic model, the weights are written to, and the file may change or go meanwhile. There
every tensor is copied, one after the other, so that besides the model's own memory only pages of the file are in use,
which the system takes back whenever it needs them.
"""

from collections.abc import Iterable

import comfy.quant_ops
from torch import Tensor, nn

from .quant_records import fits
from .reader import StateDict

ALWAYS_ALLOCATED = nn
"""Layers that have their parameters from the start, for a model on the meta device that is to tell their shapes.

Core's own have none with DynamicVRAM before a state dict arrives.
"""


def require_all(tensors: StateDict, model: nn.Module, name: str, optional: str | None = None) -> set[str]:
    """Names of all that a model, on the meta device, is to be filled with from the tensors of one file (or pair).

    Raises RuntimeError unless they fill it, in shape and kind. optional: how names end that need not be there.
    """
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()
              if key in tensors or not optional or not key.endswith(optional)}
    missing = [key for key in shapes if key not in tensors]
    wrong = [f"{key} {list(tensors[key].shape)} instead of {list(shape)}" for key, shape in shapes.items()
             if key in tensors and not fits(tensors, key, shape)]
    whole = [key for key in shapes if key in tensors and not tensors[key].is_floating_point()
             and f"{key.removesuffix('.weight')}.comfy_quant" not in tensors]
    for problem, keys in (("lacks", missing), ("has the wrong shape for", wrong), ("has whole numbers for", whole)):
        if keys:
            raise RuntimeError(f"{name} is damaged or incomplete: it {problem} {len(keys)} of {len(shapes)} tensors "
                               f"({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}). Download it again.")
    return set(shapes)


def cast_as_declared(module: nn.Module, tensors: StateDict, prefix: str = "") -> None:
    """Bring the tensors, in place and one by one, to the dtypes that the layers they are for declare.

    Copying into parameters would do so, but core's `Linear` may have none yet and takes what the file holds. Quantised
    matrices stay as they are.
    """
    layers = dict(module.named_modules())
    for key in list(tensors):
        layer, _, leaf = key.removeprefix(prefix).rpartition(".")
        dtype = getattr(layers.get(layer), f"{leaf}_comfy_model_dtype", None)
        if key.startswith(prefix) and dtype is not None and not (
                leaf == "weight" and f"{prefix}{layer}.comfy_quant" in tensors):
            tensors[key] = tensors[key].to(dtype)


def storages(tensors: Iterable[Tensor]) -> set[int]:
    """Addresses of the memory that tensors lie in."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def own_memory(module: nn.Module, sources: set[int]) -> None:
    """Copy, one by one, each parameter and buffer of a loaded module that still lies in one of the `storages`.

    Core's quantised layers keep the tensors they are given, whether told to copy or not.
    """
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if _parts(parameter) & sources:
                setattr(layer, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
        for name, buffer in layer.named_buffers(recurse=False):
            if _parts(buffer) & sources:
                setattr(layer, name, buffer.clone())


def _parts(tensor: Tensor) -> set[int]:
    """Where a tensor lies; a quantised one with its scales."""
    data = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    if not isinstance(data, comfy.quant_ops.QuantizedTensor):
        return storages([data])
    names, _ = data.__tensor_flatten__()
    return storages(getattr(data, name) for name in names)
