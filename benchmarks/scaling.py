"""Cost against the number of tokens: `python benchmarks/scaling.py [--plot scaling.png] [--json FILE]`.

1. Full size, bfloat16, exact, on a GPU of fake tensors: FLOP and peak memory of one pass at 512x512 to 960x960, 5 and
   10 s, and for 1 to 4 clips in a batch.
2. Measured seconds of one pass: on a CPU at dim 256, 4 blocks, float32 and clips of a quarter of those sides (tokens
   and width both shrink about 12 to 16 fold, so that linear and quadratic cost keep their proportion), all points in
   turn; with a CUDA device the real model at the real sizes.

Each is fitted by least squares of the relative error to a + b n + c n^2 over the n video tokens: products of the
weights and attention to text are linear, self-attention is quadratic, memory is linear since no kernel keeps its n x n
scores. The largest residual says how far a point lies from that law; clips of 5 and 10 s differ in audio tokens, which
the law leaves out, so clips of one length fit best. --plot draws all of it (needs matplotlib).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import measure
import numpy as np
import subjects
import torch
from fake_runs import FakeRuns
from measure import Spread
from subjects import FULL, Subject

GIB = 1 << 30
SIDES = (512, 640, 704, 832, 960)  # pixels
LENGTHS = {5: (31, 157), 10: (61, 314)}  # seconds: latent frames, audio latents
BATCHES = (1, 2, 3, 4)
SMALL = Subject(2, 4, 1024, 256, (31, 8, 8), 10)
SMALL_SIDES = (128, 160, 192, 224, 256)
AUDIO_SHRINK = FULL.audio // SMALL.audio


def points(sides: tuple[int, ...], quick: bool) -> list[dict]:
    """The clips of one batch size, shortest first."""
    return [{"side": side, "length_s": length, "video": (frames, side // 16, side // 16), "audio": audio,
             "tokens": frames * (side // 32) ** 2}
            for length, (frames, audio) in LENGTHS.items() for side in (sides[::2] if quick else sides)]


def batches(clips: list[dict]) -> list[dict]:
    """The smallest and the middle 5-second clip, each for 1 to 4 clips at a time."""
    short = of_length(clips, 5)
    return [{**clip, "batch": batch} for clip in (short[0], short[len(short) // 2]) for batch in BATCHES]


def of_length(rows: list[dict], length: int) -> list[dict]:
    return [row for row in rows if row["length_s"] == length]


def fit(rows: list[dict], value: Callable[[dict], float]) -> dict:
    """Least squares of the relative error to a + b n + c n^2; `worst` is the largest, as a share of its value."""
    n, y = np.array([row["tokens"] for row in rows], dtype=float), np.array([value(row) for row in rows], dtype=float)
    scale = n.max()
    columns = np.stack([np.ones_like(n), n / scale, (n / scale) ** 2], axis=1)
    found, *_ = np.linalg.lstsq(columns / y[:, None], np.ones_like(y), rcond=None)
    residuals = columns @ found / y - 1
    a, b, c = found / scale ** np.arange(3)
    return {"a": float(a), "b": float(b), "c": float(c), "residuals": residuals.tolist(),
            "worst": float(abs(residuals).max()), "quadratic_share": float(found[2] / (columns[n.argmax()] @ found))}


def exact(quick: bool) -> dict:
    """FLOP and memory at full size (quick: at full width, one block deep)."""
    clips = points(SIDES, quick)
    rows, batch_rows = [], []
    with FakeRuns(blocks=1 if quick else FULL.blocks) as runs:
        for clip in clips:
            found = runs.run(clip["video"], clip["audio"])
            rows.append({**clip, "tflop": found["flop"] / 1e12, "peak_gib": found["peak"] / GIB,
                         "estimate_gib": found["estimate"] / GIB})
        for clip in batches(clips)[:2 if quick else None]:
            found = runs.run(clip["video"], clip["audio"], clip["batch"])
            batch_rows.append({**clip, "tflop": found["flop"] / 1e12, "peak_gib": found["peak"] / GIB})
    return {"clips": rows, "batches": batch_rows, "fits": {
        "FLOP": fit(rows, lambda row: row["tflop"] * 1e12),
        **{f"FLOP, {length} s": fit(of_length(rows, length), lambda row: row["tflop"] * 1e12) for length in LENGTHS},
        "bytes": fit(rows, lambda row: row["peak_gib"] * GIB)}}


@torch.no_grad()
def measured(device: torch.device, quick: bool, runs: int) -> dict:
    """Seconds of a pass, all clips and batches in turn; for batches the seconds per clip over those of one clip."""
    full = device.type == "cuda" and not quick
    subject = FULL if full else SMALL
    clips = points(SIDES if full else (64, 96, 128) if quick else SMALL_SIDES, quick=False)
    for clip in clips:
        clip["audio"] //= 1 if full else AUDIO_SHRINK
    network = subjects.make_network(replace(subject, blocks=1) if quick else subject, device)
    work = {(clip["tokens"], clip["length_s"], 1): clip for clip in clips}
    work |= {(clip["tokens"], clip["length_s"], clip["batch"]): clip for clip in batches(clips)}
    actions = {key: subjects.make_step(network, subjects.make_inputs(
        replace(subject, video=clip["video"], audio=clip["audio"]), device, key[2]))
        for key, clip in work.items()}
    timings = measure.alternate(actions, runs)

    rows = [{**clip, "time": timings.seconds((clip["tokens"], clip["length_s"], 1))} for clip in clips]
    batch_rows = []
    for (tokens, length, batch), clip in work.items():
        if clip in batches(clips):
            ratio = timings.ratio((tokens, length, batch), over=(tokens, length, 1))
            batch_rows.append({**clip, "per_clip": Spread(*(x / batch for x in (ratio.median, ratio.min, ratio.max)))})
    return {"subject": subject.describe(), "clips": rows, "batches": batch_rows,
            "fits": {"seconds": fit(rows, lambda row: row["time"].median)}}


def plot(result: dict, path: Path) -> None:
    """Draw FLOP, memory and seconds against tokens with their fits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    full, small = result["exact"], result["measured"]
    draw(axes[0], full["clips"], [row["tflop"] for row in full["clips"]], full["fits"]["FLOP"], 1e-12)
    axes[0].set(title="Full size, one pass, exact", ylabel="TFLOP")
    draw(axes[1], full["clips"], [row["peak_gib"] for row in full["clips"]], full["fits"]["bytes"], 1 / GIB)
    axes[1].plot([row["tokens"] for row in full["clips"]], [row["estimate_gib"] for row in full["clips"]], "x",
                 color="tab:red", label="ComfyUI's estimate")
    axes[1].set(title="Full size, activations, exact", ylabel="GiB")
    draw(axes[2], small["clips"], [row["time"].median for row in small["clips"]], small["fits"]["seconds"], 1.0)
    for row in small["clips"]:
        axes[2].plot([row["tokens"]] * 2, [row["time"].min, row["time"].max], color="grey", linewidth=1)
    axes[2].set(title=f"Measured, dim {small['subject']['dim']}, {small['subject']['blocks']} blocks", ylabel="seconds")
    for axis in axes:
        axis.set(xlabel="video tokens", xlim=(0, None), ylim=(0, None))
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=90)


