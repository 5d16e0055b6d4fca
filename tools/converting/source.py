"""One input file, read a few layers at a time.

Weight files are mapped into memory, and what was once touched stays resident while the mapping lasts. So a file is
opened anew every `SITTING` bytes: that bounds the memory, and costs a fraction of a second per opening.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from ovi_native.ovi_model.files.reader import StateDict, load_weights
from ovi_native.ovi_model.ovi import checkpoint, layouts

SITTING = 256 * 1024 * 1024
SMALL = 4096  # elements up to which a value is kept from the first look at the file: records, scales, markers
MARKER = "scaled_fp8"
_LEAF = re.compile(r"\.(weight\._data|weight\._scale|[^.]+)$")  # quanto stores one matrix as two tensors


class Source:
    """A checkpoint file, joint or one half."""

    def __init__(self, path: str):
        """Look at the file without reading its weights.

        Raises RuntimeError with a sentence if it is no Ovi checkpoint.
        """
        self.path, self.name = path, Path(path).name
        tensors, self._metadata = load_weights(path)
        # Pickles from before 2020 are no archives and cannot be mapped: opened again, they would be read again.
        self._mapped = self.name.lower().endswith((".safetensors", ".sft")) or zipfile.is_zipfile(path)
        self._small = {key: tensor.clone() for key, tensor in tensors.items() if tensor.numel() <= SMALL}
        self._specs = {key: (tensor.dtype, tuple(tensor.shape), tensor.nbytes) for key, tensor in tensors.items()}
        self.part = checkpoint.make_part(self.name, self._stand_ins(self._specs, "meta"), self._metadata)
        self._wrapper = layouts.find_towers(tensors)[0]
        landmarks = [key for key in tensors if layouts.find_towers({key: tensors[key]})[1:] != (None, None)]
        self._landmarks = {key: torch.empty(self._specs[key][1], device="meta") for key in landmarks}
        self._records = json.loads(self._metadata.get("_quantization_metadata") or "{}").get("layers")

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, _, nbytes in self._specs.values())

    def layers(self) -> list[list[str]]:
        """The file's keys, grouped by the layer they belong to."""
        groups: dict[str, list[str]] = {}
        for key in self._specs:
            groups.setdefault(_LEAF.sub("", key), []).append(key)
        return list(groups.values())

    def rehearse(self) -> Iterator[StateDict]:
        """Every layer in core's form, with zeros for its weights."""
        for keys in self.layers():
            yield self.to_core(self._stand_ins(keys, "cpu"))

    def read(self, on_bytes: Callable[[int], None]) -> Iterator[StateDict]:
        """Every layer in core's form; on_bytes is told how much of the file each took."""
        for sitting in self._sittings():
            tensors, _ = load_weights(self.path)
            for keys in sitting:
                yield self.to_core({key: tensors[key] for key in keys})
                on_bytes(self._bytes(keys))
            del tensors

    def to_core(self, tensors: StateDict) -> StateDict:
        """Bring a few of the file's tensors to core's names and records, exactly as the loader does the whole file."""
        context: StateDict = dict(self._landmarks)
        context |= {key: value for key, value in self._small.items() if key.endswith(MARKER)}
        converted, _ = layouts.read_towers({**context, **tensors}, self._metadata_of(tensors), self.name)
        return {key: tensor for key, tensor in converted.items() if not tensor.is_meta}

    def _metadata_of(self, tensors: StateDict) -> dict[str, str]:
        """The file's metadata with the quantisation records of these layers only."""
        if self._records is None:
            return self._metadata
        layers = {_LEAF.sub("", key) for key in tensors}
        layers |= {name.removeprefix(self._wrapper) for name in layers}
        kept = {name: value for name, value in self._records.items() if name in layers}
        return {**self._metadata, "_quantization_metadata": json.dumps({"layers": kept})}

    def _stand_ins(self, keys, device: str) -> StateDict:
        """Tensors of the right shape that take no memory: on the meta device, or one zero repeated."""
        out = {}
        for key in keys:
            dtype, shape, _ = self._specs[key]
            if key in self._small:
                out[key] = self._small[key]
            elif device == "meta":
                out[key] = torch.empty(shape, dtype=dtype, device=device)
            else:
                out[key] = torch.zeros(1, dtype=dtype).expand(shape)
        return out

    def _sittings(self) -> Iterator[list[list[str]]]:
        """The layers in portions of about SITTING bytes."""
        portion: list[list[str]] = []
        size = 0
        for keys in self.layers():
            if self._mapped and portion and size + self._bytes(keys) > SITTING:
                yield portion
                portion, size = [], 0
            portion.append(keys)
            size += self._bytes(keys)
        if portion:
            yield portion

    def _bytes(self, keys: list[str]) -> int:
        return sum(self._specs[key][2] for key in keys)


class Digest(threading.Thread):
    """SHA-256 of a file, computed beside the conversion."""

    def __init__(self, path: str):
        super().__init__(daemon=True)
        self.path, self._hex = path, ""
        self._error: OSError | None = None

    def run(self) -> None:
        digest = hashlib.sha256()
        try:
            with open(self.path, "rb") as file:
                while block := file.read(8 << 20):
                    digest.update(block)
            self._hex = digest.hexdigest()
        except OSError as error:
            self._error = error

    def result(self) -> str:
        """Wait for it; raises OSError if the file could not be read to its end."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._hex
