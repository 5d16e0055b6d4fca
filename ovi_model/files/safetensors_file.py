"""Writing safetensors files: the same tensors always give the same bytes, and no half file is left behind."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .disk import open_part, write_atomically
from .safetensors_header import DTYPES

TORCH_DTYPES = {code: getattr(torch, name) for code, (name, _) in DTYPES.items()}
CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """What a file's header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def spec_of(tensor: torch.Tensor) -> Spec:
    return Spec(tensor.dtype, tuple(tensor.shape))


def make_header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Return (header, where each tensor starts in the file, size of the file), with a fixed order of keys.

    The library's own order varies between runs. Widest first keeps all data aligned. Names in the order of the data.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    starts: dict[str, int] = {}
    offset = 0
    for name in sorted(specs, key=lambda n: (-specs[n].dtype.itemsize, n)):
        spec, starts[name] = specs[name], offset
        if spec.dtype not in CODES:
            raise RuntimeError(f"{name} holds {spec.dtype}, which is not written to files.")
        offset += spec.nbytes
        header[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape),
                        "data_offsets": [starts[name], offset]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: data + at for name, at in starts.items()}, data + offset


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in row-major order, without a copy where it is stored so and on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def safetensors_chunks(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Iterator[bytes]:
    """The bytes of a safetensors file with a fixed order of keys."""
    header, starts, _ = make_header({name: spec_of(tensor) for name, tensor in tensors.items()}, metadata)
    yield header
    for name in starts:
        yield raw_bytes(tensors[name]).tobytes()


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a file, whole or not at all, of tensors on any device. OSError if the disk does not take it."""
    write_atomically(path, safetensors_chunks(tensors, metadata))


class StreamedFile:
    """A safetensors file written tensor by tensor, in any order, in a `with` block; needs its specs beforehand.

    Lies under its own name only once complete: leaving the block by an exception removes what was written.
    publish: gives the finished file its name; the default replaces a file that has it.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str],
                 publish: Callable[[Path, Path], object] = os.replace):
        self.path, self.specs, self.metadata, self._publish = path, dict(specs), dict(metadata), publish
        self.missing = set(self.specs)
        header, self._starts, self.size = make_header(self.specs, self.metadata)
        self._data = len(header)

    def __enter__(self) -> StreamedFile:
        self._partial, self._file = open_part(self.path)
        self._file.truncate(self.size)
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor; RuntimeError if it is not what the specs announced."""
        if name not in self.missing or spec_of(tensor) != self.specs[name]:
            raise RuntimeError(f"{self.path.name}: {name} {spec_of(tensor)} was not announced so "
                               f"({self.specs.get(name)}), or is written twice.")
        self.missing.remove(name)
        self._file.seek(self._starts[name])
        self._file.write(raw_bytes(tensor))

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                if self.missing:
                    raise RuntimeError(f"{self.path.name}: {len(self.missing)} tensors were never written "
                                       f"({min(self.missing)}, ...).")
                header = make_header(self.specs, self.metadata)[0]
                if len(header) != self._data:
                    raise RuntimeError(f"{self.path.name}: its metadata changed length while it was written.")
                self._file.seek(0)
                self._file.write(header)
            self._file.close()
            if kind is None:
                self._publish(self._partial, self.path)
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)
