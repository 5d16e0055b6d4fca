"""The network as training calls it: with gradients, in its own precision, and with less memory for
its activations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import comfy.model_management
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .attention import fused_attention, plain_attention


@contextlib.contextmanager
def training_mode() -> Iterator[None]:
    """Gradients, also inside a node's execution, and core's operations that have them; all as
    before afterwards."""
    before = comfy.model_management.in_training
    with torch.inference_mode(False), torch.enable_grad():
        comfy.model_management.in_training = True
        try:
            yield
        finally:
            comfy.model_management.in_training = before


def checkpointed_block(index: int) -> Callable[[dict, dict], dict]:
    """A replacement of block `index` that keeps its inputs alone, and runs it again in the backward
    pass."""

    def run_again(args: dict, extra: dict) -> dict:
        # what the network notes in its options has moved on by then
        options = {**args["transformer_options"], "block_index": index}
        args = {**args, "transformer_options": options}

        def run(video: Tensor | None, audio: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            return extra["original_block"]({**args, "img": (video, audio)})["img"]

        return {"img": checkpoint(run, *args["img"], use_reentrant=False, preserve_rng_state=False)}

    return run_again


class Velocity:
    """Calls a network on latents, timesteps and text in float32, in the precision that it computes
    in."""

    def __init__(self, network: Callable, dtype: torch.dtype, blocks: int = 0) -> None:
        """network: an `OviModel`, compiled or not. blocks: how many of its blocks keep no
        activations, counted from the first; all for the least memory, at a third more time."""
        self.network, self.dtype = network, dtype
        self.attention: Callable | None = None  # in place of the one that suits the device
        self.replaced = {("double_block", index): checkpointed_block(index)
                         for index in range(blocks)}

    def __call__(self, x: list[Tensor | None], timestep: Tensor, text: Tensor,
                 **conditions) -> list[Tensor | None]:
        suits = plain_attention if timestep.device.type == "cpu" else fused_attention
        attention = self.attention or suits
        options: dict = {"optimized_attention_override": attention}
        if self.replaced:
            options["patches_replace"] = {"dit": self.replaced}
        x = [None if stream is None else stream.to(self.dtype) for stream in x]
        return self.network(x, timestep, text.to(self.dtype), options, **conditions)
