"""Chunked decode of a video latent, in memory that does not depend on its length.

    video_latents [B, 48, T, h, w]  ->  B times (1 frame, then T-1 times 4 frames), each chunk [n, H, W, 3] in 0..1

Wan2.2's decoder is causal: a latent frame becomes 1 frame (the first) or 4, given what its convolutions remember of
the two frames before. `WanVAE.decode` of core walks through the latent frames in the same way, but joins all frames
into one tensor; here each chunk is handed out instead. The arithmetic, the weights' loading and the final scaling are
core's own.

Memory for a clip of H x W pixels, whatever its length (dtype: 2 bytes in bf16, 4 in fp32):

    on the VAE's device   VALUES_PER_PIXEL x H x W x dtype, all the decoder's activations and what it remembers.
                          Wan2.2 in bf16 at 960x960: 6.6 GiB at its peak. If the free memory is less than asked for,
                          what the decoder remembers (1784 x H x W x dtype, 3.1 GiB) waits in RAM: 4.2 GiB, slower.
                          The chunk itself, 4 x H x W x 3 float32 (42 MiB at 960x960), fits into what the decoder has
                          let go of by then, if the caller lets go of it before asking for the next.
    in RAM                nothing but what the caller keeps.

If memory runs out all the same, the clip is decoded once more from its start with less of it on the device, and goes on
after the last frame that was handed out: first with the cache in RAM, which gives the same frames to the last bit; then
in overlapping tiles of 512 and at last of 256 pixels, each with a cache of its own in RAM (together 1.8 times the one
above), blended by core's `tiled_scale_multidim`. Unlike core's tiled decoding that needs no memory for whole clips and
no seams in time.

Nothing waits for a GPU unless the cache is in RAM: a latent frame's kernels queue up behind those of the one before.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.ldm.wan.vae2_2 import WanVAE, count_conv3d, unpatchify
from comfy.taesd.taehv import TAEHV, MemBlock

from ..files.identify import describe_weights
from ..files.loading import require_all
from ..files.names import printable
from ..files.reader import load_weights
from ..geometry import WAN22_VAE as CODEC

VALUES_PER_PIXEL = {WanVAE: 4400, TAEHV: 185}
"""What the memory manager is asked for: the measured peak, 3833 and 161 values per pixel, and 15 % for allocation."""

OUT_OF_MEMORY = (comfy.model_management.OOM_EXCEPTION, comfy.model_management.ACCELERATOR_ERROR)
"""What core's `raise_non_oom` looks at."""

Decode = Callable[[torch.Tensor], torch.Tensor]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Way:
    """How a clip is decoded: whole frames or tiles (in pixels), with the decoder's cache on the device or in RAM."""

    park: bool = False
    tile: int = 0
    sentence: str = ""


WAYS = (
    Way(),
    Way(park=True, sentence="Memory ran out: from frame {frame} on, decoding used less of it and took longer. The "
                            "frames are the same."),
    *(Way(park=True, tile=tile, sentence=f"Memory ran out: from frame {{frame}} on, frames were decoded in tiles of "
                                         f"{tile} pixels, which overlap by a quarter and are blended. They differ "
                                         "slightly from whole ones.") for tile in (512, 256)),
)
"""In the order they are tried when memory runs out."""


LANDMARKS = {"decoder.upsamples.0.upsamples.0.residual.2.weight": "conv2.weight", "decoder.22.bias": "decoder.1.weight"}
"""Of Wan 2.2 and TAEHV: what tells such a file, and the kernel that reads its latent."""
WANTED = "Choose wan2.2_vae.safetensors (or Wan2.2_VAE.pth); it belongs in models/vae."


def load_video_vae(path: str) -> comfy.sd.VAE:
    """Load the Wan 2.2 VAE, or a TAEHV in its place, as core's 'Load VAE' does.

    Raises RuntimeError with a sentence for the user if the file is another model, of another size or incomplete.
    """
    weights, metadata = load_weights(path)
    name = printable(Path(path).name)
    kernel = next((weights.get(kernel) for landmark, kernel in LANDMARKS.items() if landmark in weights), None)
    if kernel is None or kernel.ndim < 2 or kernel.shape[1] != CODEC.channels:
        raise RuntimeError(f"{name} is {describe_weights(weights)}, not the Wan 2.2 video VAE with {CODEC.channels} "
                           f"channels. {WANTED}")
    try:
        vae = comfy.sd.VAE(sd=dict(weights), metadata=metadata)
    except RuntimeError as error:  # core lists every tensor
        if "size mismatch" not in str(error):
            raise
        raise RuntimeError(f"{name} has the tensors of a Wan 2.2 video VAE in other sizes. {WANTED}") from error
    require_all(weights, vae.first_stage_model, name)
    vae.patcher.cached_patcher_init = (comfy.sd.load_vae_patcher, (path, metadata, None))
    return vae


