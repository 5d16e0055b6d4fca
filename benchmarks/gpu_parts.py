"""The parts of `gpu.py`: `python benchmarks/gpu_parts.py PART --out FOLDER [--rehearse]` runs one by itself.

Each part is a generator of rows; a row is written to FOLDER/PART.jsonl when it is made. What a part needs from another
(the weight files) it makes itself if it is not there. Weights are random: time and memory are those of trained ones.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import subjects
import torch
from measure import Spread
from subjects import FULL, QUICK, ROOT, Subject

GIB = 1 << 30
Row = dict[str, Any]
Rows = Iterator[Row]
Options = argparse.Namespace
WIDE, LONG = (31, 60, 60), (61, 60, 60)  # latent sizes of 960x960 at 5 s and 10 s
STEPS, SKIPPED = 50, 11
BF16_FILE, FP8_FILE = "model_960x960.safetensors", "model_960x960_fp8_scaled.safetensors"
LORA_FILE = "random_rank_4.safetensors"


# --- a server ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(options: Options, models: Path, *args: str) -> Iterator[tuple[Any, Any]]:
    """A real ComfyUI server with the pack and a client of it; it needs no page."""
    from devlib.client import ComfyClient
    from devlib.server import ComfyServer

    python = options.kit / "python" if options.kit else sys.executable
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        page = Path(folder) / "page"
        page.mkdir()
        (page / "index.html").write_text("<html></html>")
        base = Path(folder) / "base"
        base.mkdir()
        with ComfyServer(base, models=models, python=python, cpu=options.rehearse, args=(
                "--front-end-root", str(page), "--disable-api-nodes", *args)) as running:
            try:
                with ComfyClient(running.url) as client:
                    yield running, client
            finally:
                shutil.copy(running.log, options.out / f"{options.part}-server.log")


def tiny_models() -> Path:
    """The models folder with the tiny random bundle."""
    from devlib import weights

    weights.ensure_tiny(Path(sys.executable))
    return weights.MODELS


def tiny_workflows(options: Options, client) -> dict[str, Any]:
    """The shipped workflows at tiny size, by name: the kit's, else converted here."""
    if options.kit and (options.kit / "workflows.json").is_file():
        return json.loads((options.kit / "workflows.json").read_text("utf-8"))
    from devlib import workflows

    info = client.object_info()
    return {path.stem: workflows.shrink(workflows.to_api(workflows.load(path), info), info)
            for path in sorted((ROOT / "workflows").glob("*.json"))}


def with_hooks() -> dict[str, Any]:
    """A LoRA hooked to the positive prompt alone: with DynamicVRAM core then loads a copy that does not stream."""
    from devlib import graphs

    graph = graphs.save_latents(graphs.text_to_av()) | {
        "hook": graphs.node("CreateHookLoraModelOnly", lora_name=LORA_FILE, strength_model=1.0),
        "hooked": graphs.node("ConditioningSetProperties", cond_NEW=["prompt", 0], strength=1.0,
                              set_cond_area="default", hooks=["hook", 0])}
    return graphs.change(graph, sampler={"positive": ["hooked", 0]})


def workflows(options: Options) -> Rows:
    """Each shipped workflow, tiny, twice: the second run changes the seed and finds its models loaded."""
    from devlib.common import DevError

    for state, args in (("on", ()), ("off", ("--disable-dynamic-vram",))):
        with server(options, scratch(options), *args) as (running, client):
            on = "DynamicVRAM support detected and enabled" in running.log_text()
            for name, api in (tiny_workflows(options, client) | {"LoRA hooks": with_hooks()}).items():
                for turn in (1, 2):
                    started, row = time.monotonic(), {"workflow": name, "DynamicVRAM asked": state, "enabled": on}
                    try:
                        run = client.run(set_seeds(api, turn), timeout=60)
                        row |= {"run": turn, "status": run.status, **look_at(run, running.base)}
                    except DevError as failure:
                        row |= {"run": turn, "status": str(failure)[-300:]}
                    yield row | {"seconds": time.monotonic() - started}
                running.check_alive(f"after {name}")


