"""The files of the trained tiny Ovi: packed ones in the repository, and what they become in ComfyUI's model folders."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).resolve().parent.parent.parent / "assets" / "tiny_ovi"
FILES = {
    "model": "diffusion_models/ovi_tiny_world.safetensors",
    "text_encoder": "text_encoders/ovi_tiny_world_umt5.safetensors",
    "video_vae": "vae/ovi_tiny_world_taew2_2.safetensors",
    "audio_vae": "vae/ovi_tiny_world_mmaudio_vae.safetensors",
    "vocoder": "vae/ovi_tiny_world_mmaudio_vocoder.safetensors",
}
"""Role: path below the models folder."""