def decode_chunks(vae: comfy.sd.VAE, video_latents: torch.Tensor, say: Say | None = None) -> Iterator[torch.Tensor]:
    """Decode latents [B, C, T, h, w], one latent frame at a time, to frames [n, H, W, 3] in 0..1.

    Put together, the chunks equal `vae.decode` (clips of a batch one after another). They lie on the VAE's device.
    Between chunks ComfyUI's interruption is honoured. The bound of the module's docstring holds for Wan2.2 and for its
    tiny stand-in TAEHV; any other VAE decodes whole clips with `vae.decode`, one clip per chunk and on ComfyUI's
    intermediate device, as nothing is known about it; when memory runs out, core decodes that clip in tiles.

    say: called with a sentence for the user each time memory ran out and decoding goes on in another way. Values that
    are not finite become NaN, where core's scaling would hide an infinite one.

    Raises ValueError, before anything is loaded, if the latents are not a video of this VAE; PyTorch's out-of-memory
    error if it runs out in every way.
    """
    if video_latents.ndim != 5 or video_latents.shape[1] != vae.latent_channels or 0 in video_latents.shape:
        raise ValueError(f"Video latents of shape {list(video_latents.shape)} were given; this VAE decodes "
                         f"[batch, {vae.latent_channels}, frames, height, width]. Pass the video half of an Ovi "
                         "latent and the VAE that belongs to it.")
    if isinstance(vae.first_stage_model, (WanVAE, TAEHV)):
        return _until_interrupted(_decode_clips(vae, video_latents, say or (lambda _: None)))
    return _until_interrupted(vae.decode(clip)[0] for clip in video_latents.split(1))


def chunk_memory(vae: comfy.sd.VAE, video_latents: torch.Tensor) -> int:
    """Bytes that one latent frame needs on the VAE's device, whatever the number of frames and clips."""
    values, = (values for kind, values in VALUES_PER_PIXEL.items() if isinstance(vae.first_stage_model, kind))
    height, width = (CODEC.spatial_stride * size for size in video_latents.shape[-2:])
    return values * height * width * comfy.model_management.dtype_size(vae.vae_dtype)


def _decode_clips(vae: comfy.sd.VAE, video_latents: torch.Tensor, say: Say) -> Iterator[torch.Tensor]:
    _load(vae, chunk_memory(vae, video_latents))
    way = 1 if _is_short_of_memory(vae, chunk_memory(vae, video_latents)) else 0
    frames = 0
    for clip in video_latents.split(1):
        done = 0
        while True:
            try:
                for chunk in itertools.islice(_decode_clip(vae, clip, _decoder(vae, WAYS[way])), done, None):
                    done, frames = done + 1, frames + chunk.shape[0]
                    yield chunk
                    del chunk  # or it would stay until the next one is there
                break
            except OUT_OF_MEMORY as error:
                comfy.model_management.raise_non_oom(error)
                if way + 1 == len(WAYS):
                    raise
            way += 1  # outside of the handler: the error holds on to what the decoder had on the device
            say(WAYS[way].sentence.format(frame=frames + 1))
            comfy.model_management.soft_empty_cache()
            side = WAYS[way].tile // CODEC.spatial_stride or None
            _load(vae, chunk_memory(vae, clip[..., :side, :side]))


def _load(vae: comfy.sd.VAE, needed: int) -> None:
    with comfy.model_management.cuda_device_context(vae.device):
        comfy.model_management.load_models_gpu(
            [vae.patcher], memory_required=needed, force_full_load=vae.disable_offload)


def _decode_clip(vae: comfy.sd.VAE, clip: torch.Tensor, decode: Decode) -> Iterator[torch.Tensor]:
    clip = clip.to(device=vae.device, dtype=vae.vae_dtype)  # at once: each copy from RAM would wait for the device
    for latent in clip.split(1, dim=2):
        yield _decode_chunk(vae, latent, decode)


def _until_interrupted(chunks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    for chunk in chunks:
        yield chunk
        del chunk  # or it would stay until the next one is there
        comfy.model_management.throw_exception_if_processing_interrupted()


@torch.no_grad()
def _decode_chunk(vae: comfy.sd.VAE, latent: torch.Tensor, decode: Decode) -> torch.Tensor:
    """[1, C, 1, h, w] -> [n, H, W, 3], with the arithmetic of `VAE.decode`, which ends in RAM."""
    with comfy.model_management.cuda_device_context(vae.device):
        pixels = decode(latent).to(dtype=vae.vae_output_dtype(), copy=True)
        pixels.nan_to_num_(nan=torch.nan, posinf=torch.nan, neginf=torch.nan)  # clamping would hide infinities
        return vae.process_output(pixels).movedim(1, -1)[0]


def _is_short_of_memory(vae: comfy.sd.VAE, needed: int) -> bool:
    on_cpu = comfy.model_management.is_device_cpu(vae.device)
    return not on_cpu and vae.patcher.get_free_memory(vae.device) < needed


def _decoder(vae: comfy.sd.VAE, way: Way) -> Decode:
    return _TiledDecoder(vae, way.tile // CODEC.spatial_stride) if way.tile else decoder_for(vae, way.park)


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


class _TiledDecoder:
    """A decoder for every tile of a clip, each with its cache in RAM; core's tiling calls them in a fixed order."""

    def __init__(self, vae: comfy.sd.VAE, side: int) -> None:
        self.side = side  # latent pixels
        self.decoders: defaultdict[int, Decode] = defaultdict(lambda: decoder_for(vae, park=True))
        self.first = True

    def __call__(self, latent: torch.Tensor) -> torch.Tensor:
        frames = 1 if self.first else CODEC.temporal_stride
        numbers = itertools.count()

        def decode_tile(tile: torch.Tensor) -> torch.Tensor:  # [1, C, h, w] -> [1, 3 n, H, W]
            return self.decoders[next(numbers)](tile[:, :, None]).flatten(1, 2)

        pixels = comfy.utils.tiled_scale_multidim(
            latent[:, :, 0], decode_tile, tile=(self.side, self.side), overlap=self.side // 4,
            upscale_amount=CODEC.spatial_stride, out_channels=3 * frames, output_device=latent.device)
        self.first = False
        return pixels.unflatten(1, (3, frames))
