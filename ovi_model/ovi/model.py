"""Ovi's fused diffusion transformer: a video tower and an audio tower of one shape, joined in every block.

The video tower is the root module, so its weights carry Wan's own names (`blocks.N.…`) and Wan LoRAs find them; the
audio tower hangs at `audio_model.` with the same names below it. Both are core's `WanModel` with another block class.

What differs between the towers: video is patchified 1x2x2 and rotated along time, height and width (22/21/21 pairs of
a 128-wide head); audio is embedded by convolutions without patching and rotates only the 22 temporal pairs, at
positions scaled so that both streams share one clock. Video carries a timestep per latent frame (0 on clean frames),
audio one per batch row or per latent.

Shapes: B batch, T video latent frames, H x W video latent size, A audio latents, N tokens, D width, L text tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import comfy.ldm.common_dit
import comfy.model_management
import comfy.model_prefetch
import comfy.patcher_extension
import torch
from comfy.ldm.flux.math import rope
from comfy.ldm.wan.model import WanModel
from torch import Tensor, nn

from .blocks import ConvMLP, OviBlock, OviHead, Stream, take_rows, temporal_conv

AUDIO_ROPE_SCALE = 0.19676
"""Video latent frames per audio latent on the shared rotary clock, near 31 / 157 (upstream `audio.json`)."""
ROPE_THETA = 10000.0
MASK_LEVELS = 64
"""Steps from 0 to 1 that a mask inside a frame is rounded to: masks of whole pixels stay exact, and the modulation
stays small where it would take gigabytes made for every token."""


def timestep_sinusoids(t: Tensor, dim: int) -> Tensor:
    """Map timesteps [...] on the 0..1000 scale to [..., dim] float32, cosines first (upstream: float64 throughout)."""
    fp64 = comfy.model_management.supports_fp64(t.device)
    t = t.to(torch.float64 if fp64 else torch.float32)
    half = dim // 2
    freqs = torch.pow(10000.0, -torch.arange(half, dtype=t.dtype, device=t.device) / half)
    angles = t.unsqueeze(-1) * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(torch.float32)


def fit_text(text: Tensor, length: int) -> Tensor:
    """Bring text [B, n, C] to [B, length, C]: zero-padded, or if it is longer without its rows of zeros, then cut.

    The padding takes part in attention, as in training. Rows of zeros are padding wherever they stand: between two
    padded texts that were joined, too. Attention to text knows no order, so nothing changes by leaving them out.
    """
    missing = length - text.shape[1]
    if missing < 0:
        used_first = (text == 0).all(dim=-1).to(torch.uint8).argsort(dim=1, stable=True)
        text = text.take_along_dim(used_first[:, :length, None], dim=1)
    return nn.functional.pad(text, (0, 0, 0, max(missing, 0)))


class OviTower(WanModel):
    """A Wan transformer whose blocks can read another tower's stream."""

    def __init__(self, *, dim, num_heads, eps=1e-6, out_dim, patch_size, dtype=None, device=None, operations=None,
                 **settings):
        super().__init__(model_type="t2v", dim=dim, num_heads=num_heads, eps=eps, out_dim=out_dim,
                         patch_size=patch_size, wan_attn_block_class=OviBlock, dtype=dtype, device=device,
                         operations=operations, **settings)
        self.head = OviHead(dim, out_dim, patch_size, eps, operation_settings={
            "operations": operations, "device": device, "dtype": dtype})

    def embed_time(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Map timesteps [B, F] to the time embedding [B, F, D] and the block modulation [B, F, 6, D]."""
        e = self.time_embedding(timestep_sinusoids(t, self.freq_dim).to(dtype))
        return e, self.time_projection(e).unflatten(-1, (6, self.dim))

    def embed_text(self, context: Tensor) -> Tensor:
        """Embed text [B, n, C] as [B, L, D]; zero-padded before the MLP, so padding rows are its response to zero."""
        return self.text_embedding(fit_text(context, self.text_len))


class OviAudioTower(OviTower):
    """The audio tower: one token per latent."""

    def __init__(self, *, in_dim, out_dim, dim, conv_hidden_dim, kernel_size=7, **settings):
        super().__init__(in_dim=in_dim, out_dim=out_dim, dim=dim, patch_size=(1, 1, 1), **settings)
        operation_settings = {k: settings[k] for k in ("operations", "device", "dtype")}
        self.patch_embedding = nn.Sequential(
            temporal_conv(in_dim, dim, kernel_size, True, operation_settings),
            nn.SiLU(),
            ConvMLP(dim, conv_hidden_dim, kernel_size, operation_settings),
        )

    def rope_table(self, length: int, start: float, step: float, device) -> Tensor:
        """Rotary matrices [1, A, 1, head_dim / 2, 2, 2] for latents at `start + i * step` video latent frames.

        Positions are float32 whatever the model's dtype: bf16 cannot hold a spacing of 0.197.
        """
        head_dim = self.dim // self.num_heads
        temporal = self.rope_embedder.axes_dim[0]
        positions = start + torch.arange(length, dtype=torch.float32, device=device) * step
        rotated = rope(positions.unsqueeze(0), temporal, ROPE_THETA)
        identity = torch.eye(2, device=device).expand(1, length, (head_dim - temporal) // 2, 2, 2)
        return torch.cat([rotated, identity], dim=2).unsqueeze(2)


@dataclass
class FusedPair:
    """Block i of both towers."""

    video: OviBlock
    audio: OviBlock

    def modules(self) -> Iterator[nn.Module]:
        """For core's prefetcher, which streams the weights of all that this yields."""
        yield from self.video.modules()
        yield from self.audio.modules()

    def __call__(self, img: tuple, streams: tuple, transformer_options) -> tuple:
        """Run the pair, or what another node put in its place, on the residuals `img`; returns the new ones."""
        def run(args):
            return {"img": self.video(*args["img"], args["video_stream"], args["audio_stream"], self.audio,
                                      args["transformer_options"])}

        replacement = replacement_of_block(transformer_options)
        args = {"img": img, "video_stream": streams[0], "audio_stream": streams[1],
                "transformer_options": transformer_options}
        return (replacement(args, {"original_block": run}) if replacement else run(args))["img"]

    def run_without(self, skipped: list[bool], img: tuple, streams: tuple, transformer_options) -> tuple:
        """The same for the batch rows that do not skip this block; the others come back as they are."""
        if replacement_of_block(transformer_options) or transformer_options.get("patches"):
            out = self(img, streams, transformer_options)  # what patches a block may count on the whole batch
        else:
            rows = [not skip for skip in skipped]
            out = self(tuple(take_rows(x, rows) for x in img), tuple(stream.take_rows(rows) for stream in streams),
                       transformer_options)
        return keep_rows(skipped, img, out)


def replacement_of_block(transformer_options):
    """What another node put in the place of the block at work, or None."""
    replacements = transformer_options.get("patches_replace", {}).get("dit", {})
    return replacements.get(("double_block", transformer_options["block_index"]))


class OviModel(OviTower):
    """The fused model: velocity prediction for a list `[video [B, 48, T, H, W], audio [B, 20, A]]`."""

    def __init__(self, audio_config: dict, dtype=None, device=None, operations=None, **video_config):
        place = {"dtype": dtype, "device": device, "operations": operations}
        video_config.pop("model_type", None)  # core's detection says "t2v" of every 5B
        super().__init__(**video_config, **place)
        self.audio_model = OviAudioTower(**audio_config, **place)

    def forward(self, x, timestep, context, transformer_options={}, **kwargs):  # noqa: B006 (core's signature)
        """Predict velocities.

        x: `[video, audio]`; either may be None, and the other then runs alone.
        timestep: [B] on the 0..1000 scale.
        context: text [B, n, C] for the video tower, and for the audio tower unless it has one of its own.
        audio_context: text [B, m, C] for the audio tower, if it is another.
        rope: what `rope_tables` returns for these streams, if it is at hand.
        shown_timestep: whole number tensor [] that the network is to see in place of the exact timestep.
        skip_layers: per batch row the block to leave out, -1 for none (skip-layer guidance).
        denoise_mask [B, 1, T, 1, 1] or [B, 1, T, H, W], audio_denoise_mask [B, 1, A]: 0 where the latent is given and
        clean (timestep 0), 1 where it is sampled.
        Returns a list shaped like x.
        """
        return comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward, self,
            comfy.patcher_extension.get_all_wrappers(
                comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options),
        ).execute(x, timestep, context, transformer_options, **kwargs)

    def _forward(self, x, timestep, context, transformer_options={}, audio_context=None,  # noqa: B006
                 rope=None, shown_timestep=None, skip_layers=None, denoise_mask=None, audio_denoise_mask=None, **_):
        video_x, audio_x = x
        levels = None
        if denoise_mask is not None and tuple(denoise_mask.shape[-2:]) != (1, 1):
            levels, denoise_mask = mask_levels(denoise_mask, self.patch_size)
        video_t, audio_t = stream_timesteps(timestep, denoise_mask, audio_denoise_mask, shown_timestep)
        shapes = [None if stream is None else stream.shape for stream in x]
        video_freqs, audio_freqs = rope or self.rope_tables(shapes, timestep.device, transformer_options)
        video = audio = video_stream = audio_stream = None

        if video_x is not None:
            t, h, w = video_x.shape[2:]
            padded = comfy.ldm.common_dit.pad_to_patch_size(video_x, self.patch_size)
            video = self.patch_embedding(padded.float()).to(video_x.dtype)  # [B, D, T, H / 2, W / 2]
            grid = video.shape[2:]
            video = as_tokens(video)  # [B, N, D]
            video_e, modulation = self.embed_time(video_t, video.dtype)
            video_stream = Stream(modulation, video_freqs, self.embed_text(context), levels)
        if audio_x is not None:
            audio = as_tokens(self.audio_model.patch_embedding(audio_x))  # [B, A, D]
            audio_e, modulation = self.audio_model.embed_time(audio_t, audio.dtype)
            audio_context = context if audio_context is None else audio_context
            audio_stream = Stream(modulation, audio_freqs, self.audio_model.embed_text(audio_context))

        video, audio = self.run_blocks((video, audio), (video_stream, audio_stream), skip_layers, transformer_options)

        if video is not None:
            video = self.unpatchify(self.head(video, video_e, video_stream), grid)[:, :, :t, :h, :w]
        if audio is not None:
            audio = self.audio_model.head(audio, audio_e, audio_stream).transpose(1, 2)
        return [video, audio]

    def rope_tables(self, shapes: list, device, transformer_options) -> tuple[Tensor | None, Tensor | None]:
        """Rotary matrices [1, N, 1, head_dim / 2, 2, 2] for each stream of `shapes`; None for a shape that is None."""
        video = audio = None
        if shapes[0] is not None:
            video = self.rope_encode(*shapes[0][2:], device=device, dtype=torch.float32,
                                     transformer_options=transformer_options)
        if shapes[1] is not None:
            audio = self.audio_model.rope_table(shapes[1][2], *audio_clock(transformer_options), device)
        return video, audio

    def run_blocks(self, img: tuple, streams: tuple, skip_layers: list | None, transformer_options) -> tuple:
        """Run all block pairs on the residuals (video, audio), prefetching the next pair's weights meanwhile."""
        transformer_options["total_blocks"] = len(self.blocks)
        transformer_options["block_type"] = "double"
        joint = img[0] is not None and img[1] is not None
        device = (img[0] if img[0] is not None else img[1]).device
        pairs = [FusedPair(*blocks) for blocks in zip(self.blocks, self.audio_model.blocks, strict=True)]
        queue = comfy.model_prefetch.make_prefetch_queue(pairs, device, transformer_options)

        for i, pair in enumerate(pairs):
            comfy.model_prefetch.prefetch_queue_pop(queue, device, pair)
            transformer_options["block_index"] = i
            skipped = [layer == i for layer in skip_layers] if joint and skip_layers else [False]
            if not any(skipped):
                img = pair(img, streams, transformer_options)
            elif not all(skipped):
                img = pair.run_without(skipped, img, streams, transformer_options)
        comfy.model_prefetch.prefetch_queue_pop(queue, device, None)
        return img


