"""Step caching on both streams: a model call is left out while neither picture nor sound would change much.

When: as EasyCache (arXiv 2507.02860, core's node of that name) found, how much the prediction changes for each bit that
the noisy latent moves stays similar over many steps, so the change to come can be told from the latent alone. Here each
stream is measured by itself (core's node measures the video, 99.9 % of the elements), the change is that since the last
computed pass rather than a sum, and what is given and not sampled (a first frame) does not dilute it.

What instead: the velocity continued in a straight line from the last two computed, over the noise level. Taking the
last one as it is, as core's node in effect does, made two to ten times the error (benchmarks/LOG.md).

All conditionings at a latent are left out together or not at all: positive and negative never come from different
latents. They may come in several calls, from a model of their own each (core's 'Dual Model CFG Guider') or for one more
pass with a block left out; the first call decides for those that the step before had as well. Windows of a long clip
decide one by one. A decision is made once a latent, before core divides it over batches or GPUs, and costs one
host-device sync. Everything lives for one sampling, in wrappers on its copy of the options.

A wrapper of another pack may divide a batch without telling which rows it hands on. Such a pass is always computed.

Shapes: B clips, C conditionings in a batch, n elements of the packed joint latent.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import comfy.model_patcher
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from .guidance import check_range, step_range

KEY = "ovi_step_cache"
MAX_IN_A_ROW = 3
"""Calls left out in succession, at most: the rate of change is as old as the last computed pass."""


@dataclass(frozen=True)
class Settings:
    """Relative change of each stream's prediction below which it is reused; the share of the steps where it may be."""

    video_threshold: float
    audio_threshold: float
    start: float
    end: float


@dataclass
class Pass:
    """The last computed pass of one conditioning, and how fast its prediction was changing."""

    sigma: float
    x: Tensor  # [B, 1, n] noisy latent
    slope: Tensor  # [B, 1, n] (x - clean estimate) / sigma, the velocity
    trend: Tensor | float  # [B, 1, n] change of the slope per unit of sigma, 0 while unknown
    rate: Tensor  # [2, B] relative change of each stream's slope per unit its latent moves, infinite while unknown
    video_size: int  # elements of a clip that are video
    used: float  # noise level of the last call it took part in
    reused: int = 0  # calls in a row that continued it

    def expected_change(self, x: Tensor) -> Tensor:
        """Relative change (video [0], audio [1]) expected at latent x; the clip that changes most decides."""
        return (self.rate * norms(x.to(self.x.device) - self.x, self.video_size)).amax(1).to(x.device)

    def followed_by(self, x: Tensor, slope: Tensor, weights: Tensor, sigma: float) -> "Pass":
        """The pass computed after this one. weights: what counts of the slope, see `sampled_share`."""
        moved = norms(x - self.x, self.video_size)
        size = norms(weights * slope, self.video_size)
        rate = norms(weights * (slope - self.slope), self.video_size) / (moved * size).clamp(min=1e-20)
        rate = torch.where(moved > 1e-6 * size, rate, self.rate)  # a latent that stood still tells nothing
        trend = self.trend if sigma == self.sigma else (slope - self.slope) / (sigma - self.sigma)
        return Pass(sigma, x, slope, trend, rate, self.video_size, sigma)

    def continued(self, sigma: float) -> Tensor:
        """The slope to expect at another noise level."""
        return self.slope + self.trend * (sigma - self.sigma)


def norms(packed: Tensor, video_size: int) -> Tensor:
    """L2 norms [2, B] of video and audio in a packed latent [B, 1, n]."""
    return torch.stack([part.flatten(1).norm(dim=1) for part in (packed[..., :video_size], packed[..., video_size:])])


