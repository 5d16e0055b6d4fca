"""Write the trained tiny Ovi, which this pack ships, into ComfyUI's model folders.

It knows a toy world of bouncing balls and speaking faces (docs/tiny-world.md), and nothing else. Five files:

    diffusion_models/ovi_tiny_world.safetensors             joint checkpoint, `video_model.*` and `audio_model.*`
    text_encoders/ovi_tiny_world_umt5.safetensors           UMT5 in ComfyUI's layout, tokenizer inside
    vae/ovi_tiny_world_taew2_2.safetensors                  48-channel TAEHV, stands in for the Wan2.2 VAE
    vae/ovi_tiny_world_mmaudio_vae.safetensors              MMAudio 16 kHz VAE
    vae/ovi_tiny_world_mmaudio_vocoder.safetensors          BigVGAN vocoder

and where the folder beside has an `input` as ComfyUI's does, a first frame, `input/ovi_tiny_world.png`, and clips to
train a LoRA on, drawn on the spot: `input/ovi_tiny_purple_ball`, 48 mp4s with captions. The pack holds the models in a
quarter of the space. Needs torch, safetensors, numpy and PyAV, which ComfyUI has.

    python tools/install_tiny.py MODELS_DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tiny_ovi.files import install


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the trained tiny Ovi into ComfyUI's model folders.")
    parser.add_argument("models_dir", type=Path, help="ComfyUI's models folder")
    options = parser.parse_args(arguments)
    try:
        written = install(options.models_dir)
    except OSError as error:
        print(f"Cannot write the tiny models to {options.models_dir}: {error.strerror or error}. "
              "Free some space or pass a folder you may write to.", file=sys.stderr)
        return 1
    for path in written:
        files = path.iterdir() if path.is_dir() else [path]
        print(f"{sum(file.stat().st_size for file in files) / 1e6:6.1f} MB  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
