"""One block of Ovi's twin towers: two Wan blocks that exchange information.

Order of one fused block (arXiv 2510.01284, section 3; upstream `FusionModel.single_fusion_block_forward`):

1. audio self-attention, video self-attention, each modulated by its own timestep;
2. audio reads its text and the *video* residual as it stands after 1, then runs its feed-forward;
3. video reads its text and the *audio* residual as it stood after 1, then runs its feed-forward.

Text and the other stream share one query projection (un-rotated for text, rotated for the other stream) and one
output projection; the two softmaxes are separate and summed. The other stream enters as a raw residual through an
affine LayerNorm, without modulation and without a gate.

Shapes: B batch, N tokens, D width, H heads, L text tokens, F timesteps a stream: 1, one a latent frame or token, or
the levels of a mask.
"""

from dataclasses import dataclass

import comfy.quant_ops
import torch
from comfy.ldm.flux.math import apply_rope1
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.wan.model import Head, WanAttentionBlock, WanT2VCrossAttention
from comfy.model_management import cast_to
from torch import Tensor, nn


@dataclass
class Stream:
    """What one stream's residual meets in every block."""

    modulation: Tensor  # [B, F, 6, D] projected timestep
    freqs: Tensor  # [1, N, 1, head_dim / 2, 2, 2] rotary matrices
    text: Tensor  # [B, L, D] embedded text
    levels: Tensor | None = None  # [B, N] which of the F each token has; None: N / F tokens in a row share one

    def for_tokens(self, vector: Tensor) -> Tensor:
        """A modulation vector [B, F, D] as `normalise` takes it: [B, N, D] where tokens have levels."""
        return vector if self.levels is None else vector.take_along_dim(self.levels.unsqueeze(-1), dim=1)

    def take_rows(self, rows: list[bool]) -> "Stream":
        """The stream of the marked batch rows alone."""
        levels = None if self.levels is None else take_rows(self.levels, rows)
        return Stream(take_rows(self.modulation, rows), self.freqs, take_rows(self.text, rows), levels)


def take_rows(x: Tensor, rows: list[bool]) -> Tensor:
    """The marked batch rows of x. By slices: an index tensor would wait for the device."""
    return torch.cat([x[i:i + 1] for i, wanted in enumerate(rows) if wanted])


def compiled_backends() -> set[str]:
    """comfy-kitchen's backends with a compiled kernel for `adaln` on this machine: none on CUDA below 13, say."""
    kitchen = getattr(comfy.quant_ops, "ck", None)  # core goes on without the package
    backends = {} if kitchen is None else kitchen.list_backends()
    return {name for name, found in backends.items() if name != "eager" and found["available"]
            and not found["disabled"] and "adaln" in found["capabilities"]}


HAS_KERNEL = bool(compiled_backends())  # once: core has switched backends off by now, and a graph needs a constant


