"""Reading PyTorch's own files (`.pt`, `.pth`, `.ckpt`): a pickle, and the bytes of the storages its tensors look at.

Two layouts are read: the zip of PyTorch 1.6 and later (`<root>/data.pkl`, `<root>/data/<key>`), whose storages are
mapped into memory, and the one before it (five pickles, then the storages), whose storages are copied. There is one
pickle with weights, read once (`pickles.py`), so that what is checked is what is read. What it says is checked against
the file's length before a tensor is made of it, and only the tensors that are asked for are made.
"""

import io
import mmap
import re
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch

from .pickles import LARGEST_PICKLE, Unpickler, View

LARGEST_DIRECTORY = 4 << 20  # bytes of a zip's table of contents, about 80 a tensor
MOST_TENSORS = 10_000  # twice what a quantised Ovi model has
DEPTH = 4  # of dictionaries around the weights

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch.serialization's MAGIC_NUMBER, PROTOCOL_VERSION

_EMA = re.compile(r"(?<![a-z])ema(?![a-z])")


@dataclass
class Place:
    """Where a storage's bytes lie in the file."""

    start: int
    length: int


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a PyTorch file: its fullest dictionary of tensors, or an averaged one ("ema") of similar size.

    The dictionaries may lie in others of any names, up to four deep. Raises pickle.UnpicklingError if the file uses
    what weights do not need, ValueError if it is damaged. Takes no more memory than a few times the pickle's length
    besides the tensors themselves. Stops when the user cancels.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        content, places = _read_zip(file, path) if zipped else _read_legacy(file)
        return _Storages(file, places, zipped and not comfy.utils.DISABLE_MMAP).tensors(_choose(content))


def _choose(content: object) -> dict[str, View]:
    found = list(_sets(content, set()))
    most = max((len(views) for _, views in found), default=0)
    found = [item for item in found if 2 * len(item[1]) >= most]
    return max(found, key=lambda item: (bool(_EMA.search(item[0].lower())), len(item[1])), default=("", {}))[1]


def _sets(content: object, seen: set[int], path: str = "") -> Iterator[tuple[str, dict[str, View]]]:
    """Every dictionary with tensors in a file, with the names of the dictionaries it lies in."""
    if not isinstance(content, dict) or id(content) in seen or path.count("\0") > DEPTH:
        return
    seen.add(id(content))
    views = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, View)}
    if views:
        yield path, views
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _sets(value, seen, f"{path}\0{str(name)[:100]}")


# --- the two layouts --------------------------------------------------------------------------------------------------


class _Bounded(io.FileIO):
    """A file that gives no more at once than a zip's table of contents may have."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > LARGEST_DIRECTORY:
            raise ValueError("its table of contents is too long")
        return super().read(LARGEST_DIRECTORY if size is None or size < 0 else size) or b""


def _read_zip(file: io.BufferedReader, path: Path) -> tuple[object, dict[str, Place]]:
    """The content of `data.pkl` and where the storages lie. PyTorch looks names up without case: so is done here."""
    try:
        with _Bounded(path) as bounded, zipfile.ZipFile(bounded) as archive:
            records = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError("its end is missing or damaged") from error
    if len({record.filename.lower() for record in records}) < len(records):
        raise ValueError("it holds two parts of one name")
    if any(record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size
           or record.flag_bits & 1 for record in records):
        raise ValueError("its parts are compressed or encrypted")
    pickles = [record for record in records if re.fullmatch(r"[^/]+/data\.pkl", record.filename.lower())]
    if len(pickles) != 1 or not pickles[0].filename.endswith("data.pkl"):
        raise ValueError(f"it has {len(pickles)} pickles that PyTorch could take for its data.pkl")
    root = pickles[0].filename.removesuffix("data.pkl")
    size = path.stat().st_size
    order = next((record for record in records if record.filename == f"{root}byteorder"), None)
    if order is not None and _part(file, _place(file, order, size), 16) != b"little":
        raise ValueError("it was written on a machine with another order of bytes")
    content = Unpickler(io.BytesIO(_part(file, _place(file, pickles[0], size), LARGEST_PICKLE))).load()
    data = {record.filename.removeprefix(f"{root}data/"): record for record in records
            if record.filename.startswith(f"{root}data/")}
    return content, _Places(file, data, size)


class _Places(dict):
    """Places of a zip's storages by key, looked up in the file when they are asked for."""

    def __init__(self, file: io.BufferedReader, records: dict[str, zipfile.ZipInfo], size: int) -> None:
        super().__init__()
        self.file, self.records, self.size = file, records, size

    def __missing__(self, key: str) -> Place:
        place = self[key] = _place(self.file, self.records[key], self.size)
        return place