def set_seeds(api: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same graph from another noise."""
    seeds = {"seed", "noise_seed"}
    return {name: {**node, "inputs": {key: seed if key in seeds and isinstance(value, int) else value
                                      for key, value in node["inputs"].items()}} for name, node in api.items()}


def look_at(run, base: Path) -> Row:
    """What is in a run's mp4: frames, spread of the pixels, loudness."""
    import av
    import numpy as np

    clips = [output.path(base) for output in run.outputs if output.filename.endswith(".mp4")]
    if not clips:
        return {"frames": None}
    with av.open(str(clips[0])) as clip:
        frames = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
    with av.open(str(clips[0])) as clip:
        sound = np.concatenate([frame.to_ndarray().ravel() for frame in clip.decode(audio=0)])
    return {"frames": len(frames), "pixel_spread": float(np.std(frames[-1])), "sound_rms": float(np.std(sound))}


# --- numbers ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def parity(options: Options) -> Rows:
    """Relative L2 of a tiny network on the device against float32 on the CPU, and the reference's numbers."""
    device = subjects.prepare()
    from tiny import inputs, models
    from tiny.checkpoint import draw_weights
    from tiny.compare import relative_l2

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    weights = draw_weights()
    video, audio, text = (inputs.noise(2, 48, 5, 8, 8, seed=1), inputs.noise(2, 20, 26, seed=2),
                          torch.cat([inputs.text(9, 1), inputs.text(9, 2)]))
    mask = torch.ones(2, 1, 5, 1, 1)
    mask[:, :, 0] = 0
    cases = {"plain": {}, "first frame given": {"denoise_mask": mask},
             "one row skips a block": {"skip_layers": [1, -1]}}

    def run(network, case: dict, dtype: torch.dtype, place: torch.device) -> list[torch.Tensor]:
        case = {name: value.to(place) if torch.is_tensor(value) else value for name, value in case.items()}
        out = network([video.to(place, dtype), audio.to(place, dtype)], torch.tensor([700.0, 300.0], device=place),
                      text.to(place, dtype), {}, **case)
        return [stream.float().cpu() for stream in out]

    exact = models.network(models.load(weights))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        network = models.network(models.load(weights, dtype)).to(device)
        for name, case in cases.items():
            truth = run(exact, case, torch.float32, torch.device("cpu"))
            errors = [relative_l2(*pair) for pair in zip(run(network, case, dtype, device), truth, strict=True)]
            yield {"case": name, "dtype": str(dtype)[6:], "video": errors[0], "audio": errors[1],
                   "tolerance": tolerance, "ok": max(errors) <= tolerance}
    if options.golden:
        done = subprocess.run([sys.executable, "-m", "pytest", "-s", "tests/parity", "--golden", str(options.golden)],
                              cwd=ROOT, text=True, capture_output=True, env={**os.environ, "NVIDIA_TF32_OVERRIDE": "0"})
        (options.out / "parity-golden.log").write_text(done.stdout + done.stderr, "utf-8")
        lines = done.stdout.strip().splitlines() or ["it printed nothing"]
        yield {"case": f"tests/parity: {lines[-1]}", "ok": done.returncode == 0}


# --- weight files of the real size ------------------------------------------------------------------------------------


def scratch(options: Options) -> Path:
    """A models folder with the tiny bundle, a LoRA for its model, and room for models of the real size."""
    from safetensors.torch import save_file

    models = (options.scratch or options.out / "scratch") / "models"
    for file in tiny_models().glob("*/*.safetensors"):
        link = models / file.parent.name / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(file)
    (models / "loras").mkdir(exist_ok=True)
    layer, low, high = "diffusion_model.blocks.0.self_attn.q", torch.full((4, 256), 0.05), torch.full((256, 4), 0.05)
    save_file({f"{layer}.lora_A.weight": low, f"{layer}.lora_B.weight": high}, models / "loras" / LORA_FILE)
    return models


def file_subject(options: Options) -> Subject:
    """The size of the weight files: the real one, but for reading the tiny text encoder's width."""
    from tiny.sizes import BUNDLE

    return replace(QUICK if options.rehearse else FULL, text=BUNDLE.text)


def draw_file(subject: Subject, device: torch.device) -> dict[str, torch.Tensor]:
    """Random weights in core's names, in ordinary memory."""
    from tiny.sizes import core_layout, tensor_shapes

    generator, weights = torch.Generator(device).manual_seed(0), {}
    for name, shape in core_layout(tensor_shapes(subject.sizes)).items():
        gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        drawn = torch.empty(shape, device=device, dtype=torch.bfloat16)
        weights[name] = drawn.normal_(gain, 0.02 if len(shape) > 1 else 0.1, generator=generator).cpu()
    return weights


def file(options: Options) -> Rows:
    """Write both files, and load each as 'Load Ovi Model' does."""
    device = subjects.prepare()
    from ovi_native.ovi_model.files.quantise import quantise_tensors
    from ovi_native.ovi_model.ovi import checkpoint
    from ovi_native.ovi_model.ovi.quant_recipe import FORMATS
    from safetensors.torch import save_file

    folder = scratch(options) / "diffusion_models"
    if not all((folder / name).exists() for name in (BF16_FILE, FP8_FILE)):
        drawn, spent = timed(lambda: draw_file(file_subject(options), device))
        yield {"what": "draw", "seconds": spent}
        rounded, spent = timed(lambda: quantise_tensors(drawn, FORMATS["fp8_scaled"]))
        yield {"what": "quantise", "seconds": spent}
        for name, tensors in ((BF16_FILE, drawn), (FP8_FILE, rounded)):
            _, spent = timed(lambda name=name, tensors=tensors: save_file(tensors, folder / f".{name}"))
            os.replace(folder / f".{name}", folder / name)
            yield {"what": f"write {name}", "seconds": spent, "gb": (folder / name).stat().st_size / 1e9}
        del drawn, rounded, tensors
    for name in (BF16_FILE, FP8_FILE):
        _, spent = timed(lambda name=name: checkpoint.load_model(str(folder / name)))
        yield {"what": f"load {name}", "seconds": spent}


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    found: list = []
    spent = measure.seconds(lambda: found.append(action()))
    return found[0], spent


# --- the step ---------------------------------------------------------------------------------------------------------


def guided_row(network, subject: Subject, device: torch.device, runs: int, quick: bool, what: str) -> Row:
    """Seconds of a pass, of a guided step (positive and negative in one batch, the latter without one block) and of 50
    of these; share of the matmul peak in the same rounds; peak memory of activations."""
    one, two = (subjects.make_inputs(subject, device, batch) for batch in (1, 2))
    skipped = min(SKIPPED, subject.blocks - 1)
    actions: dict[str, Callable[[], Any]] = {
        "pass": lambda: network(*one, {}), "guided": lambda: network(*two, {}, skip_layers=[-1, skipped])}
    flop = measure.count_flop(actions["guided"])
    matmul = measure.Matmul(device, subject.dtype, quick)
    weights = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timings = measure.alternate({**actions, "matmul": matmul}, runs)
    peak = (torch.cuda.max_memory_allocated() - weights) / GIB if device.type == "cuda" else None
    share = Spread.of(flop / matmul.flop * best / step
                      for best, step in zip(timings["matmul"], timings["guided"], strict=True))
    guided = timings.seconds("guided")
    return {"what": what, "tokens": f"{subject.tokens} + {subject.audio}", "pass_s": str(timings.seconds("pass")),
            "guided_step_s": str(guided), f"{STEPS}_steps_s": STEPS * guided.median, "TFLOP": flop / 1e12,
            "peak_share": str(share), "matmul_TFLOP/s": matmul.peak / 1e12, "weights_gib": weights / GIB,
            "activations_gib": peak}


@torch.no_grad()
def step(options: Options) -> Rows:
    device = subjects.prepare()
    subject = QUICK if options.rehearse else FULL
    network = subjects.make_network(subject, device)
    yield guided_row(network, subject, device, 3, options.rehearse, "704x704, 5 s")


@torch.no_grad()
def sizes(options: Options) -> Rows:
    device = subjects.prepare()
    subject = QUICK if options.rehearse else FULL
    network = subjects.make_network(subject, device)
    clips = {"960x960, 5 s": (WIDE, 157), "960x960, 10 s": (LONG, 314)}
    for what, (video, audio) in clips.items():
        sized = subject if options.rehearse else replace(subject, video=video, audio=audio)
        yield guided_row(network, sized, device, 1, options.rehearse, what)


# --- small GPUs -------------------------------------------------------------------------------------------------------


class Ballast:
    """Takes all of a GPU's memory but so many GB, and notes the least that was free since."""

    def __init__(self) -> None:
        self.held: list[torch.Tensor] = []
        self.free = self.least = math.inf
        self.watching = torch.cuda.is_available()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while self.watching:
            self.least = min(self.least, torch.cuda.mem_get_info()[0])
            time.sleep(0.05)

    def leave(self, gigabytes: float) -> None:
        if not torch.cuda.is_available():
            return
        self.held.clear()
        torch.cuda.empty_cache()
        spare = torch.cuda.mem_get_info()[0] - int(gigabytes * 1e9)
        if spare > 0:
            self.held.append(torch.empty(spare, dtype=torch.uint8, device="cuda"))
        self.free = self.least = torch.cuda.mem_get_info()[0]

    @property
    def used_gib(self) -> float | None:
        """The most that others took since."""
        return (self.free - self.least) / GIB if math.isfinite(self.least) else None


def caps(options: Options) -> Rows:
    """Two steps and more on what is left of the GPU, through a real server: time a step, or the node's own error."""
    subjects.prepare()
    from devlib import graphs
    from devlib.common import DevError

    models = scratch(options)
    if not (models / "diffusion_models" / FP8_FILE).exists():
        for row in file(options):
            print(row)
    clip = {"width": 704, "height": 704, "frames": 121} if not options.rehearse else {"width": 64, "height": 64,
                                                                                     "frames": 9}
    ballast = Ballast()
    with server(options, models) as (running, client):
        for gigabytes, name in ((80, BF16_FILE), (24, BF16_FILE), (12, FP8_FILE), (8, BF16_FILE), (6, FP8_FILE),
                                (16, FP8_FILE), (12, BF16_FILE), (16, BF16_FILE), (6, BF16_FILE)):
            client.free()
            time.sleep(1)
            ballast.leave(gigabytes)
            graph = graphs.change(graphs.save_latents(graphs.text_to_av()), model={"model_name": name}, latent=clip,
                                  sampler={"steps": 4, "skip_layer": 1, "seed": gigabytes})
            row: Row = {"free_gb": gigabytes, "file": name}
            started = time.monotonic()
            try:
                run = client.run(graph, timeout=45)
                times = [at for at, kind, data in run.events if kind == "progress" and data.get("node") == "sampler"]
                row |= {"status": run.status, "first_s": times[0] if times else None,
                        "step_s": min((b - a for a, b in itertools.pairwise(times)), default=None)}
            except DevError as failure:
                running.check_alive()
                row |= {"status": str(failure)[-300:]}
            yield row | {"run_s": time.monotonic() - started, "used_gib": ballast.used_gib}
    ballast.watching = False


# --- formats, kernels, compile ----------------------------------------------------------------------------------------


@torch.no_grad()
def formats(options: Options) -> Rows:
    """A pass of a few blocks of the real width in each way, over the same in bf16 with ComfyUI's own attention."""
    device = subjects.prepare()
    import comfy.sd
    from ovi_native.ovi_model.files import quantise
    from ovi_native.ovi_model.ovi import quant_recipe
    from ovi_native.ovi_model.sampling import attention_backend

    subject = QUICK if options.rehearse else replace(FULL, blocks=4)
    weights = draw_file(subject, device)

    def network_of(tensors: dict):
        patcher = comfy.sd.load_diffusion_model_state_dict(dict(tensors), model_options={"dtype": torch.bfloat16})
        patcher.model.manual_cast_dtype = None
        return patcher.model.diffusion_model.to(device)

    subject = replace(subject, dtype=torch.bfloat16)
    inputs = subjects.make_inputs(subject, device)
    base = network_of(weights)
    truth = base(*inputs, {})

    def compare(what: str, action: Callable[[], Any], **more: Any) -> Row:
        first = measure.seconds(action)
        errors = [float((a - b).float().norm() / b.float().norm()) for a, b in zip(action(), truth, strict=True)]
        timings = measure.alternate({"base": lambda: base(*inputs, {}), "this": action}, 3)
        return {"what": what, "over_bf16": str(timings.ratio("this", over="base")), "seconds":
                timings.seconds("this").median, "first_s": first, "video_error": errors[0], "audio_error": errors[1],
                **more}

    for name in attention_backend.BACKENDS:
        if attention_backend.works(name, device, torch.bfloat16):
            find = attention_backend.find(name)
            override = {attention_backend.OVERRIDE: lambda _, *args, find=find, **kwargs: find(*args, **kwargs)}
            yield compare(f"attention {name}", lambda override=override: base(*inputs, dict(override)))
        else:
            yield {"what": f"attention {name}", "over_bf16": "not here"}
    for name, target in quant_recipe.FORMATS.items():
        try:
            other = network_of(quantise.quantise_tensors(weights, replace(target, kept_share=0.0)))
        except ValueError as refusal:
            yield {"what": name, "over_bf16": str(refusal)}
            continue
        yield compare(name, lambda other=other: other(*inputs, {}))
        del other
    if device.type == "cuda":  # on a CPU the compiler would need another one, and minutes
        compiled = torch.compile(base)
        yield compare("torch.compile", lambda: compiled(*inputs, {}))
    yield from cached(subject, weights)


def cached(subject: Subject, weights: dict) -> Rows:
    """'Ovi Step Cache' over none, 12 steps: what it leaves out on random weights says nothing, what it costs does."""
    import comfy.sd
    from ovi_native.nodes.sampling import OviSampler
    from ovi_native.ovi_model.sampling import step_cache
    from tiny.inputs import conditioning, joint

    patcher = comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options={"dtype": torch.bfloat16})
    positive, negative = (conditioning(100, seed, width=subject.text) for seed in (1, 2))
    frames, rows, columns = subject.video
    latent = {"samples": joint(min(frames, 8), rows, columns, audio=42)}

    def sample(model) -> Callable[[], Any]:
        return lambda: OviSampler.execute(model, positive, negative, latent, seed=1, steps=12, solver="unipc",
                                          shift=5.0, video_guidance=4.0, audio_guidance=3.0, skip_layer=1, denoise=1.0)

    never = step_cache.set_step_cache(patcher, step_cache.Settings(0.0, 0.0, 0.15, 0.95))
    often = step_cache.set_step_cache(patcher, step_cache.Settings(3.0, 3.0, 0.15, 0.95))
    timings = measure.alternate({"none": sample(patcher), "never": sample(never), "often": sample(often)}, 2)
    for name in ("never", "often"):
        yield {"what": f"step cache that {name} leaves out, sampling", "over_bf16": str(timings.ratio(name, "none")),
               "seconds": timings.seconds(name).median}


