"""Error and saving of approximate work: `python benchmarks/approximations.py [--train 1200] [--keep FILE]`.

Each row is one setting of the nodes for speed, against the exact path with the same seed: relative L2 of the final
latent per stream (root mean square over the clips, and the worst), share of the transformer passes that were run, share
of the seconds of the whole sampling (both in turn in one process). 50 steps of unipc, guidance 4 and 3.

On three networks, none of them Ovi's: `random`, 3 blocks by the draw rules of the golden models; `deep`, 30 such
blocks; `trained`, see `toy.py`. Random networks are the worst case for a step cache (their velocity turns by half in
every step) and no case at all for guidance; the trained one behaves as networks do, on data far simpler than real
clips. **What these settings do to pictures and sound of the released weights is unmeasured.**

Training takes 8 minutes on one CPU thread; `--keep FILE` saves the weights for the next time, and `--models random
deep` does without.
"""

import argparse
import itertools
import json
import logging
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from toy import FRAMES, HEIGHT, SIZES, WIDTH, Clips, Sizes, small_ovi, trained_ovi  # first: it finds ComfyUI

# isort: split
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from comfy.samplers import calc_cond_batch
from comfy_extras.nodes_easycache import EasyCacheNode
from ovi_native.nodes.sampling import OviSampler
from ovi_native.nodes.speed import PRESETS, OviFast, OviGuidanceRange, OviStepCache
from ovi_native.ovi_model.sampling.step_cache import MAX_IN_A_ROW
from tiny.compare import relative_l2
from tiny.inputs import conditioning, joint
from tiny.models import Batches

MODELS = ("trained", "random", "deep")
STEPS, RANGE = 50, (0.15, 0.95)


def easy_cache(threshold: float, model):
    """Core's node. In float32 it adds to the sampler's own latent (in bf16, to a copy), so it is given a copy here."""
    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "copy", lambda executor, x, *args, **conds: executor(
        [stream.clone() for stream in x], *args, **conds))
    return EasyCacheNode.execute(model, threshold, *RANGE, False).result[0]


def step_cache(video: float, audio: float, model):
    return OviStepCache.execute(model, video, audio, *RANGE).result[0]


def guided(start: float, end: float, model):
    return OviGuidanceRange.execute(model, start, end).result[0]


def preset(name: str, model):
    return OviFast.execute(model, name).result[0]


class HeldAudio:
    """The audio tower on every other step: its velocity continued, its residuals in every block as they were.

    Runs the audio tower all the same and throws its result away: for the error, not for the saving.
    """

    def __init__(self, model):
        self.call, self.past, self.residuals = 0, [], {}
        self.model = model.clone()
        self.model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "held", self.run)
        for block in range(len(model.model.diffusion_model.blocks)):
            self.model.set_model_patch_replace(partial(self.run_block, block), "dit", "double_block", block)

    @property
    def holding(self) -> bool:
        first, last = (int(share * STEPS) for share in RANGE)
        return first <= self.call < last and self.call % 2 == 1

    def run_block(self, block, args, extra):
        video, audio = args["img"]
        if self.holding:
            return extra["original_block"]({**args, "img": (video, self.residuals[block])})
        self.residuals[block] = audio
        return extra["original_block"](args)

    def run(self, executor, x, t, *args, **conds):
        self.call = self.call % STEPS
        sigma, out = float(t[0]), executor(x, t, *args, **conds)
        slopes = comfy.utils.unpack_latents((x - out) / sigma, conds["latent_shapes"])
        if self.holding:
            (a, first), (b, second) = self.past[-2:]
            slopes[1] = torch.lerp(first, second, (sigma - a) / (b - a))
            out = x - sigma * comfy.utils.pack_latents(slopes)[0]
        else:
            self.past.append((sigma, slopes[1]))
        self.call += 1
        return out


class HeldNegative:
    """The negative pass on every other step: what guidance takes away from the positive, continued."""

    def __init__(self, model):
        self.call, self.past = 0, []
        self.model = model.clone()
        self.model.set_model_sampler_calc_cond_batch_function(self.estimate)

    def estimate(self, args):
        first, last = (int(share * STEPS) for share in RANGE)
        self.call, call = (self.call + 1) % STEPS, self.call
        holding, sigma = first <= call < last and call % 2 == 1, float(args["sigma"][0])
        conds = [args["conds"][0], None if holding else args["conds"][1]]
        positive, negative = calc_cond_batch(
            args["model"], conds, args["input"], args["sigma"], args["model_options"])
        if holding:
            (a, first), (b, second) = self.past[-2:]
            return [positive, positive - torch.lerp(first, second, (sigma - a) / (b - a)) * sigma]
        self.past.append((sigma, (positive - negative) / sigma))
        return [positive, negative]


