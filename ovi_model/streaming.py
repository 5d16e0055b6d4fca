"""Decoding a video latent piece by piece, in memory that does not depend on its length.

    video_latents [B, 48, T, h, w]  ->  B times (1 frame, then T-1 times 4 frames), each piece [n, H, W, 3] in 0..1

Wan2.2's decoder is causal: a latent frame becomes 1 frame (the first) or 4, given what its convolutions remember of
the two frames before. `WanVAE.decode` of core walks through the latent frames in the same way, but joins all frames
into one tensor; here each piece is handed out instead. The arithmetic, the weights' loading and the final scaling are
core's own.

Memory for a clip of H x W pixels, whatever its length (dtype: 2 bytes in bf16, 4 in fp32):

    on the VAE's device   VALUES_PER_PIXEL x H x W x dtype, all the decoder's activations and what it remembers.
                          Wan2.2 in bf16 at 960x960: 6.6 GiB at its peak. If the free memory is less than asked for,
                          what the decoder remembers (1784 x H x W x dtype, 3.1 GiB) waits in RAM: 4.2 GiB, slower.
                          The piece itself, 4 x H x W x 3 float32 (42 MiB at 960x960), fits into what the decoder has
                          let go of by then, if the caller lets go of it before asking for the next.
    in RAM                nothing but what the caller keeps.

Nothing waits for a GPU unless the cache is in RAM: a latent frame's kernels queue up behind those of the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from comfy.ldm.wan.vae2_2 import WanVAE, count_conv3d, unpatchify
from comfy.taesd.taehv import TAEHV, MemBlock

from .variants import SPATIAL_STRIDE

VALUES_PER_PIXEL = {WanVAE: 4400, TAEHV: 185}
"""What the memory manager is asked for: the measured peak, 3833 and 161 values per pixel, and 15 % for allocation."""

Decode = Callable[[torch.Tensor], torch.Tensor]


def decode_chunks(vae: comfy.sd.VAE, video_latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """Decode latents [B, C, T, h, w], one latent frame at a time, to frames [n, H, W, 3] in 0..1.

    Put together, the pieces equal `vae.decode` (clips of a batch one after another). They lie on the VAE's device.
    Between pieces ComfyUI's interruption is honoured. The bound of the module's docstring holds for Wan2.2 and for its
    tiny stand-in TAEHV; any other VAE decodes whole clips with `vae.decode`, one clip per piece and on ComfyUI's
    intermediate device, as nothing is known about it.

    Raises ValueError, before anything is loaded, if the latents are not a video of this VAE.
    """
    if video_latents.ndim != 5 or video_latents.shape[1] != vae.latent_channels or 0 in video_latents.shape:
        raise ValueError(f"Video latents of shape {list(video_latents.shape)} were given; this VAE decodes "
                         f"[batch, {vae.latent_channels}, frames, height, width]. Pass the video half of an Ovi "
                         "latent and the VAE that belongs to it.")
    if isinstance(vae.first_stage_model, (WanVAE, TAEHV)):
        return _until_interrupted(_stream(vae, video_latents))
    return _until_interrupted(vae.decode(clip)[0] for clip in video_latents.split(1))


def chunk_memory(vae: comfy.sd.VAE, video_latents: torch.Tensor) -> int:
    """Bytes that one latent frame needs on the VAE's device, whatever the number of frames and clips."""
    values, = (values for kind, values in VALUES_PER_PIXEL.items() if isinstance(vae.first_stage_model, kind))
    height, width = (SPATIAL_STRIDE * size for size in video_latents.shape[-2:])
    return values * height * width * comfy.model_management.dtype_size(vae.vae_dtype)


def _stream(vae: comfy.sd.VAE, video_latents: torch.Tensor) -> Iterator[torch.Tensor]:
    needed = chunk_memory(vae, video_latents)
    with comfy.model_management.cuda_device_context(vae.device):
        comfy.model_management.load_models_gpu(
            [vae.patcher], memory_required=needed, force_full_load=vae.disable_offload)
    park = _is_short_of_memory(vae, needed)
    for clip in video_latents.split(1):
        yield from _stream_clip(vae, clip, decoder_for(vae, park))


def _stream_clip(vae: comfy.sd.VAE, clip: torch.Tensor, decode: Decode) -> Iterator[torch.Tensor]:
    clip = clip.to(device=vae.device, dtype=vae.vae_dtype)  # at once: each copy from RAM would wait for the device
    for latent in clip.split(1, dim=2):
        yield _decode_piece(vae, latent, decode)


def _until_interrupted(pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    for piece in pieces:
        yield piece
        del piece  # or it would stay until the next one is there
        comfy.model_management.throw_exception_if_processing_interrupted()


@torch.no_grad()
def _decode_piece(vae: comfy.sd.VAE, latent: torch.Tensor, decode: Decode) -> torch.Tensor:
    """[1, C, 1, h, w] -> [n, H, W, 3], with the arithmetic of `VAE.decode`, which ends in RAM."""
    with comfy.model_management.cuda_device_context(vae.device):
        pixels = decode(latent).to(dtype=vae.vae_output_dtype(), copy=True)
        return vae.process_output(pixels).movedim(1, -1)[0]


def _is_short_of_memory(vae: comfy.sd.VAE, needed: int) -> bool:
    on_cpu = comfy.model_management.is_device_cpu(vae.device)
    return not on_cpu and vae.patcher.get_free_memory(vae.device) < needed


def decoder_for(vae: comfy.sd.VAE, park: bool = False) -> Decode:
    """A function for one clip that takes its latent frames [1, C, 1, h, w] in order and gives [1, 3, 1 or 4, H, W].

    park: keep in RAM what Wan2.2's decoder remembers between its layers.
    """
    model = vae.first_stage_model
    return _WanDecoder(model, park) if isinstance(model, WanVAE) else _TaehvDecoder(model)


class _WanDecoder:
    """`WanVAE.decode` of core, cut open between two latent frames."""

    def __init__(self, model: WanVAE, park: bool) -> None:
        self.model = model
        self.remembered = (_Parked if park else list)([None] * count_conv3d(model.decoder))
        self.first = True

    def __call__(self, latent: torch.Tensor) -> torch.Tensor:
        frames = self.model.decoder(self.model.conv2(latent), feat_cache=self.remembered, feat_idx=[0],
                                    first_chunk=self.first)
        self.first = False
        return unpatchify(frames, patch_size=2)


class _Parked(list):
    """The decoder's cache, kept in RAM: its layers fetch what they read, as they may run on several devices."""

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value.cpu() if torch.is_tensor(value) else value)


class _TaehvDecoder:
    """`apply_model_with_memblocks` of core, keeping the last frame of every block that looks one frame back."""

    def __init__(self, model: TAEHV) -> None:
        self.model = model
        self.last: dict[int, torch.Tensor] = {}
        self.first = True

    def __call__(self, latent: torch.Tensor) -> torch.Tensor:
        x = self.model.process_in(latent)[:, :, 0]  # frames are the first axis from here on
        for i, block in enumerate(self.model.decoder):
            if isinstance(block, MemBlock):
                before = torch.cat([self.last.get(i, torch.zeros_like(x[:1])), x[:-1]])
                self.last[i] = x[-1:].clone()
                x = block(x, before)
            else:
                x = block(x)
        x = torch.nn.functional.pixel_shuffle(x, self.model.patch_size)
        x = x[self.model.frames_to_trim:] if self.first else x
        self.first = False
        return x.movedim(0, 1)[None]
