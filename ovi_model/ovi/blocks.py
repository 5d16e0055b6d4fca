"""One block of Ovi's twin towers: two Wan blocks joined by fusion cross-attention.

Order of one fused block (arXiv 2510.01284, section 3; upstream
`FusionModel.single_fusion_block_forward`):

1. audio self-attention, video self-attention, each modulated by its own timestep;
2. audio reads its text and the *video* residual as it stands after 1, then runs its feed-forward;
3. video reads its text and the *audio* residual as it stood after 1, then runs its feed-forward.

Text and the other stream share one query projection (un-rotated for text, rotated for the other
stream) and one output projection; the two softmaxes are separate and summed. The other stream
enters as a raw residual through an affine LayerNorm, without modulation and without a gate.

A block takes both streams and returns both with new residuals. The memory of a residual that a
caller may still hold is never written to; that of results in between is used again.

Shapes: B batch, N and M tokens, D width, H heads, L text tokens, F timesteps a stream: 1, one a
latent frame or token, or one a level of a mask.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import comfy.quant_ops
import torch
from comfy.ldm.flux.math import apply_rope1
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.wan.model import WanAttentionBlock, WanT2VCrossAttention
from comfy.model_management import cast_to
from torch import Tensor, nn

# --- streams --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Stream:
    """One stream on its way through its tower: the residual, and what that meets in every block."""

    x: Tensor  # [B, N, D] residual
    time: Tensor  # [B, F, D] embedded timesteps, for the head
    modulation: Tensor  # [B, F, 6, D] projected timesteps, for the blocks
    freqs: Tensor  # [1, N, 1, D / H / 2, 2, 2] rotary matrices
    text: Tensor  # [B, L, D] embedded text
    timestep_of_token: Tensor | None = None  # [B, N] index in F; None: N / F tokens in a row share
    text_bias: Tensor | None = None  # [B, 1, 1, L] added to the logits of the text's tokens

    def for_tokens(self, vector: Tensor) -> Tensor:
        """A modulation vector [B, F, D] as `modulate` takes it; [B, N, D] if tokens differ."""
        if self.timestep_of_token is None:
            return vector
        return vector.take_along_dim(self.timestep_of_token.unsqueeze(-1), dim=1)

    def take(self, wanted: list[bool]) -> "Stream":
        """The stream of those batch indices alone that are `wanted`."""
        of_token = self.timestep_of_token
        return Stream(take(self.x, wanted), take(self.time, wanted), take(self.modulation, wanted),
                      self.freqs, take(self.text, wanted),
                      None if of_token is None else take(of_token, wanted),
                      None if self.text_bias is None else take(self.text_bias, wanted))

    def put(self, wanted: list[bool], part: "Stream") -> "Stream":
        """This stream, with residuals from `part`, its `take(wanted)`, at these batch indices."""
        new = [part.x[i:i + 1] for i in range(sum(wanted))]
        return replace(self, x=torch.cat([new.pop(0) if yes else self.x[i:i + 1]
                                          for i, yes in enumerate(wanted)]))


def take(x: Tensor, wanted: list[bool]) -> Tensor:
    """x at the batch indices that are `wanted`. By slices: an index would wait for the device."""
    return torch.cat([x[i:i + 1] for i, yes in enumerate(wanted) if yes])


# --- modulation and residuals ---------------------------------------------------------------------


def compiled_backends() -> set[str]:
    """comfy-kitchen's backends with a compiled kernel for `adaln`: none on CUDA below 13, say."""
    kitchen = getattr(comfy.quant_ops, "ck", None)  # core goes on without the package
    backends = {} if kitchen is None else kitchen.list_backends()
    return {name for name, found in backends.items() if name != "eager" and found["available"]
            and not found["disabled"] and "adaln" in found["capabilities"]}


HAS_KERNEL = bool(compiled_backends())
"""Once: core has switched backends off by now, and a graph needs a constant."""