def draw(axis, rows: list[dict], values: list[float], law: dict, unit: float) -> None:
    for length, marker in ((5, "o"), (10, "s")):
        chosen = [i for i, row in enumerate(rows) if row["length_s"] == length]
        axis.plot([rows[i]["tokens"] for i in chosen], [values[i] for i in chosen], marker, label=f"{length} s")
    n = np.linspace(0, max(row["tokens"] for row in rows), 100)
    axis.plot(n, unit * (law["a"] + law["b"] * n + law["c"] * n**2), color="black", linewidth=1,
              label=f"a + b n + c n² (within {100 * law['worst']:.2g} %)")


def print_all(result: dict) -> None:
    hidden = ("video", "audio")

    def visible(rows: list[dict]) -> list[dict]:
        return [{name: value for name, value in row.items() if name not in hidden} for row in rows]

    full, small = result["exact"], result["measured"]
    measure.show("Full size, one pass, exact", visible(full["clips"]))
    measure.show("The same in batches", visible(full["batches"]))
    measure.show(f"Measured seconds, {small['subject']}", visible(small["clips"]))
    measure.show("Seconds per clip over those of a batch of one", visible(small["batches"]))
    measure.show("Fits to a + b n + c n^2", [
        {"of": name, **{key: law[key] for key in ("a", "b", "c", "worst", "quadratic_share")}}
        for name, law in {**full["fits"], **small["fits"]}.items()])


def main(arguments: list[str] | None = None) -> int:
    parser = measure.arguments(__doc__, runs=7)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw it there")
    args: argparse.Namespace = parser.parse_args(arguments)
    device = subjects.prepare()
    result = {"exact": exact(args.quick), "measured": measured(device, args.quick, args.runs)}
    print_all(result)
    measure.finish("scaling", result, args.json)
    if args.plot:
        plot(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
