"""The five files of the tiny bundle, below ComfyUI's models folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from standalone import standalone

from .audio import audio_vae, vocoder
from .checkpoint import ovi_checkpoint
from .draws import Tensors
from .text_encoder import text_encoder
from .video_vae import video_vae

safetensors_chunks = standalone("files.safetensors_file").safetensors_chunks
read_metadata = standalone("files.safetensors_header").read_metadata
write_atomically = standalone("files.disk").write_atomically

VERSION = "1"  # bump when the contents change, so that bundles written earlier are replaced

FILES: dict[str, Callable[[int], Tensors]] = {
    "diffusion_models/ovi_tiny_random.safetensors": ovi_checkpoint,
    "text_encoders/ovi_tiny_random_umt5.safetensors": text_encoder,
    "vae/ovi_tiny_random_taew2_2.safetensors": video_vae,
    "vae/ovi_tiny_random_mmaudio_vae.safetensors": audio_vae,
    "vae/ovi_tiny_random_mmaudio_vocoder.safetensors": vocoder,
}


def make_bundle(models_dir: Path, seed: int = 0, force: bool = False) -> list[Path]:
    """Writes what is missing (everything with `force`) below `models_dir` and returns the paths written.

    A file of the same name with another seed or from another version of this tool is replaced.
    """
    metadata = {"format": "pt", "ovi_tiny_random": "true", "ovi_tiny_version": VERSION, "seed": str(seed)}
    missing = [name for name in FILES if force or read_metadata(models_dir / name) != metadata]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small draws: on a busy machine threads only wait for each other
    try:
        for name in missing:
            write_atomically(models_dir / name, safetensors_chunks(FILES[name](seed), metadata))
    finally:
        torch.set_num_threads(threads)
    return [models_dir / name for name in missing]
