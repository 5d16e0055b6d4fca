"""The pack and the ComfyUI that the other commands use, imported into this process."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import with_comfyui

from . import comfyui
from .common import DevError

PACKAGE = with_comfyui.PACKAGE


def import_pack() -> ModuleType:
    """See `with_comfyui.import_pack`; raises DevError if no ComfyUI is found."""
    return with_comfyui.import_pack(_found())


def load_package() -> ModuleType:
    """See `with_comfyui.load_package`; raises DevError if no ComfyUI is found."""
    return with_comfyui.load_package(_found())


def _found() -> Path:
    found = comfyui.find()
    if found is None:
        raise DevError("No ComfyUI found. Run `python3 tools/dev.py setup` first, or set COMFYUI_PATH.")
    return found.path