def as_tokens(x: Tensor) -> Tensor:
    """Turn channels first [B, D, ...] into tokens [B, N, D], in this order in memory too: all residuals inherit it."""
    return x.flatten(2).transpose(1, 2).contiguous()


def keep_rows(keep: list[bool], before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]):
    """Return `after` with the batch rows marked in `keep` taken from `before`; it may lack these rows."""
    def merge(old, new):
        places = range(len(keep)) if len(new) == len(keep) else [i for i, kept in enumerate(keep) if not kept]
        rows = {i: new[row:row + 1] for row, i in enumerate(places)}
        return torch.cat([old[i:i + 1] if kept else rows[i] for i, kept in enumerate(keep)])

    return tuple(merge(old, new) for old, new in zip(before, after, strict=True))


def mask_levels(mask: Tensor, patch_size: tuple) -> tuple[Tensor, Tensor]:
    """Split a mask [B, 1, T, H, W] in the level of each token [B, N] and the value of each level [1, F]."""
    means = nn.functional.avg_pool3d(comfy.ldm.common_dit.pad_to_patch_size(mask.float(), patch_size), patch_size)
    values = torch.linspace(0, 1, MASK_LEVELS + 1, device=mask.device)
    return (means.flatten(1) * MASK_LEVELS).round().long(), values.unsqueeze(0)


