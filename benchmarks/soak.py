"""Many runs in one server, as a week of use makes them: `python benchmarks/soak.py [--runs 100] [--json FILE]`.

Every shipped workflow in turn at tiny size, and one that decodes straight into an mp4, through a real ComfyUI server,
each run with another seed and prompt. Between them what users do: every 5th run has a LoRA on its model, every 7th
takes another model file, every 9th is cancelled while it samples, every 11th fails in its sampler, every 25th is
followed by ComfyUI's own 'unload models'. After each run: resident memory of the server, open files, threads, files in
the temporary folder, seconds. A leak shows as a slope: printed are the first run, the medians of the second, third and
last quarter, and the growth a run in the second half of the runs (least squares). Seconds are compared workflow by
workflow, last third over first third.

--wait SECONDS lets the memory settle before it is read. --state FOLDER adds a custom node to the server: the tests' own
puts ComfyUI's loaders into the state of an NVIDIA machine with DynamicVRAM.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import subjects
from measure import Spread

ROOT = subjects.ROOT
LORA, OTHER = "soak_rank_4.safetensors", "soak_other_960x960.safetensors"
MIB = 1 << 20
PLACES = ("harbour", "kitchen", "forest", "station", "desert", "library", "workshop")


def prepare_models(models: Path) -> None:
    """The tiny bundle, a second model with other weights, and a LoRA."""
    import torch
    from devlib import weights
    from safetensors.torch import load_file, save_file

    weights.ensure_tiny(Path(sys.executable))
    for folder, name in weights.TINY_FILES.values():
        (models / folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(weights.MODELS / folder / name, models / folder / name)
    tensors = load_file(models / "diffusion_models" / weights.TINY["model"])
    save_file({name: 1.01 * tensor for name, tensor in tensors.items()}, models / "diffusion_models" / OTHER)
    layer, low, high = "diffusion_model.blocks.0.self_attn.q", torch.full((4, 256), 0.05), torch.full((256, 4), 0.05)
    (models / "loras").mkdir()
    save_file({f"{layer}.lora_A.weight": low, f"{layer}.lora_B.weight": high}, models / "loras" / LORA)


def straight_to_mp4() -> dict[str, Any]:
    """A graph that ends in 'Ovi Decode to Video'."""
    from devlib import graphs

    return graphs.text_to_av() | {
        "decode": graphs.node("OviDecodeVideo", latent=["sampler", 0], video_vae=["vae", 0], audio_vae=["audio_vae", 0],
                              crf=23.0),
        "save": graphs.node("SaveVideo", video=["decode", 0], filename_prefix="soak", format="auto", codec="auto")}


def kind_of(number: int) -> str:
    """What a run does beside sampling."""
    if number % 11 == 10:
        return "fails"
    if number % 9 == 8:
        return "is cancelled"
    if number % 7 == 6:
        return "other model"
    return "LoRA" if number % 5 == 4 else "plain"


def changed(api: dict[str, Any], number: int, kind: str) -> dict[str, Any]:
    """The graph of run `number`: its own seed and prompt, and what its kind asks for."""
    graph = {name: {**node, "inputs": dict(node["inputs"])} for name, node in api.items()}
    for node in graph.values():
        inputs = node["inputs"]
        for key in ("seed", "noise_seed"):
            if isinstance(inputs.get(key), int):
                inputs[key] = number
        if node["class_type"] == "OviPrompt":
            inputs["scene"] = f"A {PLACES[number % len(PLACES)]} at {number} o'clock. A voice says <S>Run {number}.<E>"
        if kind == "is cancelled" and "steps" in inputs:
            inputs["steps"] = 500
        if kind == "fails" and "skip_layer" in inputs:
            inputs["skip_layer"] = 99
        if kind == "other model" and node["class_type"] == "OviModelLoader":
            inputs["model_name"] = OTHER
    return with_lora(graph) if kind == "LoRA" else graph


def with_lora(graph: dict[str, Any]) -> dict[str, Any]:
    """The graph with the stock LoRA loader behind its model loader."""
    loader = next(name for name, node in graph.items() if node["class_type"] == "OviModelLoader")
    for node in graph.values():
        node["inputs"] = {key: ["lora", 0] if value == [loader, 0] else value for key, value in node["inputs"].items()}
    lora = {"class_type": "LoraLoaderModelOnly",
            "inputs": {"model": [loader, 0], "lora_name": LORA, "strength_model": 1.0}}
    return graph | {"lora": lora}


def run_once(client, graph: dict[str, Any], kind: str) -> str:
    """Run a graph to its end, or to where its kind ends it; returns how it ended."""
    from devlib.client import ExecutionError

    asked = False

    def cancel(event: str, _data: Any) -> None:
        nonlocal asked
        if kind == "is cancelled" and event == "progress" and not asked:
            asked = True
            client.interrupt()

    try:
        return client.run(graph, on_event=cancel).status
    except ExecutionError as failure:
        if kind != "fails":
            raise
        return f"error: {failure.message.splitlines()[0][:60]}"


def look(server, temp: Path) -> dict[str, int]:
    """What the server holds now."""
    process = Path(f"/proc/{server.pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines() if ":" in line)
    return {"rss_mib": int(status["VmRSS"].split()[0]) >> 10, "threads": int(status["Threads"]),
            "files": len(list((process / "fd").iterdir())),
            "temp_files": sum(1 for path in temp.rglob("*") if path.is_file())}


def soak(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a run."""
    from devlib import workflows
    from devlib.client import ComfyClient
    from devlib.server import ComfyServer

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models, base = Path(folder) / "models", Path(folder) / "base"
        prepare_models(models)
        if options.state:
            (base / "custom_nodes").mkdir(parents=True)
            shutil.copytree(options.state, base / "custom_nodes" / options.state.name)
        with ComfyServer(base, models=models, args=("--preview-method", "latent2rgb")) as server, \
                ComfyClient(server.url) as client:
            info = client.object_info()
            apis = {path.stem: workflows.shrink(workflows.to_api(workflows.load(path), info), info)
                    for path in sorted((ROOT / "workflows").glob("*.json"))}
            apis["straight_to_mp4"] = straight_to_mp4()
            for number, name in zip(range(options.runs), itertools.cycle(apis), strict=False):
                kind = kind_of(number)
                started = time.monotonic()
                ended = run_once(client, changed(apis[name], number, kind), kind)
                seconds = time.monotonic() - started
                server.check_alive(f"in run {number}")
                if number % 25 == 24:
                    client.free()
                time.sleep(options.wait)
                rows.append({"run": number, "workflow": name, "kind": kind, "ended": ended, "seconds": seconds,
                             **look(server, base / "temp")})
                print(" ".join(str(value) for value in rows[-1].values()), flush=True)
            errors = [line for line in server.log_text().splitlines() if "Traceback" in line]
            print(f"tracebacks in the server's log: {len(errors)}")
    return rows


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a quantity: its level over the runs, and how much it grows a run in the second half."""
    quarters = [rows[i * len(rows) // 4:(i + 1) * len(rows) // 4] for i in range(4)]
    found = []
    for name in ("rss_mib", "files", "threads", "temp_files"):
        half = [row[name] for row in rows[len(rows) // 2:]]
        found.append({"what": name, "after run 1": rows[0][name], **{
            f"quarter {i + 1}": statistics.median(row[name] for row in quarter)
            for i, quarter in enumerate(quarters) if i}, "growth a run": slope(half)})
    return found


def slope(values: list[float]) -> float:
    """Least squares growth from one value to the next."""
    if len(values) < 2:
        return 0.0
    return statistics.linear_regression(range(len(values)), values).slope


def slowing(rows: list[dict[str, Any]]) -> Spread:
    """Seconds of the last third of the runs over the first third's, for each workflow by itself; run 1 loads."""
    ratios = []
    for name in {row["workflow"] for row in rows}:
        plain = [row["seconds"] for row in rows[1:] if row["workflow"] == name and row["kind"] == "plain"]
        third = max(1, len(plain) // 3)
        if len(plain) > 1:
            ratios.append(statistics.median(plain[-third:]) / statistics.median(plain[:third]))
    return Spread.of(ratios)


def main(arguments: list[str] | None = None) -> int:
    parser = measure.arguments(__doc__, runs=100)
    parser.add_argument("--wait", type=float, default=0.2, help="seconds after a run before memory is read (0.2)")
    parser.add_argument("--state", type=Path, help="custom node folder that the server gets as well")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT / "tools"))
    subjects.prepare()
    rows = soak(options)
    found = summarise(rows)
    measure.show(f"{len(rows)} runs in one server", found)
    slower = slowing(rows)
    print(f"\nseconds of a run, last third over first third: {slower}")
    measure.finish("soak", {"rows": rows, "summary": found, "slowing": slower}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
