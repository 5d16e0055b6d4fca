"""Calls of the bare network."""

import torch
from comfy.ldm.modules.attention import attention_pytorch

FP32 = 5e-6  # relative L2 between two ways to compute the same in float32


def fused_attention() -> dict:
    """transformer_options for PyTorch's attention, which ComfyUI uses on GPUs; on CPU it has one of its own."""
    return {"optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)}


@torch.no_grad()
def run(model, video, audio, t, video_text, audio_text=None, transformer_options=None, **options):
    return model([video, audio], torch.as_tensor(t, dtype=torch.float32).reshape(-1), video_text,
                 {} if transformer_options is None else transformer_options, audio_context=audio_text, **options)


def frame_mask(frames: int) -> torch.Tensor:
    mask = torch.ones(1, 1, frames, 1, 1)
    mask[:, :, 0] = 0
    return mask


def region_mask(batch: int = 1) -> torch.Tensor:
    """[B, 1, 3, 4, 6]: frame 0 given; of frame 1 the left third; of frame 2 nothing, but a soft edge on the right."""
    mask = torch.ones(batch, 1, 3, 4, 6)
    mask[:, :, 0] = 0
    mask[:, :, 1, :, :2] = 0
    mask[:, :, 2, :, 4:] = 0.75
    mask[1:, :, 1, 2:] = 1  # another region in further rows
    return mask
