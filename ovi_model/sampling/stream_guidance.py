"""Guidance functions of ComfyUI's and other packs' nodes, called for each stream by itself.

Core hands the functions that a MODEL carries (before, in place of and after the guidance formula)
its packed latent [B, 1, n], where picture and sound are one row of numbers: a norm, a standard
deviation or a projection over it mixes both. Here each function is called once with the video [B,
48, T, H, W] and once with the audio [B, 20, A], in all of its arguments, with the guidance scale of
that stream, and what it returns is packed again. A function that only knows pictures (it asks for a
fourth dimension) gets the sound as [B, 20, 1, A].

A function may call the model again, on its stream's latent: see `evaluations`.

When: the model's `current_patcher` is set by core where a sampling begins, whoever loaded the
model, and gives it a `Sampling`. The options are rewritten before the first step where the wrapper
from `attach` is there (our nodes), else in the first call of the model, which is the last place
before core looks at them. What a sampler adds for itself later (the `cfg_pp` ones) stays packed, as
it wants it.

Shapes: B clips, n elements of the packed latent, T latent frames, A audio latents.
"""

import logging
import math
from collections.abc import Callable
from functools import partial

import comfy.model_management
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from .evaluations import KEY, Evaluations
from .packed import STREAMS, pack, take
from .patches import idle_patches, name_of, offer_attention_outputs
from .stream_memory import StreamMemory

AUDIO_SCALE = "ovi_audio_guidance"
"""Where a MODEL's options carry the sound's own guidance scale."""
BEFORE = "sampler_pre_cfg_function"
INSTEAD = "sampler_cfg_function"
AFTER = "sampler_post_cfg_function"


def cfg(positive, negative, scale: float):
    """Return `negative + scale * (positive - negative)`, of velocities or denoised estimates."""
    return negative + scale * (positive - negative)


def attach(model, warn: Callable[[str], None] = logging.warning) -> None:
    """Make samplings with this MODEL rewrite their options first, and send warnings to `warn`."""
    model.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, partial(sample, warn))


def sample(warn, executor, guider, sigmas, extra_args, *args, **kwargs):
    """Core's wrapper around a sampler: every function that it finds in the options is a MODEL's."""
    sampling = guider.inner_model.sampling
    sampling.warn = warn
    options = dict(extra_args["model_options"])
    sampling.rewrite(options, lambda _: True)
    return executor(guider, sigmas, {**extra_args, "model_options": options}, *args, **kwargs)


class Sampling:
    """One sampling with a model, from where core takes it in use until it lets it go."""

    def __init__(self, model, patcher):
        self.model, self.patcher = model, patcher
        self.warn: Callable[[str], None] = logging.warning
        self.warned: set[str] = set()
        self.memory = StreamMemory(len(STREAMS))
        self.functions: dict[int, StreamFunction] = {}
        patcher.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, KEY, self.prepare)

    def end(self) -> None:
        self.patcher.remove_callbacks_with_key(CallbacksMP.ON_PREPARE_STATE, KEY)
        self.memory.end()

    @property
    def shapes(self) -> list:
        return self.model.latent_shapes

    def prepare(self, patcher, _timestep, options: dict) -> None:
        """Core's callback in each call of the model, before it looks for guidance functions."""
        if self.shapes and options is not patcher.model_options:
            own = patcher.model_options
            carried = [*own.get(BEFORE, ()), *own.get(AFTER, ()), own.get(INSTEAD)]
            self.rewrite(options, lambda function: any(function is other for other in carried))

    def rewrite(self, options: dict, chosen: Callable[[Callable], bool]) -> None:
        """Change a sampling's options, once: each chosen function is called for each stream."""
        if KEY in options:
            return
        options[KEY] = True
        self.say(self.model.length_disagreement())
        self.look_for_idle_patches(options)
        offer_attention_outputs(options)
        for name in (BEFORE, AFTER):
            if options.get(name):
                options[name] = [self.for_each_stream(f) if chosen(f) else f for f in options[name]]
        if INSTEAD in options and chosen(options[INSTEAD]):
            options[INSTEAD] = self.for_each_stream(options[INSTEAD])
        elif AUDIO_SCALE in options:
            audio_cfg = partial(cfg_of_audio, self.shapes, options[AUDIO_SCALE])
            options[AFTER] = [audio_cfg, *options.get(AFTER, [])]

    def for_each_stream(self, function: Callable) -> "StreamFunction":
        """The function wrapped, the same in every step."""
        return self.functions.setdefault(id(function), StreamFunction(function, self))

    def look_for_idle_patches(self, options: dict) -> None:
        self.say(idle_patches(options.get("transformer_options", {}), self.model.patch_places))

    def say(self, warning: str | None) -> None:
        """Warn, once a sampling."""
        if warning and warning not in self.warned:
            self.warned.add(warning)
            self.warn(warning)


