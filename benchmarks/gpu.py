"""Everything that needs a GPU, in one command: `python benchmarks/gpu.py --out FOLDER [--minutes 9]`.

The parts run in their order of worth, each in a process of its own with a time limit, so that one that hangs or runs
out of memory costs no other; the first that no time is left for is the least missed:

  workflows  each shipped workflow at tiny size and one with LoRA hooks through a real server, with DynamicVRAM and
             without
  parity     the network on the GPU against the same on the CPU; --golden DIR: tests/parity on the reference's
             numbers as well
  file       random weights of the real size as files, bf16 and fp8_scaled, which later parts load as users do
  step       one pass and one guided step at 704x704, 5 s, bf16: seconds, share of the matmul peak, memory, 50 steps
  caps       two steps through a real server on a GPU with 80, 24, 16, 12, 8 and 6 GB free, bf16 and fp8
  formats    quantised products, attention backends, torch.compile, step cache, each against bf16 in the same process
  decode     the Wan2.2 VAE into an mp4
  sizes      the same step at 960x960, 5 s and 10 s
  reference  --reference CHECKOUT: a step of the reference's code beside ours

Rows are written as they come, to FOLDER/<part>.jsonl, so a part that is stopped keeps those it had; all of them stand
in FOLDER/results.json and, as tables, in FOLDER/results.md. Called again with the same FOLDER it goes on with the parts
that have not ended (--fresh begins anew). `--rehearse` runs every part on a CPU at tiny sizes.

Needs PyTorch's usual packages, and beside them only what `tools/bare_kit.py` packs for a machine without network;
`--kit FOLDER` is where that was installed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GRACE_S = 15.0
REHEARSAL = 4  # times as long may a part take on a CPU that others use too
DONE, STOPPED, FAILED, LEFT = "done", "stopped at its limit", "failed", "no time left"


@dataclass(frozen=True)
class Part:
    """A part and the seconds it may take."""

    name: str
    limit: float
    needs: str = ""  # option without which there is nothing to do


PARTS = (
    Part("workflows", 100), Part("parity", 45), Part("file", 60), Part("step", 60), Part("caps", 130),
    Part("formats", 70), Part("decode", 40), Part("sizes", 45), Part("reference", 60, "reference"),
)
TARGETS = (
    ("reference, FlashAttention 3, 720x720, 121 frames, 50 steps", 83.0),
    ("reference, one GPU of about 80 GB", 96.0),
    ("least by arithmetic at 704x704, 121 frames, 50 steps", 30.0),
    ("another engine, 960x960, 5 s, 50 steps, bf16 (2.92 s a step)", 146.0),
)


def run_part(part: Part, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run one part in its own process group; returns its state and time. Its rows are in its own file."""
    command = [sys.executable, str(HERE / "gpu_parts.py"), part.name, "--out", str(options.out)]
    for name in ("golden", "reference", "kit", "scratch"):
        value = getattr(options, name)
        command += [f"--{name}", str(value)] if value else []
    command += ["--rehearse"] if options.rehearse else []
    env = {**os.environ, "OMP_NUM_THREADS": "1"} if options.rehearse else None
    started = time.monotonic()
    with (options.out / f"{part.name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   env=env, start_new_session=True)
        try:
            code = process.wait(seconds)
            state = DONE if code == 0 else f"{FAILED} (exit code {code}: {last_line(options.out / f'{part.name}.log')})"
        except subprocess.TimeoutExpired:
            state = STOPPED
        finally:
            end_group(process)
    return {"state": state, "seconds": round(time.monotonic() - started, 1)}


def end_group(process: subprocess.Popen) -> None:
    """End a part with all that it started: asked first, then killed."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
            process.wait(GRACE_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def last_line(path: Path) -> str:
    lines = path.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it printed nothing"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a part's file; the last may have been cut."""
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_atomically(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text, "utf-8")
    os.replace(unfinished, path)


def collect(out: Path, states: dict[str, dict[str, Any]]) -> None:
    """Write results.json and results.md from what is there."""
    results = {name: {**state, "rows": read_rows(out / f"{name}.jsonl")} for name, state in states.items()}
    write_atomically(out / "results.json", json.dumps({"parts": results, "targets": dict(TARGETS)}, indent=1))
    lines = ["| to compare with | seconds |", "|---|---|", *(f"| {what} | {value:g} |" for what, value in TARGETS)]
    for name, result in results.items():
        lines += ["", f"## {name}: {result['state']}, {result['seconds']} s", ""]
        lines += table(result["rows"])
    write_atomically(out / "results.md", "\n".join(lines) + "\n")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table of rows, which need not have the same columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return []
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return lines + [f"| {' | '.join(cell(row.get(column)) for column in columns)} |" for row in rows]


def cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value).replace("|", "/")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results, and to go on from")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together (default: 9)")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], metavar="PART", help="these parts")
    parser.add_argument("--golden", type=Path, help="folder with the reference's numbers")
    parser.add_argument("--reference", type=Path, help="checkout of character-ai/Ovi")
    parser.add_argument("--kit", type=Path, help="where tools/bare_kit.py installed its kit")
    parser.add_argument("--scratch", type=Path, help="folder for 36 GB of weights (default: one inside --out)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--fresh", action="store_true", help="do again what was done")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes

    before = json.loads((options.out / "results.json").read_text("utf-8"))["parts"] if (
        options.out / "results.json").is_file() and not options.fresh else {}
    states = {name: {"state": part["state"], "seconds": part["seconds"]} for name, part in before.items()}
    for part in PARTS:
        if (options.only and part.name not in options.only) or (part.needs and not getattr(options, part.needs)):
            continue
        if states.get(part.name, {}).get("state") == DONE:
            print(f"{part.name}: done before", flush=True)
            continue
        left = min(part.limit * (REHEARSAL if options.rehearse else 1), deadline - time.monotonic())
        (options.out / f"{part.name}.jsonl").unlink(missing_ok=True)
        states[part.name] = run_part(part, options, left) if left > 5 else {"state": LEFT, "seconds": 0}
        print(f"{part.name}: {states[part.name]['state']}, {states[part.name]['seconds']} s", flush=True)
        collect(options.out, states)
    print((options.out / "results.md").read_text("utf-8") if (options.out / "results.md").is_file() else "")
    return 0 if all(state["state"] == DONE for state in states.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
