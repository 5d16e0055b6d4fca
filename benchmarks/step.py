"""One transformer step, part by part: `python benchmarks/step.py [--runs 5] [--json FILE]`.

What is measured: one pass of one prompt through both towers as a step of a sampling makes it, split into embeddings,
time, rotary tables, and in the blocks projections, norms with rotation, each attention kernel (to itself, to text, to
the other stream), feed-forward, modulation and the head; for the video and for the audio tower. Each part with its
seconds, share of the step, FLOP, and its FLOP/s over the device's measured matmul peak. Beside it what a sampling does
once (each text's embedding, keys and values; rotary tables), the same step unsplit, and its time at the matmul peak.

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


def measure_parts(found: list[dict], flop: dict, peak: float) -> list[dict]:
    """One row a part and tower, the largest first; found: seconds by part, one dictionary a round."""
    median = {part: statistics.median(seconds.get(part, 0.0) for seconds in found)
              for part in flop.keys() | {part for seconds in found for part in seconds}}
    whole = sum(median.values())
    rows = [row(*part, spent, whole, flop.get(part, 0.0), peak) for part, spent in median.items()]
    return sorted(rows, key=lambda one: -one["seconds"])


def row(what: str, tower: str, seconds: float, whole: float, flop: float, peak: float) -> dict:
    return {"part": what, "tower": tower, "seconds": seconds, "share": seconds / whole, "gflop": flop / 1e9,
            "peak_share": flop / seconds / peak if flop and seconds else None}


def add_up(rows: list[dict], peak: float) -> list[dict]:
    """The parts of each tower together."""
    def total(name: str, tower: str | None = None) -> float:
        return sum(one[name] for one in rows if tower in (None, one["tower"]))

    return [row(f"{tower} tower", tower, total("seconds", tower), total("seconds"), 1e9 * total("gflop", tower), peak)
            for tower in (VIDEO, AUDIO)]


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
    actions = {"step": step, "split": lambda: found.append(split_seconds(network, step, tokens)),
               "once": lambda: subjects.make_constants(network, inputs)}

    peaks = [measure.matmul_peak(device, subject.dtype, args.quick)]
    timings = measure.alternate(actions, args.runs)
    peaks.append(measure.matmul_peak(device, subject.dtype, args.quick))  # another program may have slowed the first
    peak, found = max(peaks), found[-args.runs:]
    rows = measure_parts(found, split_flop(network, step, tokens), peak)
    flop = {name: measure.count_flop(actions[name]) for name in ("step", "once")}
    return {
        "subject": subject.describe(), "peak_flop_per_second": peak, "parts": rows, "towers": add_up(rows, peak),
        "flop": flop, "seconds": {name: timings.seconds(name) for name in ("step", "once")},
        "peak_share": Spread.of(flop["step"] / spent / peak for spent in timings["step"]),
        "seconds_at_peak": flop["step"] / peak,
        "parts_over_step": Spread.of(sum(parts.values()) / spent
                                     for parts, spent in zip(found, timings["step"], strict=True)),
        "once_over_step": timings.ratio("once", over="step"),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = measure.arguments(__doc__, runs=5)
    parser.add_argument("--blocks", type=int, help="blocks of each tower, where the real 30 do not fit")
    args = parser.parse_args(arguments)
    result = run(args)
    measure.show(f"One step, {result['subject']}", result["parts"] + result["towers"])
    print(f"\nstep                   {result['seconds']['step']} s, {result['flop']['step'] / 1e12:.4g} TFLOP")
    print(f"share of matmul peak   {result['peak_share']} of {result['peak_flop_per_second'] / 1e12:.3g} TFLOP/s, at "
          f"which a step takes {result['seconds_at_peak']:.3g} s")
    print(f"once a sampling        {result['seconds']['once']} s, {result['once_over_step']} of a step")
    print(f"all parts over a step  {result['parts_over_step']} (what splitting costs)")
    measure.finish("step", result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
