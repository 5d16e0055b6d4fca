"""Step caching on both streams: passes are skipped while neither would change much.

When: as EasyCache (arXiv 2507.02860, core's node of that name) found, how much the prediction
changes for each bit that the noisy latent moves stays similar over many steps, so the change to
come can be told from the latent alone. Here each stream is measured by itself (core's node measures
the video, 99.9 % of the elements), the change is that since the last computed pass rather than a
sum, and what is given and not sampled (a first frame) does not dilute it.

What instead: the velocity continued in a straight line from the last two computed, over sigma.
Taking the last one as it is, as core's node in effect does, made two to ten times the error
(benchmarks/LOG.md).

All conditionings at a latent are skipped together or not at all: positive and negative never come
from different latents. They may come in several calls, from a model of their own each (core's 'Dual
Model CFG Guider') or for one more pass with a block skipped; the first call decides for those that
the step before had as well. Windows of a long clip decide one by one. A decision is made once a
latent, before core divides it over batches or GPUs, and costs one host-device sync. Everything
lives for one sampling, in wrappers on its copy of the options.

A wrapper of another pack may divide a batch without telling which indices it hands on. Such a pass
is always computed.

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
"""Calls skipped in succession, at most: the rate of change is as old as the last computed pass."""


@dataclass(frozen=True)
class Settings:
    """Relative change of each stream's prediction below which it is reused, and in which steps."""

    video_threshold: float
    audio_threshold: float
    start: float
    end: float


@dataclass
class CachedPrediction:
    """The last computed pass of one conditioning, and how fast its velocity was changing."""

    sigma: float
    x: Tensor  # [B, 1, n] noisy latent
    velocity: Tensor  # [B, 1, n] (x - denoised) / sigma
    derivative: Tensor | float  # [B, 1, n] of the velocity by sigma, 0 while unknown
    rate: Tensor  # [2, B] relative change of velocity per unit x moves, infinite while unknown
    video_size: int  # elements of a clip that are video
    used: float  # sigma of the last call it took part in
    reused: int = 0  # calls in a row that continued it

    def expected_change(self, x: Tensor) -> Tensor:
        """Relative change (video [0], audio [1]) expected at latent x, the clips' greatest."""
        moved = norms(x.to(self.x.device) - self.x, self.video_size)
        return (self.rate * moved).amax(1).to(x.device)

    def followed_by(self, x: Tensor, velocity: Tensor, weights: Tensor,
                    sigma: float) -> "CachedPrediction":
        """The pass computed after this one. weights: see `sampled_share`."""
        change, derivative = velocity - self.velocity, self.derivative
        moved = norms(x - self.x, self.video_size)
        size = norms(weights * velocity, self.video_size)
        rate = norms(weights * change, self.video_size) / (moved * size).clamp(min=1e-20)
        # a latent that stood still tells nothing
        rate = torch.where(moved > 1e-6 * size, rate, self.rate)
        if sigma != self.sigma:
            derivative = change / (sigma - self.sigma)
        return CachedPrediction(sigma, x, velocity, derivative, rate, self.video_size, sigma)

    def continued(self, sigma: float) -> Tensor:
        """The velocity to expect at another sigma."""
        return self.velocity + self.derivative * (sigma - self.sigma)


def norms(packed: Tensor, video_size: int) -> Tensor:
    """L2 norms [2, B] of video and audio in a packed latent [B, 1, n]."""
    parts = packed[..., :video_size], packed[..., video_size:]
    return torch.stack([part.flatten(1).norm(dim=1) for part in parts])


def sampled_share(x: Tensor, latent_shapes: list, denoise_mask=None, audio_denoise_mask=None,
                  **_) -> Tensor:
    """Weights [B, 1, n] for packed latents x: 0 where the latent is given; [B, 1, 1] if none is.

    Shapes of the streams and masks are those that core hands to the network.
    """
    if denoise_mask is None and audio_denoise_mask is None:
        return x.new_ones(x.shape[0], 1, 1)
    masks = (x.new_ones(1) if mask is None else mask.to(x)
             for mask in (denoise_mask, audio_denoise_mask))
    return comfy.utils.pack_latents([mask.expand(x.shape[0], *shape[1:])
                                     for mask, shape in zip(masks, latent_shapes, strict=True)])[0]


