"""Opening weight files safely.

Nothing here runs code from a file: safetensors carry none, and the pickles of PyTorch's files are not run
(`pickles.py`, `torch_files.py`). Nothing here takes much more memory than the file is long: what it says of itself is
checked against its length before anything is allocated for it, and its tensors are mapped into memory, not read.
"""

import json
import math
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path

import comfy.utils
import safetensors
import torch

from .names import printable
from .pickles import MOST_AXES
from .torch_files import MOST_TENSORS, load_pickle

StateDict = dict[str, torch.Tensor]

LARGEST_HEADER = 16 << 20  # bytes of names and metadata; five times what the largest of these models needs
MOST_PARTS = 500_000  # values in a header; as Python's objects they take up to a hundred bytes each
LONGEST_NAME = 500

# What the files of these models hold, under the names of safetensors.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}

UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, AssertionError,
               ArithmeticError, MemoryError, struct.error, safetensors.SafetensorError)
_SURROGATE = re.compile("[\ud800-\udfff]")
# Parts that torch.compile, FSDP and activation checkpointing put into names.
_SHELLS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def load_weights(path: str | Path, nested: str | None = None) -> tuple[StateDict, dict[str, str]]:
    """Read a `.safetensors`, `.pt`, `.pth` or `.ckpt` file; returns (tensors by name, metadata).

    In a pickle the weights may lie in dictionaries of any names, up to four deep; of several sets of weights the
    averaged ones (a dictionary with "ema" in its name) are preferred, as they are what such projects sample with.
    nested: a prefix of all names that is taken off, such as "generator".
    Raises RuntimeError with a sentence for the user if the file is missing, damaged, unsafe or holds no tensors.
    """
    path = Path(path)
    name = printable(path.name)
    if not path.is_file():
        raise RuntimeError(f"{printable(path)} is not there; check the file name, or press R in ComfyUI to refresh its "
                           "lists.")
    _refuse_placeholder(path)
    safe = path.suffix.lower() in (".safetensors", ".sft")
    if safe and _SURROGATE.search(str(path)):  # the library takes no such name
        raise RuntimeError(f"{printable(path)} cannot be opened: its name is not written in UTF-8. Rename the file or "
                           "folder and choose it again.")
    try:
        tensors, metadata = _load_safetensors(path) if safe else (load_pickle(path), {})
        _check_tensors(tensors, path.stat().st_size)
    except pickle.UnpicklingError as error:
        raise RuntimeError(f"{name} cannot be read as plain weights ({first_line(error)}). Files that carry code "
                           "are never opened; get the safetensors version, or download the file again.") from error
    except UNREADABLE as error:
        raise RuntimeError(f"{name} ({_size(path)}) cannot be read as a weight file ({first_line(error)}). "
                           "It is damaged or only partly downloaded: download it again.") from error
    if not tensors:
        raise RuntimeError(f"{name} holds no tensors; it is not a weight file. Choose another file.")
    return {_plain_name(key, nested): tensor for key, tensor in tensors.items()}, metadata


def _plain_name(name: str, nested: str | None) -> str:
    return _SHELLS.sub("", name).removeprefix(f"{nested}." if nested else "")


# --- safetensors ------------------------------------------------------------------------------------------------------


def _load_safetensors(path: Path) -> tuple[StateDict, dict[str, str]]:
    _check_header(path)
    tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    return tensors, metadata or {}


def _check_header(path: Path) -> None:
    """Raise ValueError unless the header describes tensors that lie in the file side by side.

    The library checks the same and more, but core goes around the library where it streams weights from disk.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, LARGEST_HEADER):
            raise ValueError(f"its header would be {length} bytes long")
        header = parse_json(file.read(length), MOST_PARTS, _integer)
    if not isinstance(header, dict):
        raise ValueError("its header is no table of tensors")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is no table of texts")
    if any(_SURROGATE.search(text) for pair in metadata.items() for text in pair):
        raise ValueError("its metadata is no text")
    end, room = 0, size - 8 - length
    for start, stop in sorted(_extent(entry, room) for entry in header.values()):
        if start != end:
            raise ValueError("its tensors overlap" if start < end else "it has bytes between its tensors")
        end = stop
    if end != room:
        raise ValueError(f"it has {room - end} bytes after its last tensor")


def parse_json(content: bytes, most_parts: int, number: Callable[[str], object] = float) -> object:
    """JSON as strict readers take it, of at most so many values; Python alone would take UTF-16, NaN and names twice.

    number: reads whole and broken numbers. Raises ValueError, or RecursionError if it is nested too deeply.
    """
    if sum(map(content.count, (b",", b"[", b"{"))) > most_parts:
        raise ValueError("it has too many parts")
    return json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_integer, parse_float=number,
                      parse_int=number)


def _integer(text: str) -> int:
    if not re.fullmatch("-?[0-9]{1,19}", text):
        raise ValueError(f"{text[:20]} is no whole number of a file")
    return int(text)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("it has one name twice")
    return table


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
    if not 0 <= start <= stop <= room or stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError("a tensor lies outside the file")
    return start, stop


def _check_tensors(tensors: StateDict, size: int) -> None:
    """Raise ValueError unless the tensors are ordinary and no more than a file of this size can hold.

    Shared weights (an embedding used twice) may count twice.
    """
    if len(tensors) > MOST_TENSORS:
        raise ValueError(f"it holds {len(tensors)} tensors, more than any of these models")
    if any(len(name) > LONGEST_NAME or not name.isprintable() for name in tensors):
        raise ValueError("it has names that are no names of tensors")
    for tensor in tensors.values():
        ordinary = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.ndim <= MOST_AXES
        if not ordinary or tensor.dtype not in DTYPES.values():
            raise ValueError("it holds tensors of a kind that these models do not use")
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * size:
        raise ValueError("its tensors are larger than the file")


# --- what is wrong ----------------------------------------------------------------------------------------------------


def _refuse_placeholder(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(64)
    name = printable(path.name)
    if start.startswith(b"version https://git-lfs"):
        raise RuntimeError(f"{name} is a Git LFS placeholder of {_size(path)}, not the weights; download the file "
                           "itself (`git lfs pull`, or the download button of its page).")
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise RuntimeError(f"{name} is a web page, not a weight file; the download needs the direct link of the "
                           "file (on Hugging Face: `/resolve/`, not `/blob/`).")


def first_line(error: BaseException) -> str:
    """The first sentence of an error, without the advice PyTorch adds about unsafe loading."""
    text = str(error).strip().splitlines()
    return printable(text[0].split(". ")[0][:160] if text else type(error).__name__)


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size} bytes"
