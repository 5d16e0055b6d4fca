"""What the settings for speed cost, on clips of the trained tiny Ovi: `python benchmarks/approximations.py`.

Each row is one setting of the nodes, against the exact run with the same captions and seeds (unipc, guidance 2.5, no
skipped block, float32):

    passes              share of the exact run's passes through the network; positive and negative count as two
    video, audio error  relative L2 of the finished latent of each stream, root mean square over the clips
    what is perceived   in the clips decoded to mp4, measured by `tiny_world/measure`; chance in brackets: the same
                        clips with each other's sound or caption

Clips are of 2 seconds and 64x64: two in three have one ball (sync, colour, place, timbre), the others a face that
speaks (lips: the mouth's opening against the loudness; vowels seen on it). Descriptions are of those that training saw,
since the ones it did not see name too few places and timbres.

The network is small and its world a toy: how much an error shows in real clips, and how often a threshold skips there,
is another matter. **What these settings do to the released weights is unmeasured.**

10 clips take about 10 minutes on one free core; `--only` takes parts of rows' names, `--keep FOLDER` keeps the clips.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from devlib.pack import import_pack  # noqa: E402

import_pack()

import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import measure  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from comfy.patcher_extension import WrappersMP  # noqa: E402
from comfy_extras.nodes_easycache import EasyCacheNode  # noqa: E402
from ovi_native.nodes.speed import PRESETS, OviFast, OviGuidanceRange, OviStepCache  # noqa: E402
from ovi_native.ovi_model.files.quantise import quantise_tensors  # noqa: E402
from ovi_native.ovi_model.ovi.checkpoint import load_model, read_checkpoint  # noqa: E402
from ovi_native.ovi_model.ovi.quant_recipe import FORMATS  # noqa: E402
from ovi_native.ovi_model.sampling.stream_guidance import attach  # noqa: E402
from ovi_native.tiny_world.captions import caption, parse  # noqa: E402
from ovi_native.tiny_world.scenes import draw_scene  # noqa: E402
from tiny.compare import relative_l2  # noqa: E402
from tiny.models import Batches  # noqa: E402
from tiny_ovi.evaluate import Models, Way, read_clip  # noqa: E402
from tiny_ovi.files import install  # noqa: E402
from tiny_ovi.scores import Clip, scores  # noqa: E402

RANGE = 0.15, 0.95  # of the steps in which a cache may skip
COLUMNS = {"sync F1": "sync F1", "ball's colour": "colour", "place": "place", "timbre": "timbre",
           "mouth and loudness": "lips", "vowels seen": "vowels seen"}


def easy_cache(threshold: float, model):
    """Core's node. In float32 it adds to the sampler's own latent (in bf16, to a copy), so it is given a copy here."""
    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "copy", lambda executor, x, *args, **conds: executor(
        [stream.clone() for stream in x], *args, **conds))
    return EasyCacheNode.execute(model, threshold, *RANGE, False).result[0]


def step_cache(threshold: float, model):
    return OviStepCache.execute(model, threshold, threshold, *RANGE).result[0]


def guided(start: float, end: float, model):
    return OviGuidanceRange.execute(model, start, end).result[0]


def preset(name: str, model):
    return OviFast.execute(model, name).result[0]


def file_of(model) -> str:
    return model.cached_patcher_init[1][0]


def in_format(name: str, model):
    """The model's file quantised while loading; this device multiplies as it does."""
    return load_model(file_of(model), name)[0]


def multiplied_in_format(name: str, model):
    """The same, multiplied as by a GPU that has the format's instructions: activations are rounded as well."""
    tensors = quantise_tensors(read_checkpoint(file_of(model))[0], FORMATS[name])
    operations = comfy.ops.mixed_precision_ops({}, torch.float32, disabled=set())
    patcher = comfy.sd.load_diffusion_model_state_dict(tensors, model_options={"custom_operations": operations})
    attach(patcher)
    return patcher


def unchanged(model):
    return model


@dataclass(frozen=True)
class Setting:
    """A way of sampling, and what is done to the MODEL first."""

    way: Way
    change: Callable[[Any], Any] = unchanged


