"""Ovi's fused diffusion transformer: a video tower and an audio tower, joined in every block.

The video tower is the root module, so its weights carry Wan's own names (`blocks.N.…`) and Wan
LoRAs find them; the audio tower hangs at `audio_model.` with the same names below it.

What differs between the towers: video is patchified 1x2x2 and rotated along time, height and width
(22/21/21 pairs of a 128-wide head); audio is embedded by convolutions without patching and rotates
only the 22 temporal pairs, at positions scaled so that both streams share one clock. Video carries
a timestep per latent frame (0 on clean frames), audio one per batch index or per latent.

Shapes: B batch, T video latent frames, H x W video latent size, A audio latents, N tokens, D width,
F and G timesteps of video and audio.
"""

from dataclasses import dataclass, fields

import comfy.ldm.common_dit
import comfy.model_prefetch
import comfy.patcher_extension
import torch
from torch import Tensor, nn

from .blocks import FusedBlock, Stream
from .towers import OviAudioTower, OviTower, as_tokens

AUDIO_ROPE_SCALE = 0.19676
"""Video latent frames per audio latent on the shared rotary clock, near 31 / 157 (`audio.json`)."""
MASK_LEVELS = 64
"""Steps from 0 to 1 that a mask inside a frame is rounded to: masks of whole pixels stay exact, and
the modulation stays small where it would take gigabytes made for every token."""


@dataclass(frozen=True, eq=False)
class Conditions:
    """What core hands over by keyword, beside latents, timestep and the video's text."""

    audio_context: Tensor | None = None  # [B, m, C] text for the audio tower, if it is another
    rope: tuple[Tensor, Tensor] | None = None  # what `rope_tables` returns, if it is at hand
    shown_timestep: Tensor | None = None  # [] whole number, seen in place of the exact timestep
    skip_layers: list[int] | None = None  # of each batch index the block to skip, -1 for none
    denoise_mask: Tensor | None = None  # [B, 1, T, 1, 1] or [B, 1, T, H, W]: 0 given, 1 sampled
    audio_denoise_mask: Tensor | None = None  # [B, 1, A]
    text_bias: Tensor | None = None  # [B, n] for both texts, as training has them; see `towers.py`

    @classmethod
    def read(cls, keywords: dict) -> "Conditions":
        """From all keywords of a call, which may hold others too."""
        return cls(**{name: keywords.get(name) for name in CONDITIONS})

    def timesteps(self, timestep: Tensor,
                  patch_size: tuple) -> tuple[Tensor, Tensor, Tensor | None]:
        """Timesteps of video [B, F] and audio [B, G] from one per batch index [B]; 0 where given.

        Third, for a mask inside frames, which of the F each video token has [B, N].
        """
        if self.shown_timestep is not None:
            timestep = self.shown_timestep.to(timestep).expand_as(timestep)
        video_t = audio_t = timestep.reshape(-1, 1)
        of_token = None
        if self.audio_denoise_mask is not None:
            audio_t = audio_t * self.audio_denoise_mask.flatten(1)
        mask = self.denoise_mask
        if mask is not None and tuple(mask.shape[-2:]) != (1, 1):
            of_token, mask = mask_levels(mask, patch_size)
        if mask is not None:
            video_t = video_t * mask.flatten(1)
        return video_t, audio_t, of_token


CONDITIONS = tuple(field.name for field in fields(Conditions))  # once: graphs cannot ask a class


