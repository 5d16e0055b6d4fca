"""Guidance functions of ComfyUI's and other packs' nodes, called for picture and sound each by itself.

Core hands the functions that a MODEL carries (before, in place of and after the guidance formula) its packed latent
[B, 1, n], where picture and sound are one row of numbers: a norm, a standard deviation or a projection over it mixes
both. Here each function is called once with the video [B, 48, T, H, W] and once with the audio [B, 20, A], in all of
its arguments, with the guidance scale of that stream, and what it returns is packed again. A function that only knows
pictures (it asks for a fourth dimension) gets the sound as [B, 20, 1, A].

A function may call the model again, on its stream's latent. It is then run with both: the other stream as it stands.
Both streams asking for the same evaluation, as skip-layer guidance does, get it computed once.

When: `OviBaseModel.current_patcher` is set by core where a sampling begins, whoever loaded the model, and gives it a
`Sampling`. The options are rewritten before the first step where the wrapper from `attach` is there (our nodes), else
in the first call of the model, which is the last place before core looks at them. What a sampler adds for itself later
(the `cfg_pp` ones) stays packed, as it wants it.

Shapes: B clips, n elements of the packed latent, T latent frames, A audio latents.
"""

import logging
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from .patches import idle_patches, name_of, offer_attention_outputs
from .stream_memory import StreamMemory

KEY = "ovi_stream_guidance"
AUDIO_SCALE = "ovi_audio_guidance"
"""Where a MODEL's options carry the sound's own guidance scale."""
BEFORE, INSTEAD, AFTER = "sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function"
STREAMS = ("picture", "sound")


def guide(positive, negative, scale: float):
    """Return `negative + scale * (positive - negative)`; exact on velocities and on clean estimates alike."""
    return negative + scale * (positive - negative)


def attach(model, warn: Callable[[str], None] = logging.warning) -> None:
    """Make samplings with this MODEL rewrite their options before the first step, and send warnings to `warn`."""
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
        """Core's callback in each call of the model, before it looks for guidance functions in the options."""
        if self.shapes and options is not patcher.model_options:
            carried = [*patcher.model_options.get(BEFORE, ()), *patcher.model_options.get(AFTER, ()),
                       patcher.model_options.get(INSTEAD)]
            self.rewrite(options, lambda function: any(function is other for other in carried))

    def rewrite(self, options: dict, chosen: Callable[[Callable], bool]) -> None:
        """Change the options of a sampling, once: each of its chosen functions is called for each stream."""
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
            options[AFTER] = [partial(guide_audio, self.shapes, options[AUDIO_SCALE]), *options.get(AFTER, [])]

    def for_each_stream(self, function: Callable) -> "StreamFunction":
        """The function wrapped, the same in every step."""
        return self.functions.setdefault(id(function), StreamFunction(function, self))

    def look_for_idle_patches(self, options: dict) -> None:
        self.say(idle_patches(options.get("transformer_options", {}), len(self.model.diffusion_model.blocks)))

    def say(self, warning: str | None) -> None:
        """Warn, once a sampling."""
        if warning and warning not in self.warned:
            self.warned.add(warning)
            self.warn(warning)


def guide_audio(shapes: list, scale: float, args: dict) -> Tensor:
    """Guidance of the sound by its own scale, on the packed result of core's formula."""
    if not has_negative(args):  # nothing to guide away from; core may hand over zeros
        return args["denoised"]
    audio = math.prod(shapes[0][1:])
    out = args["denoised"].clone()
    out[..., audio:] = guide(args["cond_denoised"][..., audio:], args["uncond_denoised"][..., audio:], scale)
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
        evaluations = Evaluations(self.sampling, args)
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
                f"The guidance function of '{name_of(self.function)}' cannot be used on Ovi's {STREAMS[stream]}, a "
                f"latent {[args['input'].shape[0], *shape]}: {error}. It was made for another kind of model; take its "
                "node out.") from error

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


def take(shapes: list, stream: int, shape: list, value: Any):
    """One stream of a packed tensor, or of each in a list, viewed as [rows, *shape]; anything else as it is."""
    if isinstance(value, list | tuple) and any(isinstance(part, Tensor) for part in value):
        return type(value)(take(shapes, stream, shape, part) for part in value)
    sizes = [math.prod(s[1:]) for s in shapes]
    if not isinstance(value, Tensor) or value.ndim != 3 or tuple(value.shape[1:]) != (1, sum(sizes)):
        return value
    start = sum(sizes[:stream])
    return value[..., start:start + sizes[stream]].reshape(value.shape[0], *shape)


def pack(parts, shapes: list) -> Tensor | None:
    """Both streams, in any shapes of the right size, as one packed tensor."""
    if any(part is None for part in parts):
        return None
    return torch.cat([part.reshape(part.shape[0], 1, math.prod(shape[1:]))
                      for part, shape in zip(parts, shapes, strict=True)], dim=-1)


