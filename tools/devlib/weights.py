"""Which weight files the demo takes: real ones if they are there, else the tiny random bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from standalone import standalone

from .common import ROOT, RUN, STATE, DevError, locked, run_logged, say

MODELS = RUN / "models"
MAKE_TINY = ROOT / "tools" / "make_tiny.py"

# role: (folder below models/, file name)
TINY_FILES = {
    "model": ("diffusion_models", "ovi_tiny_random.safetensors"),
    "text_encoder": ("text_encoders", "ovi_tiny_random_umt5.safetensors"),
    "video_vae": ("vae", "ovi_tiny_random_taew2_2.safetensors"),
    "audio_vae": ("vae", "ovi_tiny_random_mmaudio_vae.safetensors"),
    "vocoder": ("vae", "ovi_tiny_random_mmaudio_vocoder.safetensors"),
}
TINY = {role: name for role, (_, name) in TINY_FILES.items()}
VARIANTS = ("960x960_5s", "960x960_10s", "720x720_5s")  # in the order in which the demo prefers them


def names_table() -> ModuleType:
    """The pack's table of files and their names."""
    return standalone("ovi.catalogue")


def choose(offered: Mapping[str, Sequence[str]], model: str | None = None) -> dict[str, str] | None:
    """Real weights out of the files `offered` for each role, or None when there is no real model.

    `model` asks for one by name. Raises DevError when it is not offered, or when a model has no companion of a role.
    """
    tiny = set(TINY.values())
    if model is not None:
        named = [name for name in offered.get("model", ()) if model in (name, Path(name.replace("\\", "/")).name)]
        if not named:
            listed = ", ".join(offered.get("model", ())) or "none"
            raise DevError(f"There is no model {model} in the model folders (found: {listed}): put it into "
                           f"{MODELS / 'diffusion_models'} or set COMFYUI_PATH to the ComfyUI that has it.")
        if named[0] in tiny:
            return None
    else:
        named = best_model(offered.get("model", ()))
        if not named:
            return None
    table, chosen = names_table(), {"model": named[0]}
    for role in ("text_encoder", "video_vae", "audio_vae", "vocoder"):
        # A tokenizer that goes with the file is the loader's concern, which knows more places for it.
        found = table.first_served(offered.get(role, ()), [patterns[:1] for patterns in table.COMPANIONS[role]])
        if not found:
            folder = MODELS / TINY_FILES[role][0]
            raise DevError(f"The model {named[0]} is there but no {table.ROLES[role]}: put one into {folder}, or ask "
                           f"for the tiny model with --model {TINY['model']}.")
        chosen[role] = found[0]
    return chosen


def best_model(names: Sequence[str]) -> list[str]:
    """The file or files of the first whole model among `names`; [] if there is none."""
    table = names_table()
    return next((list(found) for variant in VARIANTS
                 if (found := table.model_files(variant, names))), [])


def ensure_tiny(python: Path, models: Path = MODELS) -> None:
    """Write the tiny bundle below `models` unless this version of it is there already."""
    mark = models / ".ovi_tiny"
    parts = [MAKE_TINY, *sorted((MAKE_TINY.parent / "tiny").glob("*.py"))]
    wanted = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    with locked(STATE / "tiny.lock", "Another run is writing the tiny models; waiting for it."):
        complete = all((models / folder / name).is_file() for folder, name in TINY_FILES.values())
        if complete and mark.is_file() and mark.read_text("utf-8") == wanted:
            return
        say("Writing the tiny random models (no trained weights: their output is noise).")
        run_logged([python, MAKE_TINY, models], "writing the tiny models")
        mark.write_text(wanted, "utf-8")
