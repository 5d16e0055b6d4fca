"""Splits one pass of the network by part and tower: seconds, or FLOP.

Between two boundaries everything belongs to the innermost part that is running. Boundaries are the calls of the
network's modules, the methods of the pack's own modules, and ComfyUI's attention call, which says by the number of
queries and keys which attention it is. So the table holds whatever the forward is rewritten to, as long as modules keep
their checkpoint names. On a GPU the boundaries are events in the stream: nothing waits, and the gaps in which the GPU
has nothing to do count for the part they fall into.
"""

from __future__ import annotations

import inspect
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measure import FlopCounter
from subjects import TEXT_TOKENS

VIDEO, AUDIO = "video", "audio"
REST = ("rest (packing, patches)", "")
MODULES = {  # longest match of the dotted name below the tower or block
    "patch_embedding": "embedding", "time_embedding": "timestep", "time_projection": "timestep",
    "text_embedding": "text embedding", "rope_embedder": "rotary tables", "head": "head",
    "blocks": "modulation, norms, residuals",
    "self_attn": "self-attention: norm, rotation",
    **{f"self_attn.{name}": "self-attention: projections" for name in "qkvo"},
    "cross_attn": "cross-attention: norm, rotation",
    "cross_attn.q": "cross-attention: shared q, o", "cross_attn.o": "cross-attention: shared q, o",
    "cross_attn.k": "text: keys, values", "cross_attn.v": "text: keys, values",
    "cross_attn.norm_k": "text: keys, values",
    "cross_attn.k_fusion": "other stream: keys, values", "cross_attn.v_fusion": "other stream: keys, values",
    "cross_attn.norm_k_fusion": "other stream: keys, values",
    "cross_attn.pre_attn_norm_fusion": "other stream: keys, values",
    "ffn": "feed-forward",
}
METHODS = {"embed_time": "timestep", "embed_text": "text embedding", "rope_encode": "rotary tables",
           "rope_table": "rotary tables"}
Part = tuple[str, str]  # (what, tower)


def part_of(name: str) -> Part:
    """Part of a module by its name in the network."""
    tower = AUDIO if name.startswith("audio_model") else VIDEO
    path = name.removeprefix("audio_model").strip(".").split(".")
    if path[0] == "blocks":
        path = path[2:] or ["blocks"]
        if path[0].startswith("norm"):
            path = ["blocks"]
    for length in range(len(path), 0, -1):
        if ".".join(path[:length]) in MODULES:
            return MODULES[".".join(path[:length])], tower
    return REST


@dataclass
class Boundary:
    part: Part
    reading: Any


class Split:
    """Context manager over one or more passes of `network`; `options` are their transformer options.

    meter: called at each boundary, its readings are for `difference` to subtract.
    """

    def __init__(self, network, tokens: dict[str, int], meter: Callable[[], Any],
                 difference: Callable[[Any, Any], float], attend: Callable | None = None) -> None:
        if len({*tokens.values(), TEXT_TOKENS}) != 3:
            raise ValueError(f"The streams and the text ({TEXT_TOKENS}) must differ in length; got {tokens}.")
        self.network, self.meter, self.difference = network, meter, difference
        self.streams = {count: tower for tower, count in tokens.items()}
        self.attend = attend or (lambda function, *args, **kwargs: function(*args, **kwargs))
        self.running: list[Part] = [REST]
        self.boundaries: list[Boundary] = []
        self.options = {"optimized_attention_override": self.attention}
        self.handles: list = []
        self.wrapped: list[tuple[torch.nn.Module, str]] = []

    def enter(self, part: Part) -> None:
        self.boundaries.append(Boundary(self.running[-1], self.meter()))
        self.running.append(part)

    def leave(self) -> None:
        self.boundaries.append(Boundary(self.running.pop(), self.meter()))

    def attention(self, function, q, k, *args, **kwargs):
        """ComfyUI's attention call: which one it is follows from its lengths."""
        tower = self.streams.get(q.shape[-2], "?")
        what = "to itself" if q.shape[-2] == k.shape[-2] else "to text" if k.shape[-2] == TEXT_TOKENS else (
            "to the other stream")
        self.enter((f"attention kernel: {what}", tower))
        try:
            return self.attend(function, q, k, *args, **kwargs)
        finally:
            self.leave()

    def __enter__(self) -> Split:
        for name, module in self.network.named_modules():
            part = part_of(name)
            if type(module).__module__.startswith("ovi_native"):
                self.wrap_methods(module, part)
            elif part != REST:
                self.handles += [module.register_forward_pre_hook(lambda *_, part=part: self.enter(part)),
                                 module.register_forward_hook(lambda *_: self.leave())]
        return self

    def wrap_methods(self, module: torch.nn.Module, part: Part) -> None:
        """Make boundaries of all the methods that the pack gave a module."""
        for name, function in inspect.getmembers(type(module), inspect.isfunction):
            ours = function.__module__.startswith("ovi_native") and not name.startswith("__")
            if ours or name in METHODS:
                tower = part[1] if part != REST else AUDIO if module is self.network.audio_model else VIDEO
                at = (METHODS[name], tower) if name in METHODS else part
                setattr(module, name, self.bounded(getattr(module, name), at))
                self.wrapped.append((module, name))

    def bounded(self, method: Callable, part: Part) -> Callable:
        def call(*args, **kwargs):
            self.enter(part)
            try:
                return method(*args, **kwargs)
            finally:
                self.leave()
        return call

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()
        for module, name in self.wrapped:
            delattr(module, name)

    def total(self) -> dict[Part, float]:
        """The meter's differences by part; they add up to what passed from the first boundary to the last."""
        spent: dict[Part, float] = defaultdict(float)
        for before, after in zip(self.boundaries, self.boundaries[1:], strict=False):
            spent[after.part] += self.difference(before.reading, after.reading)
        return dict(spent)


def split_seconds(network, step: Callable, tokens: dict[str, int]) -> dict[Part, float]:
    """Seconds of one pass by part."""
    if torch.cuda.is_available():
        def meter():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        split = Split(network, tokens, meter, lambda before, after: before.elapsed_time(after) / 1000)
    else:
        split = Split(network, tokens, time.perf_counter, lambda before, after: after - before)
    with split:
        step(split.options)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return split.total()


def split_flop(network, step: Callable, tokens: dict[str, int]) -> dict[Part, float]:
    """FLOP of one pass by part."""
    with FlopCounter() as counter, Split(network, tokens, lambda: counter.total, lambda before, after: after - before,
                                         counter.attention) as split:
        step(split.options)
    return split.total()
