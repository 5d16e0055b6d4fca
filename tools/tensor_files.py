"""Safetensors files with reproducible bytes, and writing that leaves no half file behind.

A file is written under a hidden name beside its own. A run that is killed cannot remove that; the next one that writes
the same file does, unless another process still holds it.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8",
               torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float64: "F64",
               torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}


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
        if spec.dtype not in DTYPE_NAMES:
            raise RuntimeError(f"{name} holds {spec.dtype}, which this tool does not write.")
        offset += spec.nbytes
        header[name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape),
                        "data_offsets": [starts[name], offset]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: data + at for name, at in starts.items()}, data + offset


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in row-major order, without a copy where it is stored so."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def safetensors_chunks(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Iterator[bytes]:
    """The bytes of a safetensors file with a fixed order of keys."""
    header, starts, _ = make_header({name: spec_of(tensor) for name, tensor in tensors.items()}, metadata)
    yield header
    for name in starts:
        yield raw_bytes(tensors[name]).tobytes()


def open_part(path: Path) -> tuple[Path, BinaryIO]:
    """A new hidden file beside `path` to be written in its place, held until it is closed.

    What killed runs left is removed.
    Raises FileExistsError for a link of that name, which would be written through.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        file = part.open("xb")
    except FileExistsError:
        raise FileExistsError(f"{part} is in the way and is a link or folder: delete it, then start again.") from None
    _hold(file)
    return part, file


def remove_leftovers(path: Path) -> None:
    """Remove unfinished files for `path` that no process holds any more."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.\d+\.part")
    for entry in list(path.parent.iterdir()) if path.parent.is_dir() else []:
        if not pattern.fullmatch(entry.name):
            continue
        with suppress(OSError):  # gone, or open elsewhere, where Windows refuses
            if stat.S_ISREG(entry.lstat().st_mode):
                with entry.open("rb") as file:
                    free = _hold(file)
                if free:
                    entry.unlink()


def _hold(file: BinaryIO) -> bool:
    """Claim a file until it is closed or this process ends; False if another process has. Windows needs no claim."""
    if os.name == "nt":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


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
    part, file = open_part(path)
    try:
        with file:
            file.writelines(chunks)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
