"""What every program asks that writes large files beside others: whose file is this, is there room, is the name free.

A file is written under a hidden name beside its own (`.NAME.PID.part`). A run that is killed cannot remove that; the
next one that writes the same file does, unless another process still holds it. Only the standard library.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def human(size: float) -> str:
    """A size for people, in the decimal units of download pages: 23.3 GB."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= step:
            return f"{size / step:.1f} {unit}" if size < 100 * step else f"{size / step:.0f} {unit}"
    return f"{size:.0f} bytes"


# --- room -------------------------------------------------------------------------------------------------------------


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def free_bytes(path: Path) -> int:
    """Free space on the disk that holds, or will hold, `path`."""
    return shutil.disk_usage(existing_parent(path)).free


def shortages(wanted: Iterable[tuple[Path, int]]) -> list[tuple[Path, int, int]]:
    """Disks that cannot take all of `wanted` (path, bytes to write); each as (a folder on it, needed, free)."""
    needed: dict[int, int] = {}
    folders: dict[int, Path] = {}
    for path, size in wanted:
        place = existing_parent(path.parent)
        device = place.stat().st_dev
        needed[device] = needed.get(device, 0) + size
        folders.setdefault(device, place)
    return [(folder, needed[device], free) for device, folder in folders.items()
            if needed[device] > (free := free_bytes(folder))]


# --- names ------------------------------------------------------------------------------------------------------------


def is_plain(path: Path) -> bool:
    """Whether this is a file of its own: no link to another place, no second name of another file, no device."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_nlink <= 1


def put_in_place(finished: Path, target: Path) -> None:
    """Rename within a folder, at once, without ever replacing a file: FileExistsError if the name is taken."""
    if os.name == "nt":  # where renaming refuses a taken name by itself
        os.rename(finished, target)
        return
    try:
        os.link(finished, target)
    except FileExistsError:
        raise
    except OSError:  # a disk whose files have one name each: take the name first, then move onto it
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.replace(finished, target)
    else:
        finished.unlink()


# --- unfinished files -------------------------------------------------------------------------------------------------


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


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Writes beside the target and renames, so that an interrupted run leaves no half file under the real name."""
    part, file = open_part(path)
    try:
        with file:
            file.writelines(chunks)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