class OviModel(OviTower):
    """The fused model: velocities for a list `[video [B, 48, T, H, W], audio [B, 20, A]]`."""

    def __init__(self, audio_config: dict, dtype=None, device=None, operations=None,
                 **video_config):
        place = {"dtype": dtype, "device": device, "operations": operations}
        video_config.pop("model_type", None)  # core's detection says "t2v" of every 5B
        super().__init__(**video_config, **place)
        self.audio_model = OviAudioTower(**audio_config, **place)

    def forward(self, x, timestep, context, transformer_options={}, **conditions):  # noqa: B006
        """Predict velocities.

        x: `[video, audio]`; either may be None, and the other then runs alone.
        timestep: [B] on the 0..1000 scale.
        context: text [B, n, C] for both towers, unless audio has one of its own.
        conditions: the fields of `Conditions`, each by its name; others are ignored.
        Returns a list shaped like x.
        """
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward, self,
            comfy.patcher_extension.get_all_wrappers(
                comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options),
        ).execute(x, timestep, context, transformer_options, **conditions)

    def _forward(self, x, timestep, context, transformer_options={}, **conditions):  # noqa: B006
        video_x, audio_x = x
        given = Conditions.read(conditions)
        video_t, audio_t, of_token = given.timesteps(timestep, self.patch_size)
        shapes = [None if latent is None else latent.shape for latent in x]
        rope = given.rope or self.rope_tables(shapes, timestep.device, transformer_options)
        audio_context = context if given.audio_context is None else given.audio_context
        video = audio = None

        if video_x is not None:
            video_tokens, grid = self.embed(video_x)
            video = self.enter(video_tokens, video_t, rope[0], context, of_token, given.text_bias)
        if audio_x is not None:
            audio_tokens = self.audio_model.embed(audio_x)
            audio = self.audio_model.enter(audio_tokens, audio_t, rope[1], audio_context,
                                           text_bias=given.text_bias)

        video, audio = self.run_blocks(video, audio, given.skip_layers, transformer_options)

        video_v = None if video is None else self.project(video, grid, video_x.shape)
        audio_v = None if audio is None else self.audio_model.project(audio)
        return [video_v, audio_v]

    def embed(self, video: Tensor) -> tuple[Tensor, tuple]:
        """Latents [B, 48, T, H, W] as tokens [B, N, D], and how many in time, height and width."""
        padded = comfy.ldm.common_dit.pad_to_patch_size(video, self.patch_size)
        x = self.patch_embedding(padded.float()).to(video.dtype)  # [B, D, T, H / 2, W / 2]
        return as_tokens(x), tuple(x.shape[2:])

    def project(self, stream: Stream, grid: tuple, shape: tuple) -> Tensor:
        """The velocity of the latents' shape [B, 48, T, H, W] from a stream past all blocks."""
        t, h, w = shape[2:]
        return self.unpatchify(self.head(stream), grid)[:, :, :t, :h, :w]

    def run_blocks(self, video: Stream | None, audio: Stream | None, skip_layers: list[int] | None,
                   transformer_options) -> tuple[Stream | None, Stream | None]:
        """Run all blocks on the pair, fetching the next one's weights meanwhile.

        skip_layers: of each batch index, the block it skips; without effect on one stream alone.
        """
        alone = video is None or audio is None
        skip_layers = [] if alone or skip_layers is None else skip_layers
        transformer_options.update(total_blocks=len(self.blocks), block_type="double")
        device = next(stream.x.device for stream in (video, audio) if stream is not None)
        blocks = [FusedBlock(*both)
                  for both in zip(self.blocks, self.audio_model.blocks, strict=True)]
        queue = comfy.model_prefetch.make_prefetch_queue(blocks, device, transformer_options)

        for i, block in enumerate(blocks):
            comfy.model_prefetch.prefetch_queue_pop(queue, device, block)
            transformer_options["block_index"] = i
            wanted = [layer != i for layer in skip_layers]
            if all(wanted):
                video, audio = block(video, audio, transformer_options)
            elif any(wanted):
                video, audio = block.run_for(wanted, video, audio, transformer_options)
        comfy.model_prefetch.prefetch_queue_pop(queue, device, None)
        return video, audio

    def rope_tables(self, shapes: list, device, transformer_options) -> tuple:
        """Rotary matrices [1, N, 1, D / heads / 2, 2, 2] for each of `shapes`; None for None."""
        video = audio = None
        if shapes[0] is not None:
            video = self.rope_encode(*shapes[0][2:], device=device, dtype=torch.float32,
                                     transformer_options=transformer_options)
        if shapes[1] is not None:
            clock = audio_clock(transformer_options)
            audio = self.audio_model.rope_table(shapes[1][2], *clock, device)
        return video, audio


def mask_levels(mask: Tensor, patch_size: tuple) -> tuple[Tensor, Tensor]:
    """Split a mask [B, 1, T, H, W] in each token's level [B, N] and the levels' values [1, F]."""
    padded = comfy.ldm.common_dit.pad_to_patch_size(mask.float(), patch_size)
    means = nn.functional.avg_pool3d(padded, patch_size).flatten(1)  # [B, N]
    values = torch.linspace(0, 1, MASK_LEVELS + 1, device=mask.device)
    return (means * MASK_LEVELS).round().long(), values.unsqueeze(0)


def audio_clock(transformer_options) -> tuple[float, float]:
    """(position of the first audio latent, positions per latent) on the video's rotary clock.

    A context window restarts video positions at 0. Its audio slice starts up to half a latent off
    its first frame, and `causal_window_fix` puts one more frame in front of the video alone; both
    shift the audio positions. Core's 'ScaleROPE' stretches and moves the clock of both streams.
    """
    start, options = 0.0, transformer_options.get("rope_options") or {}
    window = transformer_options.get("context_window")
    if window is not None and window.modality_windows:
        first = window.get_window_for_modality(1).index_list[0]
        start = first * AUDIO_ROPE_SCALE - window.index_list[0]
        if getattr(window, "causal_anchor_index", None) is not None:
            start += 1.0
    scale = options.get("scale_t", 1.0)
    return start * scale + options.get("shift_t", 0.0), AUDIO_ROPE_SCALE * scale
