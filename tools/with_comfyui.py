"""Import the pack and ComfyUI into this process, the way ComfyUI loads a custom node, without a server."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ovi_native"


def comfyui_here() -> Path:
    """COMFYUI_PATH, else the ComfyUI that has this folder in its custom_nodes, else the one that set-up fetched.

    Raises RuntimeError if there is none.
    """
    named = os.environ.get("COMFYUI_PATH", "").strip()
    places = [Path(named).expanduser()] if named else [Path(os.path.abspath(__file__)).parents[3], ROOT / ".comfyui"]
    for place in places:
        if (place / "main.py").is_file() and (place / "comfy").is_dir():
            return place
    raise RuntimeError(f"There is no ComfyUI in {' or '.join(map(str, places))}: set COMFYUI_PATH to the folder that "
                       "holds ComfyUI's main.py, or run `python3 tools/dev.py setup` first.")


def import_pack(comfyui: Path) -> ModuleType:
    """Make `comfy` and the pack (as `ovi_native`) importable and register Ovi with ComfyUI's model list.

    Runs on the CPU where there is no CUDA device.
    """
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    module = load_package(comfyui)
    choose_device()
    importlib.import_module(f"{PACKAGE}.ovi_model.ovi.supported_models").register()
    return module


def load_package(comfyui: Path) -> ModuleType:
    """Make ComfyUI and the pack importable and no more: quick, since neither torch nor the models are imported."""
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    # The pack's own `nodes` folder would shadow ComfyUI's nodes.py if the repository root came first.
    sys.path[:] = [str(comfyui)] + [p for p in sys.path if p not in ("", str(ROOT), str(comfyui))]

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
