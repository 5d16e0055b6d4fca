"""Modules of `ovi_model` that need no ComfyUI, loaded without the rest of the pack."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = "ovi_model_alone"


def standalone(name: str) -> ModuleType:
    """The module of that name below `ovi_model`, such as "ovi.catalogue"."""
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE)
        package.__path__ = [str(Path(__file__).resolve().parent.parent / "ovi_model")]
        sys.modules[PACKAGE] = package
    return importlib.import_module(f"{PACKAGE}.{name}")