def pass_key(uuid, transformer_options) -> tuple:
    """What tells a sampling's passes apart: conditioning, context window, replaced blocks."""
    window = transformer_options.get("context_window")
    replaced = transformer_options.get("patches_replace", {}).get("dit", {})
    return (uuid, None if window is None else tuple(window.index_list),
            tuple((block, id(patch)) for block, patch in replaced.items()))


class StepCache:
    """The passes of one sampling over `sigmas` [steps + 1]; there may be no step."""

    def __init__(self, settings: Settings, sigmas: Tensor):
        self.settings = settings
        highest, lowest = step_range(sigmas, settings.start, settings.end)
        self.highest = float(highest)
        self.lowest = max(float(lowest), float(sigmas[-2:][0]))  # the last is computed
        self.predictions: dict[tuple, CachedPrediction] = {}
        self.skipping: set[tuple] = set()  # keys of the passes that the call in progress skips
        self.calls = self.skipped = 0
        self.sigma = self.previous = math.inf  # of the step in progress and of the one before
        self.subject: tuple = (None, None, None)  # latent, timestep and window of the last decision
        self.agreed: set[tuple] = set()  # keys of the passes that it skips
        self.divided = False  # whether a pass came in parts that cannot be told apart

    def attach(self, model_options: dict) -> None:
        """Wrap the model calls of a sampling with these options."""
        for place, wrapper in ((WrappersMP.CALC_COND_BATCH, self.on_call),
                               (WrappersMP.APPLY_MODEL, self.on_pass)):
            add_wrapper_with_key(place, KEY, wrapper, model_options, is_model_options=True)

    def on_call(self, executor, model, conds, x, timestep, model_options):
        """Core's wrapper around the conditionings of a call at one latent x [B, 1, n]."""
        self.skipping = self.choose(conds, x, timestep, model_options["transformer_options"])
        return executor(model, conds, x, timestep, model_options)

    def choose(self, conds, x: Tensor, timestep: Tensor, transformer_options) -> set[tuple]:
        """Keys of the passes to skip: of every active conditioning, or none."""
        entries = {pass_key(entry["uuid"], transformer_options): entry
                   for cond in conds for entry in cond or []}
        window = pass_key(None, transformer_options)[1]
        last_x, last_timestep, last_window = self.subject
        if x is not last_x or timestep is not last_timestep or window != last_window:
            self.decide(entries, x, timestep, window)
        active = self.active(entries)
        for key in active & self.predictions.keys():
            self.predictions[key].used = self.sigma
        return active if active <= self.agreed else set()

    def decide(self, entries: dict[tuple, dict], x: Tensor, timestep: Tensor, window) -> None:
        """Agree on what to skip at a latent: this call's passes, and those that followed last."""
        self.subject = x, timestep, window
        following = {key for key, last in self.predictions.items() if key[1] == window
                     and last.used in (self.sigma, self.previous)} - entries.keys()
        known = [key for key in {**entries, **dict.fromkeys(following)}
                 if key in self.predictions and self.predictions[key].x.shape == x.shape]
        expected = [self.predictions[key].expected_change(x) for key in known]
        # the one host-device sync
        sigma, *numbers = torch.cat([timestep[:1].to(x), *expected]).tolist()
        changes = dict(zip(known, zip(numbers[::2], numbers[1::2], strict=True), strict=True))
        if sigma != self.sigma:
            # what the step before did not use: windows that moved on, ended conditionings
            self.predictions = {key: last for key, last in self.predictions.items()
                                if last.used == self.sigma or key in known}
            self.sigma, self.previous = sigma, self.sigma
        together = self.active(entries) | following
        self.agreed = together if all(self.may_skip(key, changes) for key in together) else set()
        self.calls, self.skipped = self.calls + 1, self.skipped + bool(self.agreed)

    def active(self, entries: dict[tuple, dict]) -> set[tuple]:
        """Keys of the conditionings whose range of sigmas holds the present one."""
        return {key for key, entry in entries.items()
                if (entry.get("timestep_end", 0.0) <= self.sigma
                    <= entry.get("timestep_start", math.inf))}

    def may_skip(self, key: tuple, changes: dict) -> bool:
        """Whether this pass's velocity is good enough for the call in progress."""
        video, audio = changes.get(key, (math.inf, math.inf))
        return (self.lowest < self.sigma <= self.highest
                and video < self.settings.video_threshold
                and audio < self.settings.audio_threshold
                and self.predictions[key].reused < MAX_IN_A_ROW)

    def on_pass(self, executor, x, t, c_concat=None, c_crossattn=None, control=None,
                transformer_options={}, **conds):  # noqa: B006 (core's signature)
        """Core's wrapper around a batch of passes: x [C * B, 1, n], t [C * B] -> denoised."""
        keys = [pass_key(uuid, transformer_options) for uuid in transformer_options["uuids"]]
        if len(x) != len(keys) * len(self.subject[0]):
            self.divided = True
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **conds)
        sigma = t.reshape(-1, 1, 1)
        if self.skipping.issuperset(keys):
            for key in keys:
                self.predictions[key].reused += 1
            velocities = [self.predictions[key].continued(self.sigma) for key in keys]
            # a conditioning may move between GPUs
            return x - sigma * torch.cat([velocity.to(x.device) for velocity in velocities])
        out = executor(x, t, c_concat, c_crossattn, control, transformer_options, **conds)
        parts = (y.chunk(len(keys)) for y in (x, (x - out) / sigma, sampled_share(x, **conds)))
        video_size = math.prod(conds["latent_shapes"][0][1:])
        for key, part, velocity, weights in zip(keys, *parts, strict=True):
            self.record(key, part, velocity, weights, video_size)
        return out

    def record(self, key: tuple, x: Tensor, velocity: Tensor, weights: Tensor,
               video_size: int) -> None:
        """Keep a computed pass."""
        last = self.predictions.get(key)
        if last is not None and last.x.shape == x.shape and last.x.device == x.device:
            self.predictions[key] = last.followed_by(x, velocity, weights, self.sigma)
        else:
            rate = x.new_full((2, x.shape[0]), math.inf)
            self.predictions[key] = CachedPrediction(
                self.sigma, x, velocity, 0.0, rate, video_size, self.sigma)


