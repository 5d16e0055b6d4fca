"""The files of the trained tiny Ovi: packed ones in the repository, and what they become in ComfyUI's model folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from standalone import standalone
from tiny.sizes import upstream_layout

from .clip_files import LESSON, write_lesson
from .packing import expand, pack
from .zero_channels import expand as expand_taehv

safetensors_chunks = standalone("files.safetensors_file").safetensors_chunks
write_atomically = standalone("files.disk").write_atomically

SHIPPED = Path(__file__).resolve().parent.parent.parent / "assets" / "tiny_ovi"
FILES = {
    "model": "diffusion_models/ovi_tiny_world.safetensors",
    "text_encoder": "text_encoders/ovi_tiny_world_umt5.safetensors",
    "video_vae": "vae/ovi_tiny_world_taew2_2.safetensors",
    "audio_vae": "vae/ovi_tiny_world_mmaudio_vae.safetensors",
    "vocoder": "vae/ovi_tiny_world_mmaudio_vocoder.safetensors",
}
"""Role: path below the models folder."""
FIRST_FRAME = "first_frame.png"
INPUT = "ovi_tiny_world.png"
"""The first frame's name among what is shipped, and below ComfyUI's input folder."""
VARIANT = {"ovi_variant": "960x960_5s"}


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def averaged_weights(path: Path) -> dict[str, torch.Tensor]:
    """The averaged weights of a checkpoint of `Trainer`, by the network's names."""
    with safe_open(path, "pt") as file:
        return {name.removeprefix("average."): file.get_tensor(name) for name in file.keys()
                if name.startswith("average.")}


def ship(work: Path, checkpoint: str, shipped: Path = SHIPPED) -> list[Path]:
    """Pack what `train_tiny.py` made in `work` into the repository; what was not made there stays as it is.

    Returns the paths written.
    """
    shipped.mkdir(parents=True, exist_ok=True)
    made = {"text_encoder": work / "umt5.safetensors", "video_vae": work / "vcodec" / "tiny_ovi_video_vae.safetensors",
            "audio_vae": work / "acodec" / "tiny_ovi_mmaudio_vae.safetensors",
            "vocoder": work / "acodec" / "tiny_ovi_mmaudio_vocoder.safetensors"}
    sources = {role: read(path) for role, path in made.items() if path.exists()}
    if (work / f"{checkpoint}.safetensors").exists():
        sources["model"] = pack(upstream_layout(averaged_weights(work / f"{checkpoint}.safetensors"))), VARIANT
    for role, (tensors, metadata) in sources.items():
        save_file(tensors, shipped / f"{role}.safetensors", {**metadata, "format": "pt"})
    shutil.copyfile(work / "bases.safetensors", shipped / "bases.safetensors")  # for more training
    return [shipped / f"{role}.safetensors" for role in sources]


def unpacked(role: str, shipped: Path = SHIPPED) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What a packed file becomes: tensors in a public layout, and metadata."""
    tensors, metadata = read(shipped / f"{role}.safetensors")
    if role == "model":
        tensors = expand(tensors, torch.bfloat16)
    if role == "video_vae":
        tensors = expand_taehv(tensors)
    return tensors, {**metadata, "ovi_tiny_world": "true"}


def install(models: Path, shipped: Path = SHIPPED) -> list[Path]:
    """Write the five files below ComfyUI's models folder; where there is an input folder beside it, the first frame and
    a folder of clips to train on as well. Returns their paths.

    Each model file is there whole or not at all.
    """
    for role, name in FILES.items():
        write_atomically(models / name, safetensors_chunks(*unpacked(role, shipped)))
    paths = [models / name for name in FILES.values()]
    if (models.parent / "input").is_dir():
        paths.append(models.parent / "input" / INPUT)
        shutil.copyfile(shipped / FIRST_FRAME, paths[-1])
        paths.append(write_lesson(models.parent / "input" / LESSON))
    return paths
