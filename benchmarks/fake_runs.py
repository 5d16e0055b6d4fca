"""Passes of the real-size network on a GPU of fake tensors: FLOP and memory, exactly and without a GPU."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from unittest import mock

import torch
from measure import FlopCounter
from subjects import FULL
from torch._subclasses import FakeTensorMode


class FakeRuns(contextlib.ExitStack):
    """Context manager that holds the network, of `blocks` blocks a tower, on a fake GPU.

    ComfyUI is told, for as long, that the attention kernel is a fused one, as on a GPU it is.
    """

    def __init__(self, blocks: int = FULL.blocks) -> None:
        super().__init__()
        self.blocks = blocks

    def __enter__(self) -> FakeRuns:
        super().__enter__()
        import comfy.model_management
        import comfy.ops
        from tiny import fake_gpu

        self.patcher = fake_gpu.tiny_patcher()  # of real tensors, so before all new ones are fake
        self.enter_context(mock.patch.object(comfy.model_management, "NUM_STREAMS", 0))
        self.enter_context(mock.patch.object(comfy.model_management, "pytorch_attention_flash_attention", lambda: True))
        self.enter_context(FakeTensorMode())
        self.enter_context(torch.no_grad())
        sizes = replace(FULL, blocks=self.blocks).sizes
        self.network = fake_gpu.make_network(sizes, comfy.ops.disable_weight_init, "cuda:0", FULL.dtype)
        return self

    def run(self, video: tuple[int, int, int], audio: int, batch: int = 1) -> dict[str, int]:
        """One pass of `batch` prompts over latents of video (frames, rows, columns) and `audio` length.

        Returns bytes and FLOP: `peak`, without weights and inputs; `estimate`, what ComfyUI would keep free; `flop`;
        and the video `tokens`.
        """
        from tiny import fake_gpu

        frames, rows, columns = video
        latents, timestep, context, _ = fake_gpu.fake_inputs((frames, rows // 2, columns // 2), batch, audio)
        with fake_gpu.Allocations("cuda") as memory, FlopCounter() as counter:
            memory.ignore(self.network)
            memory.known |= {x.untyped_storage()._cdata for x in (*latents, timestep, context)}
            attention = functools.partial(counter.attention, functools.partial(fake_gpu.flash_attention, None))
            self.network(latents, timestep, context, transformer_options={
                "optimized_attention_override": lambda _, *args, **kwargs: attention(*args, **kwargs)})
        return {"tokens": frames * (rows // 2) * (columns // 2), "peak": memory.peak,
                "estimate": fake_gpu.estimate(self.patcher, video, audio, batch), "flop": counter.total}
