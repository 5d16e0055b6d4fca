"""What Ovi computes in where float16 was asked for: never that, which overflows in this network."""

import comfy.model_management
import torch

NO_FLOAT16 = ("Ovi computes in %s although float16 was asked for (--fp16-unet, --force-fp16 or "
              "'ModelComputeDtype'): float16 overflows in this model and gives black frames.")


def safe_dtype(device) -> torch.dtype:
    """What to compute in on a device where float16 was asked for."""
    bf16 = comfy.model_management.should_use_bf16(device)
    return torch.bfloat16 if bf16 else torch.float32
