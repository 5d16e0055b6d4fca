"""Import the pack and ComfyUI into this process, the way ComfyUI loads a custom node, without a server."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

from . import comfyui
from .common import ROOT, DevError

PACKAGE = "ovi_native"


def import_pack() -> ModuleType:
    """Make `comfy` and the pack (as `ovi_native`) importable and register Ovi with ComfyUI's model list.

    Runs on the CPU where there is no CUDA device. Raises DevError if no ComfyUI is found.
    """
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    module = load_package()
    choose_device()
    importlib.import_module(f"{PACKAGE}.ovi_model.ovi.supported_models").register()
    return module


def load_package() -> ModuleType:
    """Make ComfyUI and the pack importable and no more: quick, since neither torch nor the models are imported."""
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    found = comfyui.find()
    if found is None:
        raise DevError("No ComfyUI found. Run `python3 tools/dev.py setup` first, or set COMFYUI_PATH.")
    # The pack's own `nodes` folder would shadow ComfyUI's nodes.py if the repository root came first.
    sys.path[:] = [str(found.path)] + [p for p in sys.path if p not in ("", str(ROOT), str(found.path))]

    spec = importlib.util.spec_from_file_location(
        PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
    return module


def choose_device() -> None:
    """Tell ComfyUI to use the CPU where PyTorch has no CUDA device; its own default would fail at import."""
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