SETTINGS: dict[str, Any] = {  # a number of steps, or what to do to the model
    "exact, again": STEPS,
    **{f"{steps} steps": steps for steps in (40, 30, 25, 20)},
    **{f"EasyCache (core), {threshold}": partial(easy_cache, threshold) for threshold in (0.05, 0.07, 0.1, 0.2)},
    **{f"Ovi Step Cache, {threshold}": partial(step_cache, threshold, threshold)
       for threshold in (0.06, 0.07, 0.08, 0.1, 0.15, 0.2)},
    "Ovi Step Cache, 0.1, deciding on the video alone": partial(step_cache, 0.1, 99.0),
    f"Ovi Step Cache, always {MAX_IN_A_ROW} of {MAX_IN_A_ROW + 1}": partial(step_cache, 99.0, 99.0),
    **{f"Ovi Guidance Range, {start} to {end}": partial(guided, start, end)
       for start, end in ((0.0, 0.95), (0.0, 0.8), (0.0, 0.5), (0.1, 1.0), (0.2, 1.0))},
    **{f"Ovi Fast, {name}": partial(preset, name) for name in PRESETS},
    "audio tower on every other step": lambda model: HeldAudio(model).model,
    "negative pass on every other step": lambda model: HeldNegative(model).model,
}


def sample(model, positive, negative, seed: int, steps: int = STEPS) -> tuple[list[torch.Tensor], int, float]:
    """Both streams, rows that went through block 0, seconds."""
    latent = {"samples": joint(FRAMES, HEIGHT, WIDTH)}
    with Batches(model) as passes:
        start = time.perf_counter()
        out = OviSampler.execute(model, positive, negative, latent, seed, steps, "unipc", 5.0, 4.0, 3.0, -1, 1.0)
        seconds = time.perf_counter() - start
    return out.result[0]["samples"].unbind(), sum(passes), seconds


def prompts(trained: bool, clip: int):
    if not trained:
        return conditioning(6, 2 * clip), conditioning(6, 2 * clip + 1)
    text = Clips().text[clip % 8][None]
    return [[text, {"pooled_output": None}]], [[torch.zeros_like(text), {"pooled_output": None}]]


def measure(model, trained: bool, clips: int) -> dict[str, list[float]]:
    """Per setting: share of passes, of seconds, video error, its worst, audio error, its worst."""
    exact = [sample(model, *prompts(trained, clip), clip) for clip in range(clips)]
    rows = {}
    for name, change in SETTINGS.items():
        errors, passes, ratios = [], 0, []
        for clip, (truth, _, _) in enumerate(exact):
            changed, steps = (model, change) if isinstance(change, int) else (change(model), STEPS)
            found, rows_run, seconds = sample(changed, *prompts(trained, clip), clip, steps)
            errors.append([relative_l2(a, b) for a, b in zip(found, truth, strict=True)])
            passes += rows_run
            ratios.append(seconds / sample(model, *prompts(trained, clip), clip)[2])
        video, audio = zip(*errors, strict=True)
        rows[name] = [passes / sum(run for _, run, _ in exact), statistics.median(ratios),
                      *(value for stream in (video, audio)
                        for value in (statistics.fmean(e * e for e in stream) ** 0.5, max(stream)))]
    return rows


def turning(model, trained: bool) -> float:
    """Median change of the velocity from step to step, relative."""
    slopes = []

    def note(executor, x, t, *args, **conds):
        out = executor(x, t, *args, **conds)
        slopes.append((x - out) / t.reshape(-1, 1, 1))
        return out

    noted = model.clone()
    noted.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "note", note)
    sample(noted, *prompts(trained, 0), 0)
    return statistics.median(relative_l2(b, a) for a, b in itertools.pairwise(slopes))


def build(name: str, train: int, keep: Path | None):
    """MODEL by name, and its title."""
    if name == "trained":
        return trained_ovi(train, keep), f"trained, {SIZES.blocks} blocks, {train} steps"
    sizes = Sizes() if name == "random" else Sizes(blocks=30)
    return small_ovi(sizes), f"{name}, {sizes.blocks} random blocks"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="networks to measure")
    parser.add_argument("--train", type=int, default=1200, help="training steps of the small model")
    parser.add_argument("--keep", type=Path, help="file to keep its weights in")
    parser.add_argument("--clips", type=int, default=4, help="clips of every setting")
    parser.add_argument("--json", type=Path, help="also write the tables there")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    tables = {}
    for name in args.models:
        model, title = build(name, args.train, args.keep)
        tables[title] = measure(model, name == "trained", args.clips)
        print(f"\n{title} (velocity turns by {turning(model, name == 'trained'):.0%} a step)\n\n| setting | passes | "
              "seconds | video error | worst | audio error | worst |\n|---|---|---|---|---|---|---|")
        for row, (passes, seconds, *errors) in tables[title].items():
            print(f"| {row} | {passes:.2f} | {seconds:.2f} | {' | '.join(f'{e:.4f}' for e in errors)} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(tables, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
