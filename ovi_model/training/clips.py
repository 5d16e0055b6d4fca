"""Finds the clips of a folder, and the caption of each. Nothing is decoded here.

What shares a name makes a clip, in the folder itself or in folders below it:

    walk.mp4 (.mov .webm .mkv)   picture, and sound if it has any
    walk/ 0001.png 0002.png ...  or: the picture as frames (.png .jpg), 24 a second
    walk.wav (.flac)             its sound, in place of the video's own; alone: no picture
    walk.txt                     its caption

A sound may also lie among the frames. Captions may stand in one `captions.csv` or `captions.jsonl`
of the folder instead (`file`, `caption`); a clip's own `.txt` goes first. Hidden files and links to
folders are passed over.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..files.names import printable

VIDEO_FORMATS = {".mp4": "mov", ".mov": "mov", ".webm": "matroska", ".mkv": "matroska"}
SOUND_FORMATS = {".wav": "wav", ".flac": "flac"}
PICTURES = (".png", ".jpg", ".jpeg")
TABLES = ("captions.csv", "captions.jsonl")
LARGEST_CAPTION = 100_000  # bytes; the encoder reads 512 tokens
LARGEST_TABLE = 256 << 20


@dataclass(frozen=True)
class Clip:
    """A clip on disk: picture, sound or both, and what is said of it."""

    name: str  # its path in the folder, with slashes and without ending
    caption: str
    video: Path | None = None
    frames: tuple[Path, ...] = ()
    sound: Path | None = None  # None: that of the video, if there is any

    @property
    def has_picture(self) -> bool:
        return self.video is not None or bool(self.frames)


@dataclass(frozen=True)
class Fault:
    """What was left out, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.name)}: {printable(self.reason)}"


@dataclass
class Group:
    """Files of one name."""

    videos: list[Path] = field(default_factory=list)
    frames: list[Path] = field(default_factory=list)
    sounds: list[Path] = field(default_factory=list)
    caption: Path | None = None


def find_clips(folder: Path) -> tuple[list[Clip], list[Fault]]:
    """The clips of a folder in the order of their names, and what cannot be one.

    Raises ValueError if the folder is none, or its table of captions cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{printable(folder)} is no folder. Choose one that holds clips.")
    table, faults = read_table(folder)
    groups = find_groups(folder)
    clips = []
    for name, group in sorted(groups.items(), key=lambda pair: natural(pair[0])):
        if group.videos or group.frames or group.sounds:
            try:
                clips.append(make_clip(name, group, table))
            except ValueError as error:
                faults.append(Fault(name, str(error)))
    known = {name for name, group in groups.items() if group.videos or group.frames or group.sounds}
    faults += [Fault(name, "the table of captions names it, and there is no such clip")
               for name in table if name not in known]
    return clips, faults


def find_groups(folder: Path) -> dict[str, Group]:
    """Files by the name of their clip."""
    groups: dict[str, Group] = {}
    for place, names in walk(folder):
        here = place.relative_to(folder).as_posix()
        paths = [place / name for name in names]
        videos = [path for path in paths if path.suffix.lower() in VIDEO_FORMATS]
        frames = [path for path in paths if path.suffix.lower() in PICTURES]
        are_frames = bool(frames) and not videos and here != "."
        if are_frames:
            groups.setdefault(here, Group()).frames = frames
        for path in paths:
            ending = path.suffix.lower()
            name = path.relative_to(folder).with_suffix("").as_posix()
            if ending in VIDEO_FORMATS:
                groups.setdefault(name, Group()).videos.append(path)
            elif ending in SOUND_FORMATS:
                groups.setdefault(here if are_frames else name, Group()).sounds.append(path)
            elif ending == ".txt":
                groups.setdefault(name, Group()).caption = path
    return groups


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders that are not hidden, each with its files in the order people count in."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural)
        yield Path(place), sorted((name for name in names if not name.startswith(".")), key=natural)


def natural(name: str) -> list:
    """A key by which frame2 comes before frame10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part)
            for part in re.split(r"(\d+)", name) if part]


