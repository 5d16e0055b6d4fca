"""Which weight files are whose: the names in circulation, and the tiny random bundle that stands in for them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

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

# role: names in circulation, best first; matched without regard to case against the name without its folders
KNOWN = {
    "model": (
        r"model_960x960(_10s)?\.safetensors", r"model\.safetensors", r"model_fp8_e4m3fn\.safetensors",
        r"(?!.*(tiny|lora|video|audio|vae)).*\bovi[_-].*\.safetensors", r"(?!.*(tiny|lora|vae)).*-ovi_.*\.safetensors",
    ),
    "text_encoder": (r"umt5_xxl_fp16\.safetensors", r"umt5_xxl_fp8_e4m3fn_scaled\.safetensors",
                     r"umt5-xxl-enc-.*\.safetensors", r"models_t5_umt5-xxl-enc-bf16\.pth"),
    "video_vae": (r"wan2[._]2_vae(_bf16)?\.(safetensors|pth)",),
    "audio_vae": (r"v1-16\.pth", r"mmaudio_vae_16k_(fp32|bf16)\.safetensors"),
    "vocoder": (r"best_netg\.pt", r"mmaudio_vocoder_bigvgan_best_netg_(fp32|bf16)\.safetensors"),
}
WHAT = {"model": "Ovi model", "text_encoder": "UMT5-XXL text encoder", "video_vae": "Wan 2.2 video VAE",
        "audio_vae": "MMAudio 16 kHz VAE", "vocoder": "BigVGAN vocoder"}


def variant_of(model_name: str) -> str:
    """The variant that a model file's name promises."""
    name = model_name.lower()
    if "960x960" not in name:
        return "720x720_5s"
    return "960x960_10s" if "10s" in name else "960x960_5s"


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
        found = best(offered.get("model", ()), KNOWN["model"])
        if found is None:
            return None
        named = [found]
    chosen = {"model": named[0]}
    for role in ("text_encoder", "video_vae", "audio_vae", "vocoder"):
        name = best(offered.get(role, ()), KNOWN[role])
        if name is None:
            folder = TINY_FILES[role][0]
            raise DevError(f"The model {named[0]} is there but no {WHAT[role]}: put one into {MODELS / folder}, or ask "
                           f"for the tiny model with --model {TINY['model']}.")
        chosen[role] = name
    return chosen


def best(names: Sequence[str], patterns: Sequence[str]) -> str | None:
    """The first of `names` that matches the earliest of `patterns`; sub-folders in a name do not count."""
    for pattern in patterns:
        for name in names:
            if re.fullmatch(pattern, re.split(r"[/\\]", name)[-1], re.I):
                return name
    return None


def ensure_tiny(python: Path, models: Path = MODELS) -> None:
    """Write the tiny bundle below `models` unless this version of it is there already."""
    mark = models / ".ovi_tiny"
    wanted = hashlib.sha256(MAKE_TINY.read_bytes()).hexdigest()
    with locked(STATE / "tiny.lock", "Another run is writing the tiny models; waiting for it."):
        complete = all((models / folder / name).is_file() for folder, name in TINY_FILES.values())
        if complete and mark.is_file() and mark.read_text("utf-8") == wanted:
            return
        say("Writing the tiny random models (no trained weights: their output is noise).")
        run_logged([python, MAKE_TINY, models], "writing the tiny models")
        mark.write_text(wanted, "utf-8")