class Evaluations:
    """Calls of the model that a guidance function makes itself, in the call for one stream and in that for the other.

    It sees a model of its stream alone. Each evaluation runs on both streams; where it is of the latent as it was
    handed over, the second stream's call finds the result of the first.
    """

    def __init__(self, sampling: Sampling, args: dict):
        self.sampling, self.model, self.x, self.options = sampling, args["model"], args["input"], args["model_options"]
        self.given = self.x  # what the call in progress got as input
        self.known: list[tuple[tuple, Any]] = []

    def begin(self, stream: int, x: Tensor) -> tuple["StreamModel", dict]:
        """The model and the options for the function's call on stream x."""
        self.given = x
        options = {key: value for key, value in self.options.items() if key != "context_handler"}
        transformer_options = dict(options.get("transformer_options", {}))
        transformer_options["wrappers"] = {**transformer_options.get("wrappers", {}), WrappersMP.CALC_COND_BATCH: {
            KEY: [partial(self.calc_cond_batch, stream)]}}
        return StreamModel(self, stream), {**options, "transformer_options": transformer_options}

    def calc_cond_batch(self, stream: int, executor, model, conds, x, timestep, options):
        """Core's wrapper around all conditionings at one latent, here x of one stream: computes them on both."""
        if x.numel() != self.given.numel():
            return executor(model, conds, x, timestep, options)
        options = self.restore(options)
        self.sampling.look_for_idle_patches(options)
        return self.run(stream, x, (conds, timestep, options), lambda packed: comfy.samplers.calc_cond_batch(
            self.model, conds, packed, timestep, options))

    def restore(self, options: dict) -> dict:
        """The options of a whole call of the model, from those a function was given and may have added to."""
        before = self.options.get("transformer_options", {}).get("wrappers", {})
        wrappers = {**options["transformer_options"]["wrappers"], WrappersMP.CALC_COND_BATCH: before.get(
            WrappersMP.CALC_COND_BATCH, {})}
        handler = {"context_handler": self.options["context_handler"]} if "context_handler" in self.options else {}
        return {**options, **handler, "transformer_options": {**options["transformer_options"], "wrappers": wrappers}}

    def run(self, stream: int, x: Tensor, key: tuple, compute: Callable[[Tensor], Any]):
        """The stream's part of `compute(packed latent)`, with x in the stream's place."""
        if x is self.given:
            result = next((result for known, result in self.known if same(known, key)), None)
            if result is None:
                result = compute(self.x)
                self.known.append((key, result))
        else:
            result = compute(self.with_stream(stream, x))
        return take(self.sampling.shapes, stream, list(x.shape[1:]), result)

    def with_stream(self, stream: int, x: Tensor) -> Tensor:
        """The packed latents in whose rows x [R * B, ...] stands for one stream."""
        shapes = self.sampling.shapes
        other = take(shapes, 1 - stream, list(shapes[1 - stream][1:]), self.x)
        other = other.repeat(x.shape[0] // other.shape[0], *[1] * (other.ndim - 1)).to(x)
        return pack([x, other] if stream == 0 else [other, x], shapes)


class StreamModel:
    """The model as if it made one stream alone: what a guidance function gets as "model"."""

    def __init__(self, evaluations: Evaluations, stream: int):
        self.evaluations, self.stream = evaluations, stream

    def __getattr__(self, name: str):
        return getattr(self.evaluations.model, name)

    def apply_model(self, x: Tensor, t: Tensor, *args, **conds) -> Tensor:
        """Clean estimates for rows x [R * B, ...] of the stream."""
        return self.evaluations.run(self.stream, x, (t, args, conds), lambda packed: self.evaluations.model.apply_model(
            packed, t, *args, **conds))

    def extra_conds(self, **kwargs) -> dict:
        return self.evaluations.model.extra_conds(**kwargs, latent_shapes=self.evaluations.sampling.shapes)


def same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal as far as can be told without looking into tensors."""
    if a is b:
        return True
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, bool | int | float | str) and type(a) is type(b) and a == b


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity. Waits for the device once."""
    finite = [tensor.isfinite().all() for tensor in tensors.values()]
    answers = torch.stack([answer.to(finite[0].device) for answer in finite]).tolist()
    return [name for name, fine in zip(tensors, answers, strict=True) if not fine]


def check_finite(latent: Tensor, shapes: list) -> None:
    """Raise RuntimeError if the result of a sampling, packed [B, 1, n], is not finite. Waits for the device once."""
    broken = not_finite({name: take(shapes, stream, [-1], latent) for stream, name in enumerate(STREAMS)})
    if broken:
        raise RuntimeError(
            f"The sampled {' and '.join(broken)} {'is' if len(broken) == 1 else 'are'} not finite (NaN or infinity). "
            "There is nothing to decode. Likely causes: a damaged model file, or two files that do not belong "
            "together (load the model again, or download it again); a LoRA or its strength (take it out); computing in "
            "fp16 (start ComfyUI without --fp16-unet and --force-fp16); settings of guidance nodes; a schedule that "
            "ends at a noise level of 1 ('SplitSigmas' at step 0, 'FlipSigmas').")