def make_clip(name: str, group: Group, table: dict[str, str]) -> Clip:
    """The clip of a group; ValueError with the reason if it is ambiguous or has no caption."""
    pictures = [*group.videos, *([group.frames[0].parent] if group.frames else [])]
    for several in (pictures, group.sounds):
        if len(several) > 1:
            names = " and ".join(printable(path.name) for path in several)
            raise ValueError(f"{names} have one name: rename or remove all but one")
    caption = read_caption(group.caption) if group.caption else table.get(name)
    if caption is None:
        raise ValueError(f"it has no caption: write {printable(PurePosixPath(name).name)}.txt "
                         "beside it, or a line of captions.csv")
    if not caption.strip():
        raise ValueError("its caption is empty: write what is seen and heard")
    return Clip(name, caption.strip(), group.videos[0] if group.videos else None,
                tuple(group.frames), group.sounds[0] if group.sounds else None)


def read_caption(path: Path) -> str:
    """A text file; ValueError if it is none."""
    try:
        with path.open("rb") as file:
            return _decode(file.read(LARGEST_CAPTION + 1), LARGEST_CAPTION)
    except (OSError, ValueError) as error:
        raise ValueError(f"its caption {printable(path.name)} cannot be read ({error})") from error


def _decode(content: bytes, largest: int) -> str:
    if len(content) > largest:
        raise ValueError(f"it is longer than {largest:,} bytes")
    return content.decode("utf-8-sig")


# --- one table for all clips ----------------------------------------------------------------------


def read_table(folder: Path) -> tuple[dict[str, str], list[Fault]]:
    """Captions by the name of their clip, and lines that are none. ValueError for no such table."""
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(tables) > 1:
        raise ValueError(f"There are both {TABLES[0]} and {TABLES[1]} in {printable(folder.name)}: "
                         "keep one of them.")
    if not tables:
        return {}, []
    path = tables[0]
    try:
        with path.open("rb") as file:
            text = _decode(file.read(LARGEST_TABLE + 1), LARGEST_TABLE)
        rows = list(_csv_rows(text) if path.suffix == ".csv" else _json_rows(text))
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{path.name} cannot be read ({error}). It needs UTF-8 text with "
                         "'file' and 'caption' for each clip.") from error
    captions: dict[str, str] = {}
    faults = []
    for line, row in rows:
        cells = row if isinstance(row, dict) else {}
        named, caption = cells.get("file"), cells.get("caption")
        name = clip_name(named) if isinstance(named, str) and named.strip() else None
        if name is None or not isinstance(caption, str):
            faults.append(Fault(f"{path.name}, line {line}", "it needs texts 'file' and 'caption'"))
        elif captions.setdefault(name, caption) != caption:
            faults.append(Fault(f"{path.name}, line {line}", f"{name} has another one already"))
    return captions, faults


def _csv_rows(text: str) -> Iterator[tuple[int, object]]:
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
    columns = [(name or "").strip().lower() for name in reader.fieldnames or ()]
    if not {"file", "caption"} <= set(columns):
        raise ValueError(f"its first line names the columns {', '.join(columns) or 'none'}")
    reader.fieldnames = columns
    for row in reader:
        yield reader.line_num, row


def _json_rows(text: str) -> Iterator[tuple[int, object]]:
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                yield line, json.loads(content)
            except (ValueError, RecursionError):
                yield line, None


def clip_name(file: str) -> str:
    """What a table calls a clip, as its name: `sub\\walk.mp4` is sub/walk."""
    path = PurePosixPath(file.strip().replace("\\", "/"))
    known = {*VIDEO_FORMATS, *SOUND_FORMATS}
    return (path.with_suffix("") if path.suffix.lower() in known else path).as_posix()
