"""What the pack costs ComfyUI at its start: `python benchmarks/startup.py [--json FILE]`.

1. Import: in fresh processes, the seconds ComfyUI alone takes up to where it loads custom nodes, and the seconds the
   pack then takes (from bytecode, as after the first start). In one more process, which of the pack's modules, or of
   modules that only the pack imports, took what.
2. Server: seconds until the server answers, with and without the pack, in turn (to 0.1 s, its polling interval).
3. First run: seconds of each node in the first text-to-clip of a fresh server on the tiny random model, and in later
   ones after all models and caches were dropped: the difference is what only the first run pays.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import subjects
from measure import Spread, Timings

PROBE = """
import asyncio, json, sys, time
started = time.perf_counter()
comfyui, pack, base = sys.argv[1:4]
sys.argv = ["main.py", *sys.argv[4:], "--base-directory", base, "--database-url", "sqlite:///:memory:"]
sys.path.insert(0, comfyui)
import comfy.options
comfy.options.enable_args_parsing()
import execution, nodes, server

loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
server.PromptServer(loop)
loop.run_until_complete(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
core = time.perf_counter()
print("PACK BEGINS", file=sys.stderr, flush=True)
loaded = loop.run_until_complete(nodes.load_custom_node(pack))
print("PACK ENDS", file=sys.stderr, flush=True)
print("RESULT" + json.dumps({"core": core - started, "pack": time.perf_counter() - core, "loaded": loaded}))
"""


def probe(base: Path, python_options: tuple[str, ...] = ()) -> tuple[dict[str, float], list[str]]:
    """Load ComfyUI, then the pack, in a process of their own; returns seconds and what was written about imports."""
    import torch
    from devlib import comfyui
    from devlib.common import clean_env

    found = comfyui.find()
    comfyui.prepare_base(base, found)
    command = [sys.executable, "-B", *python_options, "-c", PROBE, str(found.path),
               str(base / "custom_nodes" / comfyui.PACK_NAME), str(base)]
    command += [] if torch.cuda.is_available() else ["--cpu"]
    done = subprocess.run(command, cwd=base, env=clean_env(), capture_output=True, text=True, timeout=300)
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if done.returncode or not results or not json.loads(results[0][6:])["loaded"]:
        raise RuntimeError(f"ComfyUI could not load the pack: {done.stderr[-2000:]}")
    log = done.stderr.partition("PACK BEGINS\n")[2].partition("PACK ENDS")[0]
    return json.loads(results[0].removeprefix("RESULT")), log.splitlines()


def import_table(log: list[str], pack_path: str) -> list[dict[str, Any]]:
    """Modules of `python -X importtime`, the slowest first; milliseconds without what they import in turn."""
    rows = []
    for line in log:
        if line.startswith("import time:") and "|" in line:
            own, _, name = (part.strip() for part in line.removeprefix("import time:").split("|"))
            if own.isdigit():
                ours = pack_path in name
                rows.append({"module": name.rsplit(f"{pack_path}.", 1)[-1] if ours else name,
                             "whose": "the pack's" if ours else "another", "ms": int(own) / 1000})
    return sorted(rows, key=lambda row: -row["ms"])


def measure_import(base: Path, runs: int) -> dict[str, Any]:
    from devlib.comfyui import PACK_NAME

    for folder in ("nodes", "ovi_model", "server"):
        compileall.compile_dir(subjects.ROOT / folder, quiet=1)
    found, log = probe(base, ("-X", "importtime"))  # also reads the files from the disk for the first time
    probes = [probe(base)[0] for _ in range(runs)] or [found]
    timings = Timings({name: [one[name] for one in probes] for name in ("core", "pack")})
    return {"comfyui_s": timings.seconds("core"), "pack_s": timings.seconds("pack"),
            "ratio": timings.ratio("pack", over="core"), "modules": import_table(log, PACK_NAME)}


def measure_server(folder: Path, runs: int) -> dict[str, Any]:
    """Seconds until a server answers, with the pack and without, the first pair not counted."""
    from devlib.server import ComfyServer

    choices = {"with the pack": (), "without": ("--disable-all-custom-nodes",)}
    timings = Timings({name: [] for name in choices})
    for turn in range(runs + 1):
        for name, options in list(choices.items())[::1 if turn % 2 else -1]:
            with ComfyServer(folder / "server", args=options) as server:
                if turn:
                    timings[name].append(server.seconds_to_start)
    return {"seconds": {name: timings.seconds(name) for name in timings},
            "ratio": timings.ratio("with the pack", over="without")}


def measure_first_run(folder: Path, runs: int) -> list[dict[str, Any]]:
    """Seconds of each node in the first run of a server and in later ones that start from nothing too."""
    from devlib import graphs, weights
    from devlib.client import ComfyClient
    from devlib.server import ComfyServer

    weights.ensure_tiny(Path(sys.executable))
    graph = graphs.save_clip(graphs.decode(graphs.text_to_av()))
    spent = []
    with ComfyServer(folder / "first", models=weights.MODELS) as server, ComfyClient(server.url) as client:
        for _ in range(runs + 1):
            spent.append(node_seconds(client, graph))
            graphs.forget(client)
    first, *later = spent
    rows = [{"node": graph[name]["class_type"] if name in graph else name, "first_s": first[name],
             "later_s": Spread.of(run[name] for run in later)} for name in first]
    return sorted(rows, key=lambda row: row["later_s"].median - row["first_s"])


def node_seconds(client, graph: dict) -> dict[str, float]:
    """Seconds from each node's start to the next one's, and of all of them as "whole run"."""
    start = time.perf_counter()
    marks: list[tuple[str | None, float]] = []

    def note(kind: str, data: Any) -> None:
        if kind == "executing":
            marks.append((data["node"], time.perf_counter()))

    client.run(graph, on_event=note)
    ends = [moment for _, moment in marks[1:]] + [time.perf_counter()]
    spent = {name: end - begin for (name, begin), end in zip(marks, ends, strict=True) if name}
    return {**spent, "whole run": time.perf_counter() - start}


def main(arguments: list[str] | None = None) -> int:
    args: argparse.Namespace = measure.arguments(__doc__, runs=3).parse_args(arguments)
    subjects.prepare()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result: dict[str, Any] = {"import": measure_import(folder / "import", 0 if args.quick else args.runs)}
        if not args.quick:
            result["server"] = measure_server(folder, args.runs)
            result["first_run"] = measure_first_run(folder, args.runs)
    found = result["import"]
    print(f"\nComfyUI alone {found['comfyui_s']} s, the pack on top {found['pack_s']} s, ratio {found['ratio']}")
    measure.show("Imports while the pack loads (slowest 12)", found["modules"][:12])
    if not args.quick:
        measure.show("Server answers after", [{"server": name, "seconds": value}
                                              for name, value in result["server"]["seconds"].items()])
        print(f"\nratio {result['server']['ratio']}")
        measure.show("First run and later ones, most lost first", result["first_run"])
    measure.finish("startup", result, args.json)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