def decode(options: Options) -> Rows:
    """Frames through the VAE into an mp4, and the peak of the GPU's memory."""
    device = subjects.prepare()
    from decode import real_wan
    from ovi_native.ovi_model.media.mp4 import write_mp4
    from ovi_native.ovi_model.media.video_vae import decode_chunks
    from tiny import wan_vae

    vae = wan_vae.small_vae() if options.rehearse else real_wan()
    for size, latent_frames in ((64, 4),) if options.rehearse else ((704, 31), (960, 31)):
        latents = wan_vae.latents(latent_frames, 1, size // 16, size // 16)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for what in ("first", "second"):
            with torch.inference_mode():
                seconds = measure.seconds(lambda latents=latents: write_mp4(
                    decode_chunks(vae, latents), 24, torch.zeros(1, 80_000), 16_000, 23.0))
            peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
            yield {"what": f"{size}x{size}, {4 * latent_frames - 3} frames, {what} run", "seconds": seconds,
                   "peak_gib": peak, "dtype": str(vae.vae_dtype)}


def reference(options: Options) -> Rows:
    """A step of the reference's own code beside ours, same weights and inputs."""
    target = options.out / "compare_reference.json"
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "compare_reference.py"), "--reference",
                    str(options.reference), "--runs", "3", "--json", str(target),
                    *(["--quick"] if options.rehearse else [])], check=True)
    found = json.loads(target.read_text("utf-8"))
    for row in found["rows"]:
        yield {name: value["median"] if isinstance(value, dict) else value for name, value in row.items()} | {
            "attention": found["reference_attention"], "video_error": found["video_error"]}


PARTS = {part.__name__: part for part in (workflows, parity, file, step, caps, formats, decode, sizes, reference)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    for name in ("golden", "reference", "kit", "scratch"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --rehearse runs the parts at tiny sizes on a CPU.")
    sys.path.insert(0, str(ROOT / "tools"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a server does not outlive its part
    with (options.out / f"{options.part}.jsonl").open("w", encoding="utf-8") as rows:
        for row in PARTS[options.part](options):
            rows.write(json.dumps(row, default=str) + "\n")
            rows.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