def _place(file: io.BufferedReader, record: zipfile.ZipInfo, size: int) -> Place:
    """Where a part's bytes lie, behind its own header, whose length the table of contents does not tell."""
    file.seek(record.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError("a part lies outside the file")
    start = record.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    if start + record.file_size > size:
        raise ValueError("a part lies outside the file")
    return Place(start, record.file_size)


def _part(file: io.BufferedReader, place: Place, largest: int) -> bytes:
    if place.length > largest:
        raise ValueError(f"a part of it has {place.length} bytes")
    file.seek(place.start)
    return file.read(place.length)


def _read_legacy(file: io.BufferedReader) -> tuple[object, dict[str, Place]]:
    """The layout before PyTorch 1.6: three pickles that say how it was written, the weights, the storages' keys."""
    head = file.read(512)
    file.seek(0)
    if head[257:262] == b"ustar":
        raise ValueError("it is a tar archive, as PyTorch wrote before 2017")
    reader = Unpickler(file)
    if reader.load() != LEGACY_MAGIC or reader.load() != LEGACY_PROTOCOL:
        raise ValueError("it does not begin as PyTorch's files do")
    machine = reader.load()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("it was written on a machine with another order of bytes")
    content, keys = reader.load(), reader.load()
    if not isinstance(keys, list):
        raise ValueError("its list of storages is missing")
    size, places = file.seek(0, io.SEEK_END), {}
    at = reader.source.at
    for key in keys:
        file.seek(at)
        count = file.read(8)
        storage = reader.storages.get(key) if isinstance(key, str) else None
        if storage is None or len(count) < 8 or struct.unpack("<q", count)[0] != storage.numel or key in places:
            raise ValueError("its list of storages is damaged")
        places[key] = Place(at + 8, storage.numel * storage.dtype.itemsize)
        at += 8 + places[key].length
        if at > size:
            raise ValueError("a storage lies outside the file")
    return content, places


class _Storages:
    """Tensors from the storages of a file, mapped or copied, each storage once."""

    def __init__(self, file: io.BufferedReader, places: dict[str, Place], mapped: bool) -> None:
        self.file, self.places, self.mapped = file, places, mapped
        self.left = file.seek(0, io.SEEK_END)  # bytes that may still be copied: parts of a zip can lie over each other
        self.whole: torch.UntypedStorage | None = None
        self.opened: dict[str, torch.UntypedStorage] = {}

    def tensors(self, views: dict[str, View]) -> dict[str, torch.Tensor]:
        if len(views) > MOST_TENSORS:
            raise ValueError(f"it holds {len(views)} tensors, more than any of these models")
        try:
            return {name: self._tensor(view) for name, view in views.items()}
        except KeyError as error:
            raise ValueError("the values of a tensor are missing") from error

    def _tensor(self, view: View) -> torch.Tensor:
        key = view.storage.key
        if key not in self.opened:
            comfy.model_management.throw_exception_if_processing_interrupted()
            self.opened[key] = self._open(self.places[key])
        last = view.offset + sum((n - 1) * step for n, step in zip(view.shape, view.stride, strict=True))
        bytes_needed = 0 if 0 in view.shape else (last + 1) * view.dtype.itemsize
        if bytes_needed > min(self.opened[key].nbytes(), view.storage.numel * view.storage.dtype.itemsize):
            raise ValueError("a tensor lies outside its storage")
        empty = torch.empty(0, dtype=view.dtype)
        if not bytes_needed:
            return empty.reshape(view.shape)
        return empty.set_(self.opened[key], view.offset, view.shape, view.stride)

    def _open(self, place: Place) -> torch.UntypedStorage:
        if self.mapped and place.start % 8 == 0 and place.length:
            if self.whole is None:
                content = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY)  # any name; private
                self.whole = torch.frombuffer(content, dtype=torch.uint8).untyped_storage()
            return self.whole[place.start:place.start + place.length]
        self.left -= place.length
        if self.left < 0:
            raise ValueError("its tensors are larger than the file")
        buffer = torch.empty(place.length, dtype=torch.uint8)
        self.file.seek(place.start)
        if self.file.readinto(memoryview(buffer.numpy())) != place.length:
            raise ValueError("a storage lies outside the file")
        return buffer.untyped_storage()
