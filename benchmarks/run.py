"""A whole run, and what sampling costs beside the transformer: `python benchmarks/run.py [--json FILE]`.

1. From files to a saved clip through the pack's own nodes, in this process: load, encode the prompt, sample, decode to
   an mp4, save; the first run and later ones, each stage as a share of its run. With a CUDA device and real weights in
   ComfyUI's model folders: the real size, 50 steps. Otherwise the tiny random model of tools/make_tiny.py at 256x160,
   25 frames, 10 steps, whose shares say little about the real model's.
2. 'Ovi Sampler' on a transformer large enough that shares mean something (on a CPU dim 1024, 4 blocks, 2,048 video
   tokens, 4 steps; with a CUDA device the real size): the share of sampling time spent outside the transformer, on
   guidance, solver, packing, previews and conditioning. The goal is at most 2 %.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import subjects
import torch
from measure import Spread, Timings
from subjects import Subject

TINY_CLIP = {"aspect": "custom", "width": 256, "height": 160, "frames": 25, "steps": 10, "skip_layer": 2}
QUICK_CLIP = TINY_CLIP | {"width": 64, "height": 64, "frames": 5, "steps": 2}
SAMPLING = {"seed": 1, "solver": "unipc", "shift": 5.0, "video_guidance": 4.0, "audio_guidance": 3.0, "denoise": 1.0}
GOAL = 0.02


def find_weights() -> tuple[dict[str, str], bool]:
    """(file of each role, whether they are real weights): on a GPU those in ComfyUI's folders, else the tiny bundle."""
    import folder_paths
    from devlib import weights

    offered = {role: folder_paths.get_filename_list(folder) for role, (folder, _) in weights.TINY_FILES.items()}
    real = weights.choose(offered)
    if real and torch.cuda.is_available():
        return real, True
    weights.ensure_tiny(Path(sys.executable))
    for folder, _ in set(weights.TINY_FILES.values()):
        folder_paths.add_model_folder_path(folder, str(weights.MODELS / folder))
    return weights.TINY, False


def whole_run(files: dict[str, str], clip: dict[str, Any], folder: Path) -> dict[str, float]:
    """Make one clip; returns the seconds of each stage."""
    import nodes
    from ovi_native.nodes import decode, latents, loaders, prompt, sampling

    spent: dict[str, float] = {}

    def stage(name: str, action: Callable[[], Any]) -> Any:
        out: list = []
        spent[name] = measure.seconds(lambda: out.append(action()))
        return out[0]

    size = {"seconds": 0.0, "frames": 0, "width": 0, "height": 0, "aspect": "1:1 square"} | clip
    model, variant = stage("load model", lambda: loaders.OviModelLoader.execute(files["model"], "default").result)
    encoder, = stage("load text encoder", lambda: loaders.OviTextEncoderLoader.execute(
        files["text_encoder"], "automatic").result)
    vae, = stage("load video VAE", lambda: nodes.VAELoader().load_vae(files["video_vae"]))
    audio_vae, = stage("load audio VAE", lambda: loaders.OviAudioVAELoader.execute(
        files["audio_vae"], files["vocoder"]).result)
    positive, negative, _ = stage("encode prompt", lambda: prompt.OviPrompt.execute(
        encoder, prompt.DEFAULT_SCENE, variant).result)
    latent = latents.OviEmptyLatent.execute(variant, batch_size=1, **{
        name: size[name] for name in ("aspect", "width", "height", "seconds", "frames")}).result[0]
    sampled, = stage("sample", lambda: sampling.OviSampler.execute(
        model, positive, negative, latent, steps=clip["steps"], skip_layer=clip["skip_layer"], **SAMPLING).result)
    (video,), = stage("decode to mp4", lambda: decode.OviDecodeVideo.execute(sampled, vae, audio_vae, 23.0).result)
    stage("save", lambda: video.save_to(str(folder / "clip.mp4")))
    return spent