def sampled_share(x: Tensor, latent_shapes: list, denoise_mask=None, audio_denoise_mask=None, **_) -> Tensor:
    """Weights [B, 1, n] for packed latents x that are 0 where the latent is given, or [B, 1, 1] of 1 where none is.

    Shapes of the streams and masks are those that core hands to `OviModel.forward`.
    """
    if denoise_mask is None and audio_denoise_mask is None:
        return x.new_ones(x.shape[0], 1, 1)
    masks = (x.new_ones(1) if mask is None else mask.to(x) for mask in (denoise_mask, audio_denoise_mask))
    return comfy.utils.pack_latents([mask.expand(x.shape[0], *shape[1:])
                                     for mask, shape in zip(masks, latent_shapes, strict=True)])[0]


def pass_key(uuid, transformer_options) -> tuple:
    """What tells the passes of one sampling apart: conditioning, context window, and blocks another node replaces."""
    window = transformer_options.get("context_window")
    replaced = transformer_options.get("patches_replace", {}).get("dit", {})
    return (uuid, None if window is None else tuple(window.index_list),
            tuple((block, id(patch)) for block, patch in replaced.items()))


class StepCache:
    """The passes of one sampling over `sigmas` [steps + 1]; there may be no step."""

    def __init__(self, settings: Settings, sigmas: Tensor):
        self.settings = settings
        highest, lowest = step_range(sigmas, settings.start, settings.end)
        self.highest, self.lowest = float(highest), max(float(lowest), float(sigmas[-2:][0]))  # the last is computed
        self.passes: dict[tuple, Pass] = {}
        self.left_out: set[tuple] = set()  # keys of the passes that the call in progress leaves out
        self.calls = self.skipped = 0
        self.sigma = self.previous = math.inf  # of the step in progress and of the one before
        self.subject: tuple = (None, None, None)  # latent, timestep and window of the last decision
        self.agreed: set[tuple] = set()  # keys of the passes that it leaves out
        self.divided = False  # whether a pass came in rows that cannot be told apart

    def attach(self, model_options: dict) -> None:
        """Wrap the model calls of a sampling with these options."""
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, self.on_call, model_options, is_model_options=True)
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self.on_pass, model_options, is_model_options=True)

    def on_call(self, executor, model, conds, x, timestep, model_options):
        """Core's wrapper around the conditionings of a call at one latent x [B, 1, n]."""
        self.left_out = self.choose(conds, x, timestep, model_options["transformer_options"])
        return executor(model, conds, x, timestep, model_options)

    def choose(self, conds, x: Tensor, timestep: Tensor, transformer_options) -> set[tuple]:
        """Keys of the passes to leave out: of every active conditioning, or none."""
        entries = {pass_key(entry["uuid"], transformer_options): entry for cond in conds for entry in cond or []}
        window = pass_key(None, transformer_options)[1]
        if x is not self.subject[0] or timestep is not self.subject[1] or window != self.subject[2]:
            self.decide(entries, x, timestep, window)
        active = self.active(entries)
        for key in active & self.passes.keys():
            self.passes[key].used = self.sigma
        return active if active <= self.agreed else set()

    def decide(self, entries: dict[tuple, dict], x: Tensor, timestep: Tensor, window) -> None:
        """Agree on what to leave out at a latent: the passes of this call, and those that followed in the last step."""
        self.subject = x, timestep, window
        following = {key for key, last in self.passes.items()
                     if key[1] == window and last.used in (self.sigma, self.previous)} - entries.keys()
        known = [key for key in {**entries, **dict.fromkeys(following)}
                 if key in self.passes and self.passes[key].x.shape == x.shape]
        # the one host-device sync
        sigma, *numbers = torch.cat([timestep[:1].to(x), *(self.passes[key].expected_change(x) for key in known)]
                                    ).tolist()
        changes = dict(zip(known, zip(numbers[::2], numbers[1::2], strict=True), strict=True))
        if sigma != self.sigma:  # forget what the step before did not use: windows that moved on, ended conditionings
            self.passes = {key: last for key, last in self.passes.items() if last.used == self.sigma or key in known}
            self.sigma, self.previous = sigma, self.sigma
        together = self.active(entries) | following
        self.agreed = together if all(self.may_skip(key, changes) for key in together) else set()
        self.calls, self.skipped = self.calls + 1, self.skipped + bool(self.agreed)

    def active(self, entries: dict[tuple, dict]) -> set[tuple]:
        """Keys of the conditionings whose range of noise levels holds the present one."""
        return {key for key, entry in entries.items()
                if entry.get("timestep_end", 0.0) <= self.sigma <= entry.get("timestep_start", math.inf)}

    def may_skip(self, key: tuple, changes: dict) -> bool:
        """Whether this pass's slope is good enough for the call in progress."""
        video, audio = changes.get(key, (math.inf, math.inf))
        return (self.lowest < self.sigma <= self.highest and video < self.settings.video_threshold
                and audio < self.settings.audio_threshold and self.passes[key].reused < MAX_IN_A_ROW)

    def on_pass(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={},  # noqa: B006
                **conds):
        """Core's wrapper around one batch of conditionings: x [C * B, 1, n], t [C * B] -> clean estimates."""
        keys = [pass_key(uuid, transformer_options) for uuid in transformer_options["uuids"]]
        if len(x) != len(keys) * len(self.subject[0]):
            self.divided = True
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **conds)
        sigma = t.reshape(-1, 1, 1)
        if self.left_out.issuperset(keys):
            for key in keys:
                self.passes[key].reused += 1
            slopes = [self.passes[key].continued(self.sigma).to(x.device) for key in keys]  # it may move between GPUs
            return x - sigma * torch.cat(slopes)
        out = executor(x, t, c_concat, c_crossattn, control, transformer_options, **conds)
        parts = (y.chunk(len(keys)) for y in (x, (x - out) / sigma, sampled_share(x, **conds)))
        for key, part, slope, weights in zip(keys, *parts, strict=True):
            self.record(key, part, slope, weights, math.prod(conds["latent_shapes"][0][1:]))
        return out

    def record(self, key: tuple, x: Tensor, slope: Tensor, weights: Tensor, video_size: int) -> None:
        """Keep a computed pass."""
        last = self.passes.get(key)
        if last is not None and last.x.shape == x.shape and last.x.device == x.device:
            self.passes[key] = last.followed_by(x, slope, weights, self.sigma)
        else:
            rate = x.new_full((2, x.shape[0]), math.inf)
            self.passes[key] = Pass(self.sigma, x, slope, 0.0, rate, video_size, self.sigma)


