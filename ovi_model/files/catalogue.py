"""Published weight files: what is known of each, and what of a list of them a machine lacks.

Which files a model family has stands in the family's own table. Where a file's SHA-256 is publicly known apart from the
host that serves it, the table pins it, together with a commit that holds it; the others can only be checked against the
hash that the host itself tells, and lists say so. Only the standard library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .disk import human
from .names import printable


@dataclass(frozen=True)
class WeightFile:
    """One published file: `path` in the Hugging Face repository `repo`, kept in ComfyUI's model folder `folder`."""

    id: str
    role: str
    repo: str
    path: str
    folder: str
    size: int  # bytes, as published; a download asks for the real size
    sha256: str | None = None  # pinned; None: only the Hub's own is known
    revision: str | None = None  # the commit that holds it; None: the newest
    licence: str = "licence unknown"  # of the weights, as those who trained them name it

    @property
    def name(self) -> str:
        """The file's own name, here and there."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Need:
    """One role of a workflow: what is here for it, and the file to download when nothing is."""

    file: WeightFile
    what: str  # the role in words
    found: tuple[str, ...]  # names below ComfyUI's folders; empty when missing
    partial: int = 0  # bytes kept from an interrupted download

    @property
    def present(self) -> bool:
        return bool(self.found)

    def line(self) -> str:
        """One line of a list for people."""
        if self.present:
            return f"✔ {self.what}: {' + '.join(map(printable, self.found))} ({self.file.licence})"
        kept = f", {human(self.partial)} of it here" if self.partial else ""
        return (f"✘ {self.what}: {self.file.name} ({human(self.file.size)}{kept}, {self.file.licence}) "
                f"from {self.file.repo}")


def own_name(name: str) -> str:
    """A file's name without its folder, whichever way the slashes lean."""
    return re.split(r"[/\\]", name)[-1]


def first_served(names: Sequence[str], alternatives: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The first alternative whose files are all among `names`; () if none is.

    An alternative is a pattern for each of its files, for the whole name without its folder, case ignored.
    """
    for patterns in alternatives:
        found = [next((name for name in names if re.fullmatch(pattern, own_name(name), re.I)), None)
                 for pattern in patterns]
        if all(found):
            return tuple(name for name in found if name)
    return ()


def pick(table: Mapping[str, WeightFile], ids: Iterable[str]) -> list[WeightFile]:
    """The files of these ids, each once; ValueError for an id that is not in the table."""
    files = {}
    for id in ids:
        if id not in table:
            raise ValueError(f"Unknown file {id!r}: expected ids of this pack's table, such as {next(iter(table))}.")
        files[id] = table[id]
    return list(files.values())


def unpinned(files: Iterable[WeightFile]) -> str:
    """What people should know of these files' hashes before they download them; empty if all are pinned."""
    names = [file.name for file in files if file.sha256 is None]
    if not names:
        return ""
    return f"Checked against the Hub's own hash only, since no other is known to this pack: {', '.join(names)}."


def missing(listed: Iterable[Need]) -> list[WeightFile]:
    """The files to download."""
    return [need.file for need in listed if not need.present]


def bytes_to_fetch(listed: Iterable[Need]) -> int:
    """Bytes still to be downloaded, by the published sizes."""
    return sum(max(0, need.file.size - need.partial) for need in listed if not need.present)