def measure_runs(quick: bool, runs: int) -> dict[str, Any]:
    """Stages of whole runs: the first, and the spread of later ones with their shares."""
    import folder_paths

    files, real = find_weights()
    clip = {"steps": 50, "skip_layer": 11} if real else QUICK_CLIP if quick else TINY_CLIP
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.set_temp_directory(folder)  # ComfyUI's own folder is only read
        first, *later = (whole_run(files, clip, Path(folder)) for _ in range(runs + 1))
        size = (Path(folder) / "clip.mp4").stat().st_size
    rows = [{"stage": name, "first_run_s": first[name], "seconds": Spread.of(run[name] for run in later),
             "share": Spread.of(run[name] / sum(run.values()) for run in later)} for name in first]
    return {"model": files["model"], "clip": clip, "mp4_bytes": size, "stages": rows,
            "first_over_later": sum(first.values()) / Spread.of(sum(run.values()) for run in later).median}


class TransformerTime:
    """Context manager adding up the seconds spent in the network: its passes and their rotary tables."""

    METHODS = ("forward", "rope_tables")

    def __init__(self, network) -> None:
        self.network, self.intervals, self.inside = network, [], False

    def __enter__(self) -> TransformerTime:
        for name in self.METHODS:
            setattr(self.network, name, self.timed(getattr(self.network, name)))
        return self

    def timed(self, method: Callable) -> Callable:
        def call(*args, **kwargs):
            if self.inside:
                return method(*args, **kwargs)
            self.inside, start = True, now()
            try:
                return method(*args, **kwargs)
            finally:
                self.inside = False
                self.intervals.append((start, now()))
        return call

    def __exit__(self, *_) -> None:
        for name in self.METHODS:
            delattr(self.network, name)

    @property
    def seconds(self) -> float:
        measure.synchronise()
        if torch.cuda.is_available():
            return sum(start.elapsed_time(end) for start, end in self.intervals) / 1000
        return sum(end - start for start, end in self.intervals)


def now() -> Any:
    """A moment in the work: of the GPU's, without waiting for it, where there is one."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def measure_overhead(subject: Subject, steps: int, runs: int) -> dict[str, Any]:
    """Seconds and share of sampling that pass outside the transformer, previews included."""
    from comfy.cli_args import LatentPreviewMethod, args
    from ovi_native.nodes.sampling import OviSampler
    from tiny.inputs import conditioning, joint

    args.preview_method = LatentPreviewMethod.Latent2RGB
    patcher = subjects.make_patcher(subject)
    positive, negative = (conditioning(100, seed, width=subject.text) for seed in (1, 2))
    latent = {"samples": joint(*subject.video, audio=subject.audio)}
    timings = Timings(sampling=[], transformer=[])
    for turn in range(runs + 1):
        with TransformerTime(patcher.model.diffusion_model) as inside:
            spent = measure.seconds(lambda: OviSampler.execute(
                patcher, positive, negative, latent, steps=steps, skip_layer=1, **SAMPLING))
            if turn:  # the first loads the weights
                timings["sampling"].append(spent)
                timings["transformer"].append(inside.seconds)
    outside = [whole - part for whole, part in zip(*timings.values(), strict=True)]
    return {"subject": subject.describe(), "steps": steps, "passes": len(inside.intervals),
            "sampling_s": timings.seconds("sampling"), "outside_s_per_step": Spread.of(s / steps for s in outside),
            "outside_share": Spread.of(s / whole for s, whole in zip(outside, timings["sampling"], strict=True)),
            "goal": GOAL}


def main(arguments: list[str] | None = None) -> int:
    parser = measure.arguments(__doc__, runs=3)
    parser.add_argument("--steps", type=int, help="steps of the second part (default: 4, on a GPU 50)")
    args: argparse.Namespace = parser.parse_args(arguments)
    device = subjects.prepare()
    steps = args.steps or (2 if args.quick else 50 if device.type == "cuda" else 4)
    result = {"run": measure_runs(args.quick, args.runs),
              "overhead": measure_overhead(subjects.choose(device, args.quick), steps, args.runs)}
    found = result["run"]
    measure.show(f"Whole runs of {found['model']}, {found['clip']}", found["stages"])
    print(f"\nfirst run over later ones {found['first_over_later']:.3g}")
    found = result["overhead"]
    print(f"\nSampling, {found['subject']}, {steps} steps: {found['sampling_s']} s")
    print(f"outside the transformer: {found['outside_share']} of it, goal {GOAL}")
    print(f"                         {found['outside_s_per_step']} s a step")
    measure.finish("run", result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