def sample_with_cache(settings: Settings, report: Callable[[str], None] | None, executor, *args, **kwargs):
    """Core's wrapper around a whole sampling: give it a cache of its own, and free it whatever happens."""
    guider = executor.class_obj
    options = guider.model_options
    cache = StepCache(settings, args[3])
    guider.model_options = comfy.model_patcher.create_model_options_clone(options)
    cache.attach(guider.model_options)
    try:
        return executor(*args, **kwargs)
    finally:
        guider.model_options = options
        cache.passes.clear()
        summary = f"left out {cache.skipped} of {cache.calls} model calls"
        if cache.divided:
            summary += " (another node divides the batches, and such passes are always computed)"
        logging.info("Ovi Step Cache %s", summary)
        if report is not None:
            report(summary)


def set_step_cache(model, settings: Settings, report: Callable[[str], None] | None = None):
    """Return a clone of MODEL that leaves out calls; in place of an earlier cache. `report` gets a line at the end.

    Raises ValueError for an empty range or a threshold that is no number.
    """
    check_range(settings.start, settings.end)
    for name, threshold in (("video", settings.video_threshold), ("audio", settings.audio_threshold)):
        if not math.isfinite(threshold):
            raise ValueError(f"{name}_threshold must be a number from 0 to 3; got {threshold}. 0 leaves out no step.")
    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, partial(sample_with_cache, settings, report))
    return model
