"""Which weight files the demo takes: real ones if they are there, else the trained tiny Ovi."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from standalone import standalone

from .common import ROOT, RUN, STATE, DevError, locked, run_logged, say

MODELS = RUN / "models"
SHIPPED = ROOT / "assets" / "tiny_ovi"
MAKE_TINY, INSTALL_TINY = ROOT / "tools" / "make_tiny.py", ROOT / "tools" / "install_tiny.py"

# role: (folder below models/, file name)
TINY_FILES = {
    "model": ("diffusion_models", "ovi_tiny_random.safetensors"),
    "text_encoder": ("text_encoders", "ovi_tiny_random_umt5.safetensors"),
    "video_vae": ("vae", "ovi_tiny_random_taew2_2.safetensors"),
    "audio_vae": ("vae", "ovi_tiny_random_mmaudio_vae.safetensors"),
    "vocoder": ("vae", "ovi_tiny_random_mmaudio_vocoder.safetensors"),
}
TINY = {role: name for role, (_, name) in TINY_FILES.items()}
"""The tiny random bundle, for tests: its output is noise."""
WORLD_FILES = {role: (folder, name.replace("_random", "_world")) for role, (folder, name) in TINY_FILES.items()}
WORLD = {role: name for role, (_, name) in WORLD_FILES.items()}
"""The trained tiny Ovi: its output is the toy world of docs/tiny-world.md."""


def names_table() -> ModuleType:
    """The pack's table of files and their names."""
    return standalone("ovi.catalogue")


def choose(offered: Mapping[str, Sequence[str]], model: str | None = None) -> dict[str, str]:
    """Real weights out of the files `offered` for each role, or a tiny model's where there is none.

    `model` asks for one by name, a tiny one too. Raises DevError when it is not offered, or when a model has no
    companion of a role.
    """
    for tiny in (TINY, WORLD):
        if model is not None and model == tiny["model"]:
            return dict(tiny)
    if model is not None:
        named = [name for name in offered.get("model", ()) if model in (name, Path(name.replace("\\", "/")).name)]
        if not named:
            listed = ", ".join(offered.get("model", ())) or "none"
            raise DevError(f"There is no model {model} in the model folders (found: {listed}): put it into "
                           f"{MODELS / 'diffusion_models'} or set COMFYUI_PATH to the ComfyUI that has it.")
    else:
        named = names_table().best_model(offered.get("model", ()))
        if not named:
            return dict(WORLD)
    table, chosen = names_table(), {"model": named[0]}
    for role in ("text_encoder", "video_vae", "audio_vae", "vocoder"):
        # A tokenizer that goes with the file is the loader's concern, which knows more places for it.
        found = table.first_served(offered.get(role, ()), [patterns[:1] for patterns in table.COMPANIONS[role]])
        if not found:
            folder = MODELS / TINY_FILES[role][0]
            raise DevError(f"The model {named[0]} is there but no {table.ROLES[role]}: put one into {folder}, or ask "
                           f"for the tiny model with --model {WORLD['model']}.")
        chosen[role] = found[0]
    return chosen


def ensure_tiny(python: Path, models: Path = MODELS) -> None:
    """Write the tiny random bundle below `models` unless this version of it is there already."""
    parts = [MAKE_TINY, *sorted((MAKE_TINY.parent / "tiny").glob("*.py"))]
    _ensure(models, ".ovi_tiny", TINY_FILES, parts, [python, MAKE_TINY, models],
            "Writing the tiny random models (no trained weights: their output is noise).")


def ensure_world(python: Path, models: Path = MODELS) -> None:
    """The same for the trained tiny Ovi, and its first frame in the input folder beside."""
    (models.parent / "input").mkdir(parents=True, exist_ok=True)
    parts = [INSTALL_TINY, *sorted((ROOT / "tools" / "tiny_ovi").glob("*.py")), *sorted(SHIPPED.iterdir())]
    _ensure(models, ".ovi_tiny_world", WORLD_FILES, parts, [python, INSTALL_TINY, models],
            "Writing the trained tiny Ovi.")


def _ensure(models: Path, mark_name: str, files: Mapping[str, tuple[str, str]], parts: Sequence[Path],
            command: Sequence[str | Path], sentence: str) -> None:
    """Run the command unless all files are there and were written by the `parts` as they are."""
    mark = models / mark_name
    wanted = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    with locked(STATE / "tiny.lock", "Another run is writing the tiny models; waiting for it."):
        complete = all((models / folder / name).is_file() for folder, name in files.values())
        if complete and mark.is_file() and mark.read_text("utf-8") == wanted:
            return
        say(sentence)
        run_logged(command, "writing the tiny models")
        mark.write_text(wanted, "utf-8")
