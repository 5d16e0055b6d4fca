"""Peak memory of decoding short and long latents, piece by piece into an mp4 and whole; run by test_video_vae.py.

A process of its own, because memory once used by other tests hides what decoding takes, and started with
MALLOC_MMAP_THRESHOLD_=131072, so that freed tensors go back to the system at once and do not depend on what glibc has
learnt before. Writes JSON to the standard output: bytes by which the peak exceeds what was in use before.
"""

import ctypes
import functools
import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import conftest  # noqa: F401 (puts ComfyUI and the pack where they can be imported)
import torch
from ovi_native.ovi_model.media.mp4 import write_mp4
from ovi_native.ovi_model.media.video_vae import decode_chunks
from tiny import wan_vae


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    line, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) << 10


def peak_of(function) -> int:
    """Bytes by which the process grows at most during a call."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the recorded peak
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def main() -> None:
    vae = wan_vae.small_vae(width=2)
    latents = torch.randn(1, 48, 61, 8, 8, generator=torch.Generator().manual_seed(0))

    def stream(frames: int) -> None:
        write_mp4(decode_chunks(vae, latents[:, :, :frames]), 24, torch.zeros(1, 160000), 16000, 23.0)

    def whole(frames: int) -> None:
        vae.decode(latents[:, :, :frames])

    stream(4)  # libraries allocate on first use
    peaks = {f"{function.__name__} {frames}": peak_of(functools.partial(function, frames))
             for function in (stream, whole) for frames in (16, 61)}
    sys.stdout.write(json.dumps(peaks))


main()
