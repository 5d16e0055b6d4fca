"""What a node checks of its inputs: values that come over a link, which core hands on as they are.

Core compares only what stands in a widget with the declared range or list, and a NaN passes even that.
"""

from typing import Any

import folder_paths
import torch
from comfy_api.latest import io

SHOWN = 100  # characters of a text that was not expected


def check_inputs(node: type[io.ComfyNode], **values: Any) -> None:
    """Raise ValueError unless numbers are in the range that the node's schema declares, choices are among its options
    and latents hold samples. NaN and infinity are in no range; other kinds of inputs are left to who uses them.
    """
    schema = node.define_schema()  # what core remembers of it cannot be asked for while a node runs
    for item in schema.inputs:
        if item.id not in values:
            continue
        value = values[item.id]
        if isinstance(item, io.Int.Input | io.Float.Input):
            fits, expected = _is_number(value, item), f"{_kind(item)} from {item.min} to {item.max}"
        elif isinstance(item, io.Combo.Input):
            fits, expected = value in item.options, f"one of {', '.join(map(str, item.options))}"
        elif isinstance(item, io.Latent.Input):
            fits, expected = _is_latent(value), "a LATENT, as 'Ovi Empty Latent' or a sampler gives it"
        else:
            raise TypeError(f"{schema.node_id}.{item.id}: there is no check for this kind of input")
        if not fits:
            raise ValueError(f"{item.id} of '{schema.display_name}' must be {expected}, but got {shown(value)}.")


def file_path(folder: str, name: str) -> str:
    """Path of a file in one of ComfyUI's model folders; RuntimeError if there is none of that name."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise RuntimeError(f"{shown(name)} was not found in models/{folder}. Choose a file of the list; press R in "
                           "ComfyUI to refresh it.")
    return path


def shown(value: Any) -> str:
    """A value in a sentence: numbers and texts as they are written, of anything else what it is."""
    if value is None or isinstance(value, bool | int | float):
        return str(value)
    return repr(value[:SHOWN]) if isinstance(value, str) else type(value).__name__


def _kind(item: io.Int.Input | io.Float.Input) -> str:
    return "a whole number" if isinstance(item, io.Int.Input) else "a number"


def _is_number(value: Any, item: io.Int.Input | io.Float.Input) -> bool:
    kinds = int if isinstance(item, io.Int.Input) else int | float
    return isinstance(value, kinds) and item.min <= value <= item.max


def _is_latent(value: Any) -> bool:
    samples = value.get("samples") if isinstance(value, dict) else None
    return torch.is_tensor(samples) or getattr(samples, "is_nested", False)
