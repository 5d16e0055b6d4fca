"""Memory of one pass: `python benchmarks/memory.py [--json FILE]`.

1. Full width and depth, bfloat16, on a GPU of fake tensors: the peak of all activations at 15,004, 27,900 and 54,900
   video tokens, one and two prompts in a batch, against what ComfyUI's memory manager keeps free for them (estimate).
   Exact but for the allocator's rounding; needs no GPU.
2. A real pass on this machine, at the reduced size on a CPU (dim 1024, 4 blocks, 2,048 video tokens, float32) or the
   real one with a CUDA device: how much memory grew at its peak (resident memory, or CUDA's own count) over what the
   same pass allocates by count. A ratio above 1 is what allocator and libraries add.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import measure
import subjects
import torch
from fake_runs import FakeRuns
from measure import Spread

GIB = 1 << 30
CLIPS = {(31, 44, 44): 157, (31, 60, 60): 157, (61, 60, 60): 314}
"""Latent sizes (frames, rows, columns) of 704x704 and 960x960 at 5 s and 960x960 at 10 s, and audio latents."""
STATUS = Path("/proc/self/status")
MALLOC_MMAP_THRESHOLD = -3


def fake_table(quick: bool) -> list[dict]:
    rows = []
    with FakeRuns(blocks=1 if quick else subjects.FULL.blocks) as runs:
        for video, audio in list(CLIPS.items())[:1 if quick else None]:
            for batch in (1, 2):
                found = runs.run(video, audio, batch)
                rows.append({"video_tokens": found["tokens"], "prompts": batch, "peak_gib": found["peak"] / GIB,
                             "estimate_gib": found["estimate"] / GIB, "ratio": found["estimate"] / found["peak"],
                             "kib_per_token": found["peak"] / 1024 / batch / found["tokens"]})
    return rows


def counted_peak(step, device: torch.device) -> int:
    """Bytes that one pass allocates on the device at most, by adding up its tensors."""
    from tiny import fake_gpu

    with fake_gpu.Allocations(device.type) as memory:
        step()
        memory.peak = before = memory.alive  # what stays: weights, inputs
        step()
    return memory.peak - before


def growth(step, device: torch.device) -> int | None:
    """Bytes by which the process, or what PyTorch holds on the GPU, grows at most during one pass; None if unknown."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not STATUS.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    line, = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) << 10


def real_table(device: torch.device, quick: bool, runs: int) -> dict:
    subject = subjects.choose(device, quick)
    if STATUS.exists():  # so that freed tensors go back to the system at once
        ctypes.CDLL(None).mallopt(MALLOC_MMAP_THRESHOLD, 1 << 17)
    network = subjects.make_network(subject, device)
    step = subjects.make_step(network, subjects.make_inputs(subject, device))
    step()  # libraries allocate on first use
    counted = counted_peak(step, device)
    grown = [found for found in (growth(step, device) for _ in range(runs)) if found is not None]
    return {"subject": subject.describe(), "counted_gib": counted / GIB,
            "grown_gib": Spread.of(found / GIB for found in grown) if grown else None,
            "ratio": Spread.of(found / counted for found in grown) if grown else None}


def main(arguments: list[str] | None = None) -> int:
    args = measure.arguments(__doc__, runs=3).parse_args(arguments)
    device = subjects.prepare()
    result = {"fake": fake_table(args.quick), "real": real_table(device, args.quick, args.runs)}
    measure.show("Full size, bfloat16, fake tensors", result["fake"])
    real = result["real"]
    print(f"\nReal pass, {real['subject']}")
    print(f"counted {real['counted_gib']:.3g} GiB, grown {real['grown_gib']} GiB, ratio {real['ratio']}")
    measure.finish("memory", result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
