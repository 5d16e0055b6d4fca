"""Write the tiny model bundle: small random-weight files in the public upstream layouts.

The bundle lets the whole pipeline (loaders, sampler, decoders) run anywhere in seconds. Its output is noise with
noise for sound; no file in it comes from a trained checkpoint. Five files go into ComfyUI's own model folders:

    diffusion_models/ovi_tiny_random.safetensors            joint checkpoint, `video_model.*` and `audio_model.*`
    text_encoders/ovi_tiny_random_umt5.safetensors          UMT5 in ComfyUI's layout, tokenizer inside
    vae/ovi_tiny_random_taew2_2.safetensors                 48-channel TAEHV, stands in for the Wan2.2 VAE
    vae/ovi_tiny_random_mmaudio_vae.safetensors             MMAudio 16 kHz VAE, raw upstream names
    vae/ovi_tiny_random_mmaudio_vocoder.safetensors         BigVGAN vocoder, raw upstream names with weight norm

Every number comes from the seed and the tensor's name alone, as uniform draws, so that the bytes do not depend on the
machine or on the order of generation. Needs torch and sentencepiece (both are ComfyUI requirements).

    python tools/make_tiny.py MODELS_DIR [--seed 0] [--force]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tiny.bundle import FILES, make_bundle


def main(arguments: list[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the tiny random-weight model bundle (its output is noise).")
    parser.add_argument("models_dir", type=Path, help="ComfyUI's models folder")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other noise (default 0)")
    parser.add_argument("--force", action="store_true", help="write the files even when they are there")
    options = parser.parse_args(arguments)
    try:
        written = make_bundle(options.models_dir, options.seed, options.force)
    except OSError as error:
        print(f"Cannot write the tiny models to {options.models_dir}: {error.strerror or error}. "
              "Free some space or pass a folder you may write to.", file=sys.stderr)
        return 1
    for name in FILES:
        path = options.models_dir / name
        state = "written" if path in written else "present"
        print(f"{state}  {path.stat().st_size / 1e6:6.1f} MB  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