def normalise(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return `norm(x) * (1 + scale) + shift` for x [B, N, D]; shift and scale are [B, F, D], for N / F tokens each.

    Broadcasts over the tokens of a frame: no [B, N, D] table of shifts is ever built.
    """
    if HAS_KERNEL and x.is_cuda and not torch.is_grad_enabled():
        return normalise_in_one_kernel(norm, x, shift, scale)
    y = norm(x).unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift.unsqueeze(2), y, 1 + scale.unsqueeze(2), out=reused(y)).flatten(1, 2)


def normalise_in_one_kernel(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The same by comfy-kitchen. Without a compiled kernel it would be slower than `normalise`. Has no gradient."""
    grouped = x.unflatten(1, (shift.shape[1], -1))
    return comfy.quant_ops.ck.adaln(grouped, scale.unsqueeze(2), shift.unsqueeze(2), norm.eps).flatten(1, 2)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Return `x + y * gate` for x, y [B, N, D] and gate [B, F, D], in y's memory."""
    frames = (gate.shape[1], -1)
    y = y.unflatten(1, frames)
    return torch.addcmul(x.unflatten(1, frames), y, gate.unsqueeze(2), out=reused(y)).flatten(1, 2)


def add(x: Tensor, y: Tensor) -> Tensor:
    """Return `x + y`, in y's memory."""
    return torch.add(x, y, out=reused(y))


def reused(x: Tensor) -> Tensor | None:
    """Where a result may go that takes the place of x, which nobody else holds: nowhere (None) while training."""
    return None if torch.is_grad_enabled() else x


class ReusingGELU(nn.GELU):
    """GELU in the memory of its input: that of a feed-forward's hidden layer is the largest tensor of all."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x, approximate=self.approximate)


class OviCrossAttention(WanT2VCrossAttention):
    """Wan's text cross-attention plus keys and values for the other stream (checkpoint names `*_fusion`)."""

    def __init__(self, dim, num_heads, window_size=(-1, -1), qk_norm=True, eps=1e-6, operation_settings=None):
        super().__init__(dim, num_heads, window_size, qk_norm, eps, operation_settings=operation_settings)
        ops = operation_settings["operations"]
        place = {"device": operation_settings["device"], "dtype": operation_settings["dtype"]}
        self.k_fusion = ops.Linear(dim, dim, **place)
        self.v_fusion = ops.Linear(dim, dim, **place)
        self.pre_attn_norm_fusion = ops.LayerNorm(dim, eps=1e-6, elementwise_affine=True, **place)
        self.norm_k_fusion = ops.RMSNorm(dim, eps=1e-6, elementwise_affine=True, **place) if qk_norm else nn.Identity()

    def attend_text(self, q: Tensor, text: Tensor, transformer_options) -> Tensor:
        """Attend from queries [B, N, D] to embedded text [B, L, D]."""
        return optimized_attention(q, self.norm_k(self.k(text)), self.v(text), heads=self.num_heads,
                                   transformer_options=transformer_options)

    def forward(self, x: Tensor, stream: Stream, transformer_options) -> Tensor:
        """Attend from x [B, N, D] to its text alone."""
        return self.o(self.attend_text(self.norm_q(self.q(x)), stream.text, transformer_options))

    def forward_fused(self, x: Tensor, stream: Stream, other: Tensor, other_freqs: Tensor,
                      transformer_options) -> Tensor:
        """Attend from x [B, N, D] to its text and to the other stream's residual other [B, M, D]."""
        heads = (self.num_heads, self.head_dim)
        q = self.norm_q(self.q(x))
        out = self.attend_text(q, stream.text, transformer_options)

        other = self.pre_attn_norm_fusion(other)
        k = apply_rope1(self.norm_k_fusion(self.k_fusion(other)).unflatten(-1, heads), other_freqs).flatten(2)
        v = self.v_fusion(other)
        q = apply_rope1(q.unflatten(-1, heads), stream.freqs).flatten(2)
        # A sum of its own: whatever computes attention may hold on to what it returned.
        return self.o(out + optimized_attention(q, k, v, heads=self.num_heads, transformer_options=transformer_options))


class OviBlock(WanAttentionBlock):
    """One tower's half of a fused block; the video tower's instance runs both halves."""

    def __init__(self, cross_attn_type, dim, ffn_dim, num_heads, window_size=(-1, -1), qk_norm=True,
                 cross_attn_norm=False, eps=1e-6, operation_settings=None):
        super().__init__(cross_attn_type, dim, ffn_dim, num_heads, window_size, qk_norm, cross_attn_norm, eps,
                         operation_settings=operation_settings)
        self.cross_attn = OviCrossAttention(dim, num_heads, (-1, -1), qk_norm, eps,
                                            operation_settings=operation_settings)
        self.ffn[1] = ReusingGELU(approximate="tanh")

    def forward(self, video: Tensor | None, audio: Tensor | None, video_stream: Stream, audio_stream: Stream,
                audio_block: "OviBlock", transformer_options):
        """Run both halves on the residuals video [B, N, D] and audio [B, M, D]; return the new pair.

        A residual that is None stays None (its stream is not used), and the other then reads only its own text.
        """
        if audio is None:
            video, mod = self.attend_self(video, video_stream, transformer_options)
            return self.attend_text_and_feed_forward(video, video_stream, mod, transformer_options), None
        audio, audio_mod = audio_block.attend_self(audio, audio_stream, transformer_options)
        if video is None:
            return None, audio_block.attend_text_and_feed_forward(audio, audio_stream, audio_mod, transformer_options)
        video, video_mod = self.attend_self(video, video_stream, transformer_options)

        new_audio = audio_block.exchange_and_feed_forward(
            audio, audio_stream, audio_mod, video, video_stream.freqs, transformer_options)
        new_video = self.exchange_and_feed_forward(
            video, video_stream, video_mod, audio, audio_stream.freqs, transformer_options)
        return new_video, new_audio

    def attend_self(self, x: Tensor, stream: Stream, transformer_options):
        """Self-attention with its residual; also returns the six modulation vectors, each [B, F, D]."""
        table = cast_to(self.modulation, dtype=x.dtype, device=x.device)
        mod = (table.unsqueeze(0) + stream.modulation).unbind(2)
        shift, scale, gate = mod[:3]
        y = self.self_attn(normalise(self.norm1, x, stream.for_tokens(shift), stream.for_tokens(scale)), stream.freqs,
                           transformer_options=transformer_options)
        return add_gated(x, y, stream.for_tokens(gate)), mod

    def exchange_and_feed_forward(self, x, stream: Stream, mod, other, other_freqs, transformer_options) -> Tensor:
        """Joint text and cross-modal attention, then the feed-forward."""
        x = add(x, self.cross_attn.forward_fused(self.norm3(x), stream, other, other_freqs, transformer_options))
        return self.feed_forward(x, stream, mod)

    def attend_text_and_feed_forward(self, x, stream: Stream, mod, transformer_options) -> Tensor:
        """The same without another stream."""
        x = add(x, self.cross_attn(self.norm3(x), stream, transformer_options))
        return self.feed_forward(x, stream, mod)

    def feed_forward(self, x: Tensor, stream: Stream, mod) -> Tensor:
        shift, scale, gate = mod[3:]
        y = self.ffn(normalise(self.norm2, x, stream.for_tokens(shift), stream.for_tokens(scale)))
        return add_gated(x, y, stream.for_tokens(gate))


class OviHead(Head):
    """Wan's head, broadcasting its modulation over the tokens of a frame."""

    def forward(self, x: Tensor, e: Tensor, stream: Stream) -> Tensor:
        """Project x [B, N, D] with the time embedding e [B, F, D] to [B, N, patch volume * channels]."""
        table = cast_to(self.modulation, dtype=x.dtype, device=x.device)
        shift, scale = (table.unsqueeze(0) + e.unsqueeze(2)).unbind(2)
        return self.head(normalise(self.norm, x, stream.for_tokens(shift), stream.for_tokens(scale)))


def temporal_conv(channels: int, out_channels: int, kernel_size: int, bias: bool, operation_settings) -> nn.Module:
    """A convolution over time that keeps the length, [B, C, A] to [B, D, A], computed as one matrix product.

    Clips are short (157 latents for 5 s) and channels many: a product over every latent's window reads the weights
    once, as they lie in memory, where a convolution kernel would reorder them.
    """
    class TemporalConv(operation_settings["operations"].Conv1d):  # type: ignore[misc]
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            reach = self.padding[0]
            windows = nn.functional.pad(x, (reach, reach)).unfold(2, self.kernel_size[0], 1)  # [B, C, A, K]
            return nn.functional.linear(windows.transpose(1, 2).flatten(2), weight.flatten(1), bias).transpose(1, 2)

    return TemporalConv(channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias,
                        device=operation_settings["device"], dtype=operation_settings["dtype"])


class ConvMLP(nn.Module):
    """Gated convolutional MLP over time (upstream `ConvMLP`): `w2(silu(w1 x) * w3 x)`, no biases, width kept."""

    def __init__(self, dim: int, hidden_dim: int, kernel_size: int, operation_settings):
        super().__init__()
        self.w1 = temporal_conv(dim, hidden_dim, kernel_size, False, operation_settings)
        self.w2 = temporal_conv(hidden_dim, dim, kernel_size, False, operation_settings)
        self.w3 = temporal_conv(dim, hidden_dim, kernel_size, False, operation_settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))