def modulate(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return `norm(x) * (1 + scale) + shift` for x [B, N, D] and shift, scale [B, F, D].

    Each of the F is for N / F tokens in a row, by broadcasting: no [B, N, D] table is ever built.
    """
    if HAS_KERNEL and x.is_cuda and not torch.is_grad_enabled():
        return modulate_in_one_kernel(norm, x, shift, scale)
    y = norm(x).unflatten(1, (shift.shape[1], -1))  # [B, F, N / F, D]
    return torch.addcmul(shift.unsqueeze(2), y, 1 + scale.unsqueeze(2), out=reused(y)).flatten(1, 2)


def modulate_in_one_kernel(norm: nn.LayerNorm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The same by comfy-kitchen. Has no gradient, and is slower where it is not compiled."""
    y = x.unflatten(1, (shift.shape[1], -1))  # [B, F, N / F, D]
    adaln = comfy.quant_ops.ck.adaln
    return adaln(y, scale.unsqueeze(2), shift.unsqueeze(2), norm.eps).flatten(1, 2)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Return `x + y * gate` for x, y [B, N, D] and gate [B, F, D], in y's memory."""
    frames = (gate.shape[1], -1)
    y = y.unflatten(1, frames)  # [B, F, N / F, D]
    return torch.addcmul(x.unflatten(1, frames), y, gate.unsqueeze(2), out=reused(y)).flatten(1, 2)


def add(x: Tensor, y: Tensor) -> Tensor:
    """Return `x + y`, in y's memory."""
    return torch.add(x, y, out=reused(y))


def reused(x: Tensor) -> Tensor | None:
    """Where a result may go that takes the place of x, held by nobody else; None in training."""
    return None if torch.is_grad_enabled() else x


class ReusingGELU(nn.GELU):
    """GELU in the memory of its input, a feed-forward's hidden layer: the largest tensor of all."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        return torch.ops.aten.gelu_(x, approximate=self.approximate)


# --- the block ------------------------------------------------------------------------------------


class OviCrossAttention(WanT2VCrossAttention):
    """Wan's text cross-attention, with keys and values for the other stream (names `*_fusion`)."""

    def __init__(self, dim, num_heads, window_size=(-1, -1), qk_norm=True, eps=1e-6,
                 operation_settings=None):
        super().__init__(dim, num_heads, window_size, qk_norm, eps,
                         operation_settings=operation_settings)
        ops = operation_settings["operations"]
        place = {"device": operation_settings["device"], "dtype": operation_settings["dtype"]}
        norm = {"eps": 1e-6, "elementwise_affine": True, **place}
        self.k_fusion = ops.Linear(dim, dim, **place)
        self.v_fusion = ops.Linear(dim, dim, **place)
        self.pre_attn_norm_fusion = ops.LayerNorm(dim, **norm)
        self.norm_k_fusion = ops.RMSNorm(dim, **norm) if qk_norm else nn.Identity()

    def forward_fused(self, x: Tensor, stream: Stream, other: Stream,
                      transformer_options) -> Tensor:
        """Attend from x [B, N, D] to the text of its stream and to the residual of the other."""
        heads, options = self.num_heads, {"transformer_options": transformer_options}
        q = self.norm_q(self.q(x))
        text = self.attend_text(q, stream, transformer_options)

        y = self.pre_attn_norm_fusion(other.x)  # [B, M, D]
        k, v = self.rotated(self.norm_k_fusion(self.k_fusion(y)), other.freqs), self.v_fusion(y)
        fused = optimized_attention(self.rotated(q, stream.freqs), k, v, heads=heads, **options)
        return self.o(text + fused)  # a sum of its own: an attention function may hold its results

    def forward_alone(self, x: Tensor, stream: Stream, transformer_options) -> Tensor:
        """Attend from x [B, N, D] to the text of its stream."""
        return self.o(self.attend_text(self.norm_q(self.q(x)), stream, transformer_options))

    def attend_text(self, q: Tensor, stream: Stream, transformer_options) -> Tensor:
        k, v = self.norm_k(self.k(stream.text)), self.v(stream.text)
        return optimized_attention(q, k, v, heads=self.num_heads, mask=stream.text_bias,
                                   transformer_options=transformer_options)  # [B, N, D]

    def rotated(self, x: Tensor, freqs: Tensor) -> Tensor:
        """Queries or keys [B, N, D] at their places in time and space."""
        return apply_rope1(x.unflatten(-1, (self.num_heads, self.head_dim)), freqs).flatten(2)


class OviBlock(WanAttentionBlock):
    """One tower's half of a fused block; the video tower's instance runs both halves."""

    def __init__(self, cross_attn_type, dim, ffn_dim, num_heads, window_size=(-1, -1), qk_norm=True,
                 cross_attn_norm=False, eps=1e-6, operation_settings=None):
        super().__init__(cross_attn_type, dim, ffn_dim, num_heads, window_size, qk_norm,
                         cross_attn_norm, eps, operation_settings=operation_settings)
        self.cross_attn = OviCrossAttention(dim, num_heads, (-1, -1), qk_norm, eps,
                                            operation_settings=operation_settings)
        self.ffn[1] = ReusingGELU(approximate="tanh")

    def forward(self, video: Stream | None, audio: Stream | None, audio_block: "OviBlock",
                transformer_options) -> tuple[Stream | None, Stream | None]:
        """Run both halves. A stream that is None stays so; the other then reads its text alone."""
        if video is None or audio is None:
            return (None if video is None else self.run_alone(video, transformer_options),
                    None if audio is None else audio_block.run_alone(audio, transformer_options))

        audio, audio_mod = audio_block.attend_self(audio, transformer_options)
        video, video_mod = self.attend_self(video, transformer_options)
        new_audio = audio_block.attend_fused(audio, video, transformer_options)
        new_audio = audio_block.feed_forward(new_audio, audio_mod)
        new_video = self.attend_fused(video, audio, transformer_options)
        new_video = self.feed_forward(new_video, video_mod)
        return new_video, new_audio

    def run_alone(self, stream: Stream, transformer_options) -> Stream:
        """Wan's own block: without another stream."""
        stream, mod = self.attend_self(stream, transformer_options)
        y = self.cross_attn.forward_alone(self.norm3(stream.x), stream, transformer_options)
        return self.feed_forward(replace(stream, x=add(stream.x, y)), mod)

    def attend_self(self, stream: Stream, transformer_options) -> tuple[Stream, tuple[Tensor, ...]]:
        """Self-attention; also returns the block's six modulation vectors, each [B, F, D]."""
        x, per_token = stream.x, stream.for_tokens
        table = cast_to(self.modulation, dtype=x.dtype, device=x.device)  # [1, 6, D]
        mod = (table.unsqueeze(0) + stream.modulation).unbind(2)
        shift, scale, gate = mod[:3]
        y = self.self_attn(modulate(self.norm1, x, per_token(shift), per_token(scale)),
                           stream.freqs, transformer_options=transformer_options)
        return replace(stream, x=add_gated(x, y, per_token(gate))), mod

    def attend_fused(self, stream: Stream, other: Stream, transformer_options) -> Stream:
        """Fusion cross-attention: to its text, and to the other stream."""
        y = self.cross_attn.forward_fused(self.norm3(stream.x), stream, other, transformer_options)
        return replace(stream, x=add(stream.x, y))

    def feed_forward(self, stream: Stream, mod: tuple[Tensor, ...]) -> Stream:
        """Feed-forward, by the last three modulation vectors."""
        x, per_token = stream.x, stream.for_tokens
        shift, scale, gate = mod[3:]
        y = self.ffn(modulate(self.norm2, x, per_token(shift), per_token(scale)))
        return replace(stream, x=add_gated(x, y, per_token(gate)))


@dataclass(frozen=True, eq=False)
class FusedBlock:
    """Block i of both towers, with what core and other nodes may hang on it."""

    video: OviBlock
    audio: OviBlock

    def modules(self) -> Iterator[nn.Module]:
        """For core's prefetcher, which fetches the weights of all that this yields."""
        yield from self.video.modules()
        yield from self.audio.modules()

    def __call__(self, video: Stream | None, audio: Stream | None, transformer_options):
        """Run the block on the pair, or what another node put in its place; return the new pair."""
        replacement = replacement_of_block(transformer_options)
        if replacement is None:
            return self.video(video, audio, self.audio, transformer_options)

        def run(args: dict) -> dict:
            pair = map(with_residual, (args["video_stream"], args["audio_stream"]), args["img"])
            pair = self.video(*pair, self.audio, args["transformer_options"])
            return {"img": tuple(map(residual, pair))}

        args = {"img": (residual(video), residual(audio)), "video_stream": video,
                "audio_stream": audio, "transformer_options": transformer_options}
        img = replacement(args, {"original_block": run})["img"]
        return with_residual(video, img[0]), with_residual(audio, img[1])

    def run_for(self, wanted: list[bool], video, audio, transformer_options):
        """The same for the `wanted` batch indices of both; the others come back as they are."""
        if replacement_of_block(transformer_options) or transformer_options.get("patches"):
            # what patches a block may count on the whole batch
            new = [stream.take(wanted) for stream in self(video, audio, transformer_options)]
        else:
            new = self(video.take(wanted), audio.take(wanted), transformer_options)
        return video.put(wanted, new[0]), audio.put(wanted, new[1])


def residual(stream: Stream | None) -> Tensor | None:
    return None if stream is None else stream.x


def with_residual(stream: Stream | None, x: Tensor | None) -> Stream | None:
    """The stream with another residual [B, N, D]; None if that is None."""
    return None if stream is None or x is None else replace(stream, x=x)


def replacement_of_block(transformer_options):
    """What another node put in the place of the block at work, or None."""
    replacements = transformer_options.get("patches_replace", {}).get("dit", {})
    return replacements.get(("double_block", transformer_options["block_index"]))
