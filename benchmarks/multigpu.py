"""What splitting guidance over two GPUs costs beside the passes: `python benchmarks/multigpu.py [--json FILE]`.

ComfyUI's 'MultiGPU CFG Split' sends the positive prompt to one GPU and the negative to another, each with a copy of the
model and a thread of its own. Compared, in turn, on whole samplings with guidance (the results first):

    together   one device, both prompts in one batch, as memory allows
    apart      one device, one prompt after the other
    split      two devices

With two GPUs `split` is the node itself and should come near half of `apart`. With one device the second stands for the
same one again, and on a CPU the process is kept on one core: nothing can overlap then, and what `split` takes longer
than `apart` is the overhead of threads, copies and the second model. A ratio of 1 is none.
"""

import logging
import os
import sys

import measure
import subjects
import torch

DEVICE = subjects.prepare()

import comfy.multigpu  # noqa: E402
from comfy.samplers import calc_cond_batch  # noqa: E402
from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode  # noqa: E402
from ovi_native.nodes.sampling import OviSampler  # noqa: E402
from tiny.compare import relative_l2  # noqa: E402
from tiny.inputs import conditioning  # noqa: E402

SMALL = subjects.Subject(8, 4, 4096, 512, (4, 16, 16), 21)
STEPS = 4


def load(subject: subjects.Subject):
    """MODEL whose copies for other devices are made as those of a loader."""
    patcher = subjects.make_patcher(subject)
    patcher.cached_patcher_init = (lambda *_, **__: subjects.make_patcher(subject), ())
    return patcher


def one_at_a_time(patcher):
    """A clone of MODEL that runs the prompts one after the other."""
    def estimate(args):
        rest = args["input"], args["sigma"], args["model_options"]
        return [calc_cond_batch(args["model"], [cond], *rest)[0] for cond in args["conds"]]

    patcher = patcher.clone()
    patcher.set_model_sampler_calc_cond_batch_function(estimate)
    return patcher


def split(patcher):
    """(a clone of MODEL split over two devices, whether they are two GPUs)."""
    if torch.cuda.device_count() > 1:
        return MultiGPUCFGSplitNode.execute(patcher, 2).result[0], True
    same = torch.device("cpu", 0) if DEVICE.type == "cpu" else torch.device(DEVICE.type)  # the other way to name it
    second = patcher.deepclone_multigpu(new_load_device=same)
    second.is_multigpu_base_clone = True
    patcher = patcher.clone()
    patcher.set_additional_models("multigpu", [second])
    patcher.match_multigpu_clones()
    comfy.multigpu.GPUOptionsGroup().register(patcher)
    return patcher, False


def make_run(patcher, subject: subjects.Subject):
    """A sampling of STEPS steps with everything 'Ovi Sampler' does; returns both streams."""
    prompts = conditioning(40, 1, width=subject.text), conditioning(30, 2, audio_tokens=20, width=subject.text)
    (frames, height, width), audio = subject.video, subject.audio
    from comfy.nested_tensor import NestedTensor

    latent = NestedTensor((torch.zeros(1, 48, frames, height, width), torch.zeros(1, 20, audio)))

    def run():
        return OviSampler.execute(patcher, *prompts, {"samples": latent}, 1, STEPS, "unipc", 5.0, 4.0, 3.0, 1,
                                  1.0).result[0]["samples"].unbind()

    return run


def main() -> int:
    args = measure.arguments(__doc__, runs=7).parse_args()
    logging.disable(logging.WARNING)
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    subject = subjects.QUICK if args.quick else subjects.FULL if DEVICE.type == "cuda" else SMALL
    patcher = load(subject)
    shared, two_gpus = split(patcher)
    runs = {"together": make_run(patcher, subject), "apart": make_run(one_at_a_time(patcher), subject),
            "split": make_run(shared, subject)}
    truth = runs["together"]()
    differences = {name: max(map(relative_l2, runs[name](), truth)) for name in ("apart", "split")}
    timings = measure.alternate(runs, args.runs)
    rows = [{"run": name, "seconds a step": str(measure.Spread.of(s / STEPS for s in timings[name])),
             "over apart": str(timings.ratio(name, over="apart")), "difference": differences.get(name)}
            for name in runs]
    overhead = measure.Spread.of((a - b) / STEPS for a, b in zip(timings["split"], timings["apart"], strict=True))
    measure.show(f"{STEPS} steps of {subject.describe()}, on {'two GPUs' if two_gpus else 'one device'}", rows)
    print(f"\nsplit, seconds a step more than apart: {overhead}")
    measure.finish("multigpu", {
        "subject": subject.describe(), "two_gpus": two_gpus, "differences": differences, "overhead_s": overhead,
        "seconds": {name: measure.Spread.of(s / STEPS for s in timings[name]) for name in runs},
        "ratio": {name: timings.ratio(name, over="apart") for name in runs}}, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