def sample_with_cache(settings: Settings, report: Callable[[str], None] | None, executor, *args,
                      **kwargs):
    """Core's wrapper around a whole sampling: give it a cache of its own, and free that."""
    guider = executor.class_obj
    options = guider.model_options
    cache = StepCache(settings, args[3])
    guider.model_options = comfy.model_patcher.create_model_options_clone(options)
    cache.attach(guider.model_options)
    try:
        return executor(*args, **kwargs)
    finally:
        guider.model_options = options
        cache.predictions.clear()
        summary = f"skipped {cache.skipped} of {cache.calls} passes through the model"
        if cache.divided:
            summary += (" (another node divides the batches, and such passes are always "
                        "computed)")
        logging.info("Ovi Step Cache %s", summary)
        if report is not None:
            report(summary)


def set_step_cache(model, settings: Settings, report: Callable[[str], None] | None = None):
    """Return a clone of MODEL that skips calls, in place of an earlier cache.

    report: gets a line at the end.

    Raises ValueError for an empty range or a threshold that is no number.
    """
    check_range(settings.start, settings.end)
    thresholds = {"video": settings.video_threshold, "audio": settings.audio_threshold}
    for name, threshold in thresholds.items():
        if not math.isfinite(threshold):
            raise ValueError(f"{name}_threshold must be a number from 0 to 3; got {threshold}. 0 "
                             "skips no step.")
    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    wrapper = partial(sample_with_cache, settings, report)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, wrapper)
    return model
