"""A decoder that runs out of memory."""

import contextlib

import comfy.sd
import torch


@contextlib.contextmanager
def short_of_memory(vae: comfy.sd.VAE, *calls: int, error=torch.OutOfMemoryError, layer=None):
    """The last layer of the decoder runs out of memory in these calls, counted from 0; yields what it was called for.

    By then the decoder has changed what it remembers: the piece cannot simply be tried again.
    """
    layer, seen = layer or vae.first_stage_model.decoder.head[1], []

    def fail(*_):
        seen.append(len(seen))
        if seen[-1] in calls:
            raise error("out of memory")

    hook = layer.register_forward_pre_hook(fail)
    try:
        yield seen
    finally:
        hook.remove()
