"""Encoded clips on disk: a file for each clip's picture, for its sound and for each text.

Three files and not one, so that another caption or another sound encodes nothing else again. A
file's name is a hash of all that its numbers depend on: the clip's own bytes, the size and length,
and the weights of the encoder. Nothing is ever changed under a name. A file is written whole or not
at all, and believed only if its header, its shapes and the hash of its data are right.

The files lie in ComfyUI's folder for what belongs to the system: unlike temp/ it outlives a
restart, and unlike output/ and a user's own folder nothing in it is listed or sent over HTTP.

Values are float16: of what these codecs give (a few units at most) it keeps three more bits than
bfloat16, an eighth of its error, in as many bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import folder_paths
import safetensors
import torch
from torch import Tensor

from ..files.names import first_line, printable
from ..files.safetensors_file import make_header, raw_bytes, spec_of, write_tensors
from ..files.safetensors_header import read_header

FORMAT_KEY, FORMAT = "ovi_training_cache", "1"  # another number when the same input gives others
HASH_KEY = "sha256"
SAMPLED = 256  # values of each tensor that a fingerprint looks at
ENDING = ".safetensors"

Place = tuple[Path, int]  # a file, and which of its pieces


class Damaged(RuntimeError):
    """A file that is there and cannot be used, with the reason."""


def default_folder() -> Path:
    """Where the nodes keep encoded clips."""
    return Path(folder_paths.get_system_user_directory("ovi_native")) / "training_cache"


# --- names ----------------------------------------------------------------------------------------


def entry_path(folder: Path, stream: str, **facts: str | int) -> Path:
    """The file of a stream ("video", "audio", "text") that these facts decide."""
    text = json.dumps({**facts, FORMAT_KEY: FORMAT}, sort_keys=True)
    return folder / f"{stream}-{hashlib.sha256(text.encode()).hexdigest()[:40]}{ENDING}"


def content_hash(paths: Iterable[Path]) -> str:
    """Of the contents of files, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(str(path.stat().st_size).encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def fingerprint(patcher) -> str:
    """Of the weights behind a ModelPatcher as they will compute: names, shapes, kinds and values.

    256 values spread over each tensor are looked at, so that 11 GB take a moment; another training,
    precision or LoRA differs in all of them.
    """
    digest = hashlib.sha256()
    for name, value in sorted(patcher.model.state_dict().items()):
        kept = patcher.backup.get(name)  # a patched weight's own values
        _digest(digest, name)
        _digest(digest, value if kept is None else kept.weight)
    for name, patches in sorted(patcher.patches.items(), key=lambda pair: str(pair[0])):
        _digest(digest, str(name))
        _digest(digest, [patch[:3] for patch in patches])
    return digest.hexdigest()


def _digest(digest, value: Any) -> None:
    """Add what a value is to a hash."""
    if hasattr(value, "_qdata"):  # core's quantised tensors
        _digest(digest, [value._qdata, vars(value._params)])
    elif torch.is_tensor(value):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        flat = value.detach().reshape(-1)
        picked = flat[::max(1, len(flat) // SAMPLED)][:SAMPLED + 1].cpu().contiguous()
        digest.update(picked.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        _digest(digest, sorted(value.items(), key=lambda pair: str(pair[0])))
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for part in value:
            _digest(digest, part)
    elif hasattr(value, "weights"):  # core's weight adapters
        _digest(digest, [type(value).__name__, value.weights])
    else:
        digest.update(f"{value!r};".encode() if isinstance(value, str | int | float | None)
                      else type(value).__name__.encode())


# --- files ----------------------------------------------------------------------------------------


def write(path: Path, pieces: Sequence[Tensor], name: str) -> None:
    """Keep the pieces of a clip's stream.

    RuntimeError if they are not finite or the disk takes no more.
    """
    tensors = {f"{index:06}": piece.detach().half().cpu().contiguous()
               for index, piece in enumerate(pieces)}
    if not all(torch.isfinite(piece).all() for piece in tensors.values()):
        raise RuntimeError(f"What the encoder made of {printable(name)} is not finite (NaN or "
                           "infinite): start ComfyUI with --bf16-vae or --fp32-vae, or load "
                           "another file of the encoder.")
    texts = {FORMAT_KEY: FORMAT, HASH_KEY: _data_hash(tensors)}
    try:
        write_tensors(path, tensors, texts)
    except OSError as error:
        raise RuntimeError("The cache of encoded clips cannot be written to "
                           f"{printable(path.parent)} ({error}). Make room there; what was encoded "
                           "so far is kept.") from error


def _data_hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in make_header({name: spec_of(tensor) for name, tensor in tensors.items()}, {})[1]:
        digest.update(raw_bytes(tensors[name]))
    return digest.hexdigest()


def check(path: Path, like: Sequence[int | None]) -> list[tuple[int, ...]] | None:
    """The shapes of a file's pieces, after all its data was compared with its hash.

    like: the shape of each, None for a side that may have any length. None if there is no file;
    raises Damaged if it is not as it was written.
    """
    if not path.is_file():
        return None
    try:
        texts = read_header(path).metadata
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        right = texts.get(HASH_KEY) == _data_hash(tensors)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise Damaged(first_line(error)) from error
    if texts.get(FORMAT_KEY) != FORMAT or not right:
        raise Damaged("its data is not what was written")
    for tensor in tensors.values():
        fits = tensor.ndim == len(like) and all(
            side in (None, length) for side, length in zip(like, tensor.shape, strict=True))
        if not fits or not tensor.numel() or tensor.dtype != torch.float16:
            raise Damaged(f"it holds {tensor.dtype} of shape {list(tensor.shape)}")
    return [tuple(tensor.shape) for tensor in tensors.values()]


def read(place: Place) -> Tensor:
    """A piece in float32. RuntimeError if its file is gone or was changed since it was checked."""
    path, index = place
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.get_tensor(f"{index:06}").float()
    except (OSError, safetensors.SafetensorError) as error:
        raise RuntimeError(f"{path.name} of the training cache is gone or damaged "
                           f"({first_line(error)}). Run 'Ovi Dataset' again: it makes what is "
                           "missing (change one of its settings if ComfyUI takes it as "
                           "done).") from error