def cfg_of_audio(shapes: list, scale: float, args: dict) -> Tensor:
    """Guidance of the sound by its own scale, on the packed result of core's formula."""
    if not has_negative(args):  # nothing to guide away from; core may hand over zeros
        return args["denoised"]
    out, start = args["denoised"].clone(), math.prod(shapes[0][1:])
    positive, negative = args["cond_denoised"], args["uncond_denoised"]
    out[..., start:] = cfg(positive[..., start:], negative[..., start:], scale)
    return out


def has_negative(args: dict) -> bool:
    """Whether a negative pass ran, from the arguments of a guidance function of any kind."""
    if "conds" in args:
        return len(args["conds"]) > 1 and args["conds"][1] is not None
    return args["input_uncond" if "input_uncond" in args else "uncond"] is not None


class StreamFunction:
    """A guidance function that is called for each stream by itself."""

    def __init__(self, function: Callable, sampling: Sampling):
        self.function, self.sampling = function, sampling
        self.only_pictures = False  # it has asked for a fourth dimension

    def __call__(self, args: dict):
        shapes = self.sampling.shapes
        evaluations = Evaluations(shapes, args, self.sampling.look_for_idle_patches)
        outs = [self.call(stream, args, evaluations) for stream in range(len(STREAMS))]
        if isinstance(outs[0], list | tuple):
            return [pack(parts, shapes) for parts in zip(*outs, strict=True)]
        return pack(outs, shapes)

    def call(self, stream: int, args: dict, evaluations: "Evaluations"):
        """What the function makes of one stream: tensors of its shape."""
        shape = list(self.sampling.shapes[stream][1:])
        as_picture = [shape[0], 1, *shape[1:]]
        flat = len(shape) < 3
        try:
            if flat and self.only_pictures:
                return self.run(stream, as_picture, args, evaluations)
            try:
                return self.run(stream, shape, args, evaluations)
            except (IndexError, WrongShape):
                if not flat:
                    raise
                self.only_pictures = True
                return self.run(stream, as_picture, args, evaluations)
        except (AttributeError, IndexError, TypeError, RuntimeError, WrongShape) as error:
            if isinstance(error, comfy.model_management.OOM_EXCEPTION):
                raise
            raise ValueError(
                f"The guidance function of '{name_of(self.function)}' cannot be used on "
                f"{self.sampling.model.patch_places.family}'s {STREAMS[stream]}, a latent "
                f"{[args['input'].shape[0], *shape]}: {error}. It was made for another kind of "
                "model; take its node out.") from error

    def run(self, stream: int, shape: list, args: dict, evaluations: "Evaluations"):
        cut = partial(take, self.sampling.shapes, stream, shape)
        given = {key: cut(value) for key, value in args.items()}
        given["model"], given["model_options"] = evaluations.begin(stream, given["input"])
        scale = args["model_options"].get(AUDIO_SCALE)
        if stream == 1 and scale is not None and has_negative(args):
            given["cond_scale"] = scale
        with self.sampling.memory.of(self.function, stream):
            out = self.function(given)
        x = given["input"]
        for part in out if isinstance(out, list | tuple) else [out]:
            if part is not None and (part.shape[0], part.numel()) != (x.shape[0], x.numel()):
                raise WrongShape(f"it returned {list(part.shape)}")
        return out


class WrongShape(Exception):
    """A function returned something else than a latent of the stream."""
