"""Two questions of every program that writes large files beside others: whose file is this, and is the name still free.

Only the standard library.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


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
