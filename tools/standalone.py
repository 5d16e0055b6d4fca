"""Modules of the pack that need no ComfyUI, loaded without the rest of it."""

import importlib
import sys
from pathlib import Path
from types import ModuleType


def standalone(name: str, folder: str = "ovi_model") -> ModuleType:
    """The module of that name below one of the pack's folders, such as "ovi.catalogue"."""
    alone = f"{folder}_alone"
    if alone not in sys.modules:
        package = ModuleType(alone)
        package.__path__ = [str(Path(__file__).resolve().parent.parent / folder)]
        sys.modules[alone] = package
    return importlib.import_module(f"{alone}.{name}")
