"""ComfyUI's model folders: which weight files lie there, where a download belongs, and what is left of broken ones."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

from .catalogue import WeightFile
from .disk import is_plain

SMALLEST = 1_000_000  # bytes; anything smaller is a Git LFS pointer or an error page under a weight file's name


def held(folder: str) -> dict[str, Path]:
    """All files in a model folder that are big enough, by name, fresh from the disk, whatever they end in."""
    found: dict[str, Path] = {}
    for root in folder_paths.get_folder_paths(folder):
        names, _ = folder_paths.recursive_search(root, [".git"])
        for name in sorted(names):
            path = Path(root) / name
            try:
                if path.stat().st_size >= SMALLEST:
                    found.setdefault(name, path)
            except OSError:  # a link to a file that is gone
                continue
    return found


def target(file: WeightFile) -> Path:
    """Where the file belongs: in the first of ComfyUI's folders for its kind, but not in a folder kept for old names.

    ComfyUI lists `models/unet` before `models/diffusion_models`.
    """
    roots = folder_paths.get_folder_paths(file.folder)
    old = {os.path.join(folder_paths.models_dir, name) for name in ("unet", "clip")}
    return Path(next((root for root in roots if root not in old), roots[0])) / file.name


def partial_path(path: Path, sha256: str) -> Path:
    """Where an unfinished download of `path` is kept; the hash in its name keeps two releases of a file apart."""
    return path.with_name(f".{path.name}.{sha256[:12]}.part")


def partials(path: Path) -> list[Path]:
    """All unfinished downloads of `path`."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{12}}\.part")
    if not path.parent.is_dir():
        return []
    return [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name) and is_plain(entry)]


def partial_bytes(path: Path) -> int:
    """Size of the largest unfinished download of `path`."""
    return max((entry.stat().st_size for entry in partials(path)), default=0)
