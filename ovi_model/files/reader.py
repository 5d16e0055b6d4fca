"""Opening weight files safely.

Nothing here runs code from a file: safetensors carry none, and the pickles of PyTorch's files are not run
(`pickles.py`, `torch_files.py`). Nothing here takes much more memory than the file is long: what it says of itself is
checked against its length before anything is allocated for it, and its tensors are mapped into memory, not read.
"""

import pickle
import re
import struct
from pathlib import Path

import comfy.utils
import safetensors
import torch

from .disk import human
from .names import first_line, printable
from .safetensors_file import CODES
from .safetensors_header import MOST_AXES, SURROGATE, is_safetensors, read_header
from .torch_files import MOST_TENSORS, load_pickle

StateDict = dict[str, torch.Tensor]

LONGEST_NAME = 500

UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, AssertionError,
               ArithmeticError, MemoryError, struct.error, safetensors.SafetensorError)
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
    safe = is_safetensors(path)
    if safe and SURROGATE.search(str(path)):  # the library takes no such name
        raise RuntimeError(f"{printable(path)} cannot be opened: its name is not written in UTF-8. Rename the file or "
                           "folder and choose it again.")
    try:
        tensors, metadata = _load_safetensors(path) if safe else (load_pickle(path), {})
        _check_tensors(tensors, path.stat().st_size)
    except pickle.UnpicklingError as error:
        raise RuntimeError(f"{name} cannot be read as plain weights ({first_line(error)}). Files that carry code "
                           "are never opened; get the safetensors version, or download the file again.") from error
    except UNREADABLE as error:
        raise RuntimeError(f"{name} ({human(path.stat().st_size)}) cannot be read as a weight file "
                           f"({first_line(error)}). It is damaged or only partly downloaded: download it again."
                           ) from error
    if not tensors:
        raise RuntimeError(f"{name} holds no tensors; it is not a weight file. Choose another file.")
    return {_plain_name(key, nested): tensor for key, tensor in tensors.items()}, metadata


def _plain_name(name: str, nested: str | None) -> str:
    return _SHELLS.sub("", name).removeprefix(f"{nested}." if nested else "")


# --- safetensors ------------------------------------------------------------------------------------------------------


def _load_safetensors(path: Path) -> tuple[StateDict, dict[str, str]]:
    read_header(path)
    tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    return tensors, metadata or {}


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
        if not ordinary or tensor.dtype not in CODES:
            raise ValueError("it holds tensors of a kind that these models do not use")
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * size:
        raise ValueError("its tensors are larger than the file")


# --- what is wrong ----------------------------------------------------------------------------------------------------


def _refuse_placeholder(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(64)
    name = printable(path.name)
    if start.startswith(b"version https://git-lfs"):
        raise RuntimeError(f"{name} is a Git LFS placeholder of {human(path.stat().st_size)}, not the weights; "
                           "download the file itself (`git lfs pull`, or the download button of its page).")
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise RuntimeError(f"{name} is a web page, not a weight file; the download needs the direct link of the "
                           "file (on Hugging Face: `/resolve/`, not `/blob/`).")
