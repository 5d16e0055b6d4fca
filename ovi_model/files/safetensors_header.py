"""The header of safetensors files: a length, then JSON with each tensor's dtype, shape and place, and texts.

Read as far as its own length, and checked before anything is believed of it. Only the standard library: names and texts
of a file of 23 GB cost a few hundred kilobytes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .strict_json import parse_json, whole_number

LARGEST_HEADER = 16 << 20  # bytes of names and metadata; five times what the largest of these models needs
MOST_PARTS = 500_000  # values in a header; as Python's objects they take up to a hundred bytes each
MOST_AXES = 8

# What the files of these models hold: PyTorch's name of the dtype, and its bytes.
DTYPES = {"F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
          "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "I64": ("int64", 8), "I32": ("int32", 4),
          "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1), "BOOL": ("bool", 1)}

SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    names: tuple[str, ...]
    metadata: dict[str, str]


def is_safetensors(path: str | Path) -> bool:
    """Whether a file is of this kind, by its name."""
    return str(path).lower().endswith((".safetensors", ".sft"))


def raw_header(path: Path, largest: int = LARGEST_HEADER) -> bytes:
    """The JSON of a file's header; ValueError if it would be longer than the file or than `largest`."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(path.stat().st_size - 8, largest):
            raise ValueError(f"its header would be {length} bytes long")
        return file.read(length)


def read_header(path: Path, largest: int = LARGEST_HEADER, most_parts: int = MOST_PARTS) -> Header:
    """The header of a file whose tensors lie in it side by side and fill it; ValueError for any other.

    The library checks the same and more, but core goes around the library where it streams weights from disk.
    """
    raw = raw_header(path, largest)
    header = parse_json(raw, most_parts, whole_number)
    if not isinstance(header, dict):
        raise ValueError("its header is no table of tensors")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is no table of texts")
    if any(SURROGATE.search(text) for pair in metadata.items() for text in pair):
        raise ValueError("its metadata is no text")
    end, room = 0, path.stat().st_size - 8 - len(raw)
    for start, stop in sorted(_extent(entry, room) for entry in header.values()):
        if start != end:
            raise ValueError("its tensors overlap" if start < end else "it has bytes between its tensors")
        end = stop
    if end != room:
        raise ValueError(f"it has {room - end} bytes after its last tensor")
    return Header(tuple(header), metadata)


def read_metadata(path: Path, key: str = "") -> dict[str, str]:
    """The texts in a file's header; none when the file is absent, cut short or something else.

    key: of a text that is looked for: a header without it is not taken apart, which most of the time goes into.
    """
    try:
        found = path.stat()
        return dict(_metadata(path, key, found.st_size, found.st_mtime_ns)) if is_safetensors(path) else {}
    except (OSError, ValueError, RecursionError):
        return {}


@lru_cache(maxsize=1024)
def _metadata(path: Path, key: str, _size: int, _changed: int) -> dict[str, str]:
    """What lists ask again and again, of a file in one state."""
    try:
        return read_header(path).metadata if key.encode() in raw_header(path) else {}
    except (ValueError, RecursionError):
        return {}


def _extent(entry: object, room: int) -> tuple[int, int]:
    """Where a tensor of a header starts and stops in the data, which is `room` bytes long."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)], **more} if not more:
            pass
        case _:
            raise ValueError("its header is incomplete")
    if any(type(n) is not int for n in (*shape[:MOST_AXES], start, stop)):  # True is an int too
        raise ValueError("its header is incomplete")
    if dtype not in DTYPES:
        raise ValueError(f"it holds tensors of the kind {dtype[:20]!r}, which these models do not use")
    if len(shape) > MOST_AXES or not all(0 <= n <= room for n in shape):
        raise ValueError("a tensor is larger than the file")
    if not 0 <= start <= stop <= room or stop - start != math.prod(shape) * DTYPES[dtype][1]:
        raise ValueError("a tensor lies outside the file")
    return start, stop
