"""Calls of the model that a guidance function makes itself, while it sees one stream alone.

Skip-layer guidance, say, asks for one more estimate. The network makes both streams at once, so
such a call is run on both, the other stream as it stands, and the function gets its own back.

Shapes: B clips, R conditionings in a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.samplers
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from .packed import pack, take

KEY = "ovi_stream_guidance"


class Evaluations:
    """Calls of the model that one guidance function makes itself, for either stream.

    It sees a model of its stream alone. Where an evaluation is of the latent as it was handed over,
    as in skip-layer guidance, the second stream's call finds the result of the first.
    """

    def __init__(self, shapes: list, args: dict, look_at: Callable[[dict], None]):
        """look_at: gets the options of a call, to which the function may have added patches."""
        self.shapes, self.model, self.look_at = shapes, args["model"], look_at
        self.x, self.options = args["input"], args["model_options"]
        self.given = self.x  # what the call in progress got as input
        self.known: list[tuple[tuple, Any]] = []

    def begin(self, stream: int, x: Tensor) -> tuple[StreamModel, dict]:
        """The model and the options for the function's call on stream x."""
        self.given = x
        options = {key: value for key, value in self.options.items() if key != "context_handler"}
        transformer_options = dict(options.get("transformer_options", {}))
        transformer_options["wrappers"] = {
            **transformer_options.get("wrappers", {}),
            WrappersMP.CALC_COND_BATCH: {KEY: [partial(self.calc_cond_batch, stream)]}}
        return StreamModel(self, stream), {**options, "transformer_options": transformer_options}

    def calc_cond_batch(self, stream: int, executor, model, conds, x, timestep, options):
        """Core's wrapper around all conditionings at one latent, here one stream: computes both."""
        if x.numel() != self.given.numel():
            return executor(model, conds, x, timestep, options)
        options = self.restore(options)
        self.look_at(options)

        def compute(packed: Tensor):
            return comfy.samplers.calc_cond_batch(self.model, conds, packed, timestep, options)

        return self.run(stream, x, (conds, timestep, options), compute)

    def restore(self, options: dict) -> dict:
        """Options of a whole call, from those that a function got and may have changed."""
        before = self.options.get("transformer_options", {}).get("wrappers", {})
        wrappers = {**options["transformer_options"]["wrappers"],
                    WrappersMP.CALC_COND_BATCH: before.get(WrappersMP.CALC_COND_BATCH, {})}
        handler = {key: self.options[key] for key in ("context_handler",) if key in self.options}
        return {**options, **handler,
                "transformer_options": {**options["transformer_options"], "wrappers": wrappers}}

    def run(self, stream: int, x: Tensor, key: tuple, compute: Callable[[Tensor], Any]):
        """The stream's part of `compute(packed latent)`, with x in the stream's place."""
        if x is self.given:
            result = next((result for known, result in self.known if same(known, key)), None)
            if result is None:
                result = compute(self.x)
                self.known.append((key, result))
        else:
            result = compute(self.with_stream(stream, x))
        return take(self.shapes, stream, list(x.shape[1:]), result)

    def with_stream(self, stream: int, x: Tensor) -> Tensor:
        """The packed latents in which x [R * B, ...] stands for one stream."""
        other = take(self.shapes, 1 - stream, list(self.shapes[1 - stream][1:]), self.x)
        other = other.repeat(x.shape[0] // other.shape[0], *[1] * (other.ndim - 1)).to(x)
        return pack([x, other] if stream == 0 else [other, x], self.shapes)


class StreamModel:
    """The model as if it made one stream alone: what a guidance function gets as "model"."""

    def __init__(self, evaluations: Evaluations, stream: int):
        self.evaluations, self.stream = evaluations, stream

    def __getattr__(self, name: str):
        return getattr(self.evaluations.model, name)

    def apply_model(self, x: Tensor, t: Tensor, *args, **conds) -> Tensor:
        """Denoised estimates for x [R * B, ...] of the stream."""
        def compute(packed: Tensor) -> Tensor:
            return self.evaluations.model.apply_model(packed, t, *args, **conds)

        return self.evaluations.run(self.stream, x, (t, args, conds), compute)

    def extra_conds(self, **kwargs) -> dict:
        shapes = self.evaluations.shapes
        return self.evaluations.model.extra_conds(**kwargs, latent_shapes=shapes)


def same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal as far as can be told without looking into tensors."""
    if a is b:
        return True
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, bool | int | float | str) and type(a) is type(b) and a == b
