"""Decoding into an mp4, encoding beside the decoder against one after the other: `python benchmarks/decode.py`.

Three kinds of decoder make the frames: the tiny stand-in TAEHV and the Wan2.2 VAE (real layers at a small width; on a
CUDA device the real size in bf16), which compete with x264 for the cores of a CPU; and an emulated "device", which
leaves the CPU alone as a GPU does: it sleeps half, once and twice as long as x264 takes for a chunk. Its frames are
moving stripes with grain: x264's time depends on what they show. Printed: seconds one after the other, the ratio to
that with 1 and 2 chunks ahead, and the share of time in which the decoder stood still.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure
import subjects
import torch

Chunks = Callable[[], Iterable[torch.Tensor]]
FRAMES, QUICK_FRAMES = 121, 13


def stripes(frames: int, height: int, width: int) -> list[torch.Tensor]:
    """Chunks [1 or 4, height, width, 3] in 0..1, in memory as a decoder leaves them (channels first)."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    pictures = []
    for t in range(frames):
        picture = torch.stack([torch.sin(x / 17 + t / 9 + torch.sin(y / 40)), torch.sin(y / 15 + t / 5),
                               torch.sin((x + y) / 50 - t / 7)])  # [3, H, W]
        pictures.append(0.5 + 0.4 * picture + 0.02 * torch.randn(1, height, width, generator=generator))
    return [torch.stack(part).clamp_(0, 1).movedim(1, -1) for part in
            (pictures[:1], *(pictures[i:i + 4] for i in range(1, frames, 4)))]


def paced(chunks: list[torch.Tensor], pace: float) -> Iterator[torch.Tensor]:
    """The chunks after `pace` seconds each, in which the CPU is free."""
    for chunk in chunks:
        time.sleep(pace)
        yield chunk


def decoders(device: torch.device, size: int, frames: int) -> dict[str, Chunks]:
    """Real decoders, by name, of square clips with random weights and random latents."""
    import comfy.sd
    from ovi_native.ovi_model.media.video_vae import decode_chunks
    from tiny import wan_vae
    from tiny.video_vae import video_vae

    wan = real_wan() if device.type == "cuda" else wan_vae.small_vae()
    vaes = {"taehv": comfy.sd.VAE(sd=video_vae(0)), "wan": wan}
    latents = wan_vae.latents((frames + 3) // 4, 1, size // 16, size // 16)
    return {name: lambda vae=vae: decode_chunks(vae, latents) for name, vae in vaes.items()}


def real_wan():
    """Core's Wan2.2 VAE with random weights, in the precision core chooses for the device."""
    import comfy.sd
    from comfy.ldm.wan.vae2_2 import WanVAE
    from tiny import wan_vae

    with torch.device("meta"):
        shapes = {name: value.shape for name, value in WanVAE(**wan_vae.CONFIG).state_dict().items()}
    return comfy.sd.VAE(sd={name: 0.02 * torch.randn(shape) for name, shape in shapes.items()})


class Writer:
    """Writes clips and keeps the share of time for which the decoder was not asked for anything."""

    def __init__(self) -> None:
        self.idle: dict[str, list[float]] = {}

    def write(self, name: str, chunks: Chunks, ahead: int) -> None:
        from ovi_native.ovi_model.media.mp4 import write_mp4

        waited, start = 0.0, time.perf_counter()

        def watched() -> Iterator[torch.Tensor]:
            nonlocal waited
            for chunk in chunks():
                given = time.perf_counter()
                yield chunk
                del chunk
                waited += time.perf_counter() - given

        write_mp4(watched(), 24, torch.zeros(1, 80_000), 16_000, 23.0, ahead)
        self.idle.setdefault(name, []).append(waited / (time.perf_counter() - start))

    def compare(self, name: str, chunks: Chunks, runs: int) -> dict[str, Any]:
        ways = {f"{name}, {ahead} ahead": ahead for ahead in (0, 1, 2)}
        timings = measure.alternate(
            {way: lambda way=way, ahead=ahead: self.write(way, chunks, ahead) for way, ahead in ways.items()}, runs)
        first, *others = ways
        return {"decoder": name, "seconds": timings.seconds(first),
                **{f"ratio_{ways[way]}": timings.ratio(way, over=first) for way in others},
                **{f"idle_{ahead}": measure.Spread.of(self.idle[way]) for way, ahead in ways.items()}}


def run(args: argparse.Namespace, size: int, device: torch.device) -> list[dict[str, Any]]:
    rows = []
    frames = QUICK_FRAMES if args.quick else FRAMES
    with torch.inference_mode():
        writer = Writer()
        for name, chunks in decoders(device, size, frames).items():
            rows.append(writer.compare(name, chunks, args.runs))
        ready = stripes(frames, size, size)
        encode = measure.alternate({"x264": lambda: writer.write("x264", lambda: ready, 0)}, args.runs).seconds("x264")
        for share in (0.5, 1, 2):
            pace = share * encode.median / len(ready)
            rows.append(writer.compare(f"device, {share:g} x x264", lambda pace=pace: paced(ready, pace), args.runs))
    return rows


def main() -> int:
    parser = measure.arguments(__doc__, runs=5)
    parser.add_argument("--size", type=int, help="pixels of each side of the clip (default: 256; with CUDA 704)")
    args = parser.parse_args()
    device = subjects.prepare()
    size = 64 if args.quick else args.size or (704 if device.type == "cuda" else 256)
    rows = run(args, size, device)
    measure.show(f"{QUICK_FRAMES if args.quick else FRAMES} frames of {size}x{size} into an mp4", rows)
    measure.finish("decode", {"size": size, "rows": rows}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