def settings(steps: int) -> dict[str, Setting]:
    """The rows; the first is the exact run."""
    exact = Way(steps=steps)
    changes = {
        **{f"EasyCache (core), {threshold}": partial(easy_cache, threshold) for threshold in (0.07, 0.2)},
        "Ovi Step Cache, 0.1": partial(step_cache, 0.1),
        **{f"Ovi Fast, {name} (step cache {kind.cache.video_threshold})": partial(preset, name)
           for name, kind in PRESETS.items()},
        **{f"Ovi Guidance Range, {start} to {end}": partial(guided, start, end)
           for start, end in ((0.0, 0.8), (0.2, 1.0))},
        "int8": partial(in_format, "int8"),
        "fp8_scaled": partial(in_format, "fp8_scaled"),
        "fp8_scaled, products in fp8": partial(multiplied_in_format, "fp8_scaled"),
    }
    return {
        f"exact: {steps} steps of unipc": Setting(exact),
        **{f"{fewer} steps": Setting(replace(exact, steps=fewer)) for fewer in (steps // 2, steps // 4, steps // 8)},
        **{f"{steps // 2} steps of {solver}": Setting(replace(exact, steps=steps // 2, solver=solver))
           for solver in ("dpm++", "euler")},
        **{name: Setting(exact, change) for name, change in changes.items()},
    }


@dataclass(frozen=True)
class Row:
    """What came of a setting: rows that went through block 0 over the exact run's, errors of each clip, scores."""

    passes: float
    video: list[float]
    audio: list[float]
    scores: dict[str, tuple[float, float]]  # value, chance


@dataclass(frozen=True)
class Run:
    """All clips of one setting."""

    latents: list[tuple[torch.Tensor, torch.Tensor]]
    passes: int
    clips: list[Clip]


def sample(models: Models, setting: Setting, texts: list[str], seconds: float, folder: Path) -> Run:
    """A clip for each text, seeds counting up, decoded to mp4 files in `folder` and read back."""
    folder.mkdir(parents=True)
    model, latents, clips = setting.change(models.model), [], []
    with Batches(model) as passes:
        for seed, text in enumerate(texts):
            latent = models.sample(text, seed, setting.way, seconds, model=model)
            path = folder / f"{seed:03}.mp4"
            models.decode(latent, path)
            latents.append(latent["samples"].unbind())
            clips.append(read_clip(path, text))
    return Run(latents, sum(passes), clips)


def perceived(clips: list[Clip]) -> dict[str, tuple[float, float]]:
    """Scores of the balls and of the faces, chance among their like."""
    parts = [[clip for clip in clips if (parse(clip.caption).vowels is not None) == face] for face in (False, True)]
    return {name: score for part in parts if part for name, score in scores(part).items()}


def compare(models: Models, chosen: dict[str, Setting], texts: list[str], seconds: float,
            folder: Path) -> Iterator[tuple[str, Row]]:
    """Each setting against the first."""
    truth: Run | None = None
    for number, (name, setting) in enumerate(chosen.items()):
        run = sample(models, setting, texts, seconds, folder / f"{number:02}")
        truth = truth or run
        video, audio = ([relative_l2(found[stream], exact[stream])
                         for found, exact in zip(run.latents, truth.latents, strict=True)] for stream in (0, 1))
        yield name, Row(run.passes / truth.passes, video, audio, perceived(run.clips))


def rms(values: list[float]) -> float:
    return fmean(value * value for value in values) ** 0.5


def line(name: str, row: Row) -> str:
    """A row of the table."""
    found = [f"{row.scores[key][0]:.2f} ({row.scores[key][1]:.2f})" if key in row.scores else "" for key in COLUMNS]
    return f"| {' | '.join([name, f'{row.passes:.2f}', *(f'{rms(e):.3f}' for e in (row.video, row.audio)), *found])} |"


def captions(clips: int, seconds: float, seed: int) -> list[str]:
    """Two in three of a ball, the others of a face."""
    random, balls = np.random.default_rng(seed), round(clips * 2 / 3)
    kinds = ["ball"] * balls + ["face"] * (clips - balls)
    return [caption(draw_scene(random, seconds, kind=kind)) for kind in kinds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=10, help="of every setting (default: 10)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a clip (default: 2)")
    parser.add_argument("--steps", type=int, default=50, help="of the exact run (default: 50)")
    parser.add_argument("--seed", type=int, default=3, help="of the captions (default: 3)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="rows whose names hold one of these")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the clips there, a folder for each row")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    args = parser.parse_args()
    if args.clips < 5:
        parser.error(f"--clips is {args.clips}; chance takes two clips of each kind. Give 5 or more.")
    logging.disable(logging.WARNING)
    (exact, truth), *others = settings(args.steps).items()
    chosen = {exact: truth} | {name: kind for name, kind in others if any(part in name for part in args.only)}
    texts = captions(args.clips, args.seconds, args.seed)
    print(f"| {' | '.join(['setting', 'passes', 'video error', 'audio error', *COLUMNS.values()])} |\n"
          f"|{'---|' * (len(COLUMNS) + 4)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder) / "models")
        rows = {}
        for name, row in compare(Models(Path(folder) / "models"), chosen, texts, args.seconds,
                                 args.keep or Path(folder) / "clips"):
            rows[name] = row
            print(line(name, row), flush=True)
    measure.finish("approximations", {"captions": texts, "rows": rows}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