def stream_timesteps(timestep: Tensor, video_mask, audio_mask, shown: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (video [B, F], audio [B, G]) timesteps from one per row [B], or from the one `shown` [] in their place.

    What a mask keeps clean gets 0.
    """
    if shown is not None:
        timestep = shown.to(timestep).expand_as(timestep)
    t = timestep.reshape(-1, 1)
    return (t if video_mask is None else t * video_mask.flatten(1),
            t if audio_mask is None else t * audio_mask.flatten(1))


def audio_clock(transformer_options) -> tuple[float, float]:
    """Return (position of the first audio latent, positions per latent) on the video's rotary clock.

    A context window restarts video positions at 0. Its audio slice starts up to half a latent off its first frame, and
    `causal_window_fix` puts one more frame in front of the video alone; both shift the audio positions. Core's
    'ScaleROPE' stretches and moves the clock of both streams.
    """
    start, options = 0.0, transformer_options.get("rope_options") or {}
    window = transformer_options.get("context_window")
    if window is not None and window.modality_windows:
        start = window.get_window_for_modality(1).index_list[0] * AUDIO_ROPE_SCALE - window.index_list[0]
        if getattr(window, "causal_anchor_index", None) is not None:
            start += 1.0
    scale = options.get("scale_t", 1.0)
    return start * scale + options.get("shift_t", 0.0), AUDIO_ROPE_SCALE * scale
