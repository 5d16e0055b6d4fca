"""How ComfyUI recognises Ovi: an entry in core's list of detectable models."""

import logging

import comfy.latent_formats
import comfy.model_management
import comfy.supported_models
import comfy.supported_models_base
import torch

from .model_base import OviBaseModel
from .precision import NO_FLOAT16, safe_dtype
from .variants import GEOMETRY

MEMORY_FACTOR = 1 / 3000
"""For a position of all channels. Wan's own is 1 / 2222; the measured peak (test_memory.py) is a
little lower."""
WIDTH = 3072  # of the released model


def pass_memory(video_tokens: int) -> int:
    """Bytes that core keeps free for one pass of the released model in bf16, beside its weights."""
    positions = video_tokens * GEOMETRY.patch**2
    return round(positions * 2 * 0.01 * WIDTH * MEMORY_FACTOR * (1 << 20))


class OviConfig(comfy.supported_models_base.BASE):
    """Detection entry: everything core detects of a Wan2.2 5B, plus an audio tower."""

    # core's convention (RUF012): what its detection must have found
    unet_config = {"image_model": "wan2.1", "model_type": "t2v", "out_dim": GEOMETRY.video.channels}  # noqa: RUF012
    unet_extra_config: dict = {}  # noqa: RUF012
    required_keys = {"{}audio_model.patch_embedding.0.weight"}  # noqa: RUF012
    sampling_settings = {"shift": 5.0}  # noqa: RUF012
    latent_format = comfy.latent_formats.Wan22
    # Without float16, which overflows to black frames.
    supported_inference_dtypes = [torch.bfloat16, torch.float32]  # noqa: RUF012
    vae_key_prefix = ["vae."]  # noqa: RUF012
    text_encoder_key_prefix = ["text_encoders."]  # noqa: RUF012

    def __init__(self, unet_config):
        super().__init__(unet_config)
        # Core multiplies this with elements of the packed latent.
        self.memory_usage_factor = unet_config["dim"] * MEMORY_FACTOR / GEOMETRY.video.channels

    def set_inference_dtype(self, dtype, manual_cast_dtype, device=None):
        """As core's, which for --fp16-unet and --force-fp16 takes what the model cannot do."""
        if (manual_cast_dtype or dtype) == torch.float16:
            wanted = safe_dtype(device)
            logging.warning(NO_FLOAT16, wanted)
            if wanted == torch.bfloat16:  # to fp32 the weights are cast when they are used
                dtype = wanted
            manual_cast_dtype = None if wanted == dtype else wanted
        super().set_inference_dtype(dtype, manual_cast_dtype, device=device)

    def get_model(self, state_dict, prefix="", device=None):
        self.unet_config.update(read_sizes(state_dict, prefix))
        return OviBaseModel(self, device=device)


def read_sizes(state_dict: dict, prefix: str = "") -> dict:
    """The arguments of `OviModel` that core's detection does not read from a core-layout file."""

    def shape(key):
        return state_dict[f"{prefix}{key}"].shape

    dim, in_dim, kernel_size = shape("audio_model.patch_embedding.0.weight")
    blocks = {key.split(".")[2] for key in state_dict
              if key.startswith(f"{prefix}audio_model.blocks.")}
    audio = {
        "dim": dim, "in_dim": in_dim, "kernel_size": kernel_size, "num_heads": dim // 128,
        "out_dim": shape("audio_model.head.head.weight")[0],
        "conv_hidden_dim": shape("audio_model.patch_embedding.2.w1.weight")[0],
        "ffn_dim": shape("audio_model.blocks.0.ffn.0.weight")[0],
        "text_dim": shape("audio_model.text_embedding.0.weight")[1],
        "freq_dim": shape("audio_model.time_embedding.0.weight")[1],
        "num_layers": len(blocks),
    }
    return {"text_dim": shape("text_embedding.0.weight")[1],
            "freq_dim": shape("time_embedding.0.weight")[1], "audio_config": audio}


def register() -> None:
    """Enter Ovi in core's list of detectable models, for the stock 'Load Diffusion Model' too.

    Without it core takes such a file for a plain Wan2.2 and silently drops its audio tower.
    """
    if OviConfig not in comfy.supported_models.models:
        comfy.supported_models.models.insert(0, OviConfig)
