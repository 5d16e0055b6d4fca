"""Safetensors files with reproducible bytes, and writing that leaves no half file behind."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import torch

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


def safetensors_chunks(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Iterator[bytes]:
    """The bytes of a safetensors file with a fixed order of keys (the library's own order varies between runs)."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n)):  # widest first keeps all data aligned
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in list(header)[1:]:
        yield tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty when the file is absent, cut short or something else."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > path.stat().st_size:
                return {}
            header = json.loads(file.read(size))
            data = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
            return header.get("__metadata__", {}) if file.tell() + data == path.stat().st_size else {}
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError):
        return {}


def write_atomically(path: Path, chunks: Iterator[bytes]) -> None:
    """Writes beside the target and renames, so that an interrupted run leaves no half file under the real name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            file.writelines(chunks)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
