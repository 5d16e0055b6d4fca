"""One transformer step, part by part: `python benchmarks/step.py [--runs 5] [--json FILE]`.

What is measured: one pass of one prompt through both towers as a step of a sampling makes it, split into embeddings,
time, rotary tables, and in the blocks projections, norms with rotation, each attention kernel (to itself, to text, to
the other stream), feed-forward, modulation, the text's keys and values, and the head; for the video and for the audio
tower. Each part with its seconds, share of the step, FLOP, and its FLOP/s over the device's measured matmul peak.
Beside it the same step unsplit, and its time at the matmul peak.

On a CPU: float32 at dim 1024, 8 heads, 4 blocks, ffn 4096, 2,048 video and 42 audio tokens (a minute or two). With a
CUDA device: bfloat16 at the real size, 15,004 video and 157 audio tokens; --blocks 10 if 24 GB of weights do not fit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace

import measure
import subjects
import torch
from measure import Spread
from parts import AUDIO, VIDEO, split_flop, split_seconds


def measure_parts(found: list[dict], flop: dict, peaks: list[float]) -> list[dict]:
    """One row a part and tower, the largest first, then one for each tower; found: seconds by part, for each round."""
    parts = flop.keys() | {part for seconds in found for part in seconds}
    groups = {part: [part] for part in parts}
    groups |= {(f"{tower} tower", tower): [part for part in parts if part[1] == tower] for tower in (VIDEO, AUDIO)}
    whole = statistics.median(sum(seconds.values()) for seconds in found)
    rows = []
    for (what, tower), members in groups.items():
        spent = [sum(seconds.get(part, 0.0) for part in members) for seconds in found]
        work = sum(flop.get(part, 0.0) for part in members)
        shares = [work / one / peak for one, peak in zip(spent, peaks, strict=True) if work and one]
        rows.append({"part": what, "tower": tower, "seconds": statistics.median(spent),
                     "share": statistics.median(spent) / whole, "gflop": work / 1e9,
                     "peak_share": statistics.median(shares) if shares else None})
    return sorted(rows, key=lambda row: (row["part"].endswith(" tower"), -row["seconds"]))


@torch.no_grad()
def run(args: argparse.Namespace) -> dict:
    device = subjects.prepare()
    subject = subjects.choose(device, args.quick)
    subject = replace(subject, blocks=args.blocks or subject.blocks)
    network = subjects.make_network(subject, device)
    inputs = subjects.make_inputs(subject, device)
    step = subjects.make_step(network, inputs)
    tokens = {VIDEO: subject.tokens, AUDIO: subject.audio}
    found: list[dict] = []
    matmul = measure.Matmul(device, subject.dtype, args.quick)
    actions = {"matmul": matmul, "step": step, "split": lambda: found.append(split_seconds(network, step, tokens))}

    timings = measure.alternate(actions, args.runs)
    found = found[-args.runs:]
    peaks = [matmul.flop / spent for spent in timings["matmul"]]
    flop = measure.count_flop(step)
    return {
        "subject": subject.describe(), "parts": measure_parts(found, split_flop(network, step, tokens), peaks),
        "flop": flop, "seconds": timings.seconds("step"),
        "peak_flop_per_second": Spread.of(peaks),
        "peak_share": Spread.of(flop / spent / peak
                                for spent, peak in zip(timings["step"], peaks, strict=True)),
        "parts_over_step": Spread.of(sum(parts.values()) / spent
                                     for parts, spent in zip(found, timings["step"], strict=True)),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = measure.arguments(__doc__, runs=5)
    parser.add_argument("--blocks", type=int, help="blocks of each tower, where the real 30 do not fit")
    args = parser.parse_args(arguments)
    result = run(args)
    measure.show(f"One step, {result['subject']}", result["parts"])
    print(f"\nstep                   {result['seconds']} s, {result['flop'] / 1e12:.4g} TFLOP")
    print(f"matmul peak            {result['peak_flop_per_second']} FLOP/s, in the same rounds")
    print(f"share of it            {result['peak_share']}")
    print(f"all parts over a step  {result['parts_over_step']} (what splitting costs)")
    measure.finish("step", result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
