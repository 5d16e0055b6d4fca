"""The two towers: Wan transformers of one shape, whose blocks can read each other's stream.

Both are core's `WanModel` with another block class. They differ in what they embed: the video
tower patches of 1x2x2 latent pixels, the audio tower one token a latent, by convolutions over time.

Shapes: B batch, N tokens, D width, H heads, A audio latents, L text tokens, F timesteps a stream.
"""

import comfy.model_management
import torch
from comfy.ldm.flux.math import rope
from comfy.ldm.wan.model import Head, WanModel
from comfy.model_management import cast_to
from torch import Tensor, nn

from .blocks import OviBlock, Stream, modulate

ROPE_THETA = 10000.0


def timestep_sinusoids(t: Tensor, dim: int) -> Tensor:
    """Map timesteps [...] on the 0..1000 scale to [..., dim] float32, cosines first.

    In float64 throughout, as upstream, where the device has it.
    """
    fp64 = comfy.model_management.supports_fp64(t.device)
    t = t.to(torch.float64 if fp64 else torch.float32)
    half = dim // 2
    freqs = torch.pow(10000.0, -torch.arange(half, dtype=t.dtype, device=t.device) / half)
    angles = t.unsqueeze(-1) * freqs  # [..., dim / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(torch.float32)


def fit_text(text: Tensor, length: int) -> Tensor:
    """Bring text [B, n, C] to [B, length, C]: zero-padded; or if longer, without zeros, then cut.

    The padding takes part in attention, as in training. Tokens of zeros are padding wherever they
    stand: between two padded texts that were joined, too. Attention to text knows no order, so
    nothing changes by leaving them out.
    """
    missing = length - text.shape[1]
    if missing < 0:
        used_first = (text == 0).all(dim=-1).to(torch.uint8).argsort(dim=1, stable=True)  # [B, n]
        text = text.take_along_dim(used_first[:, :length, None], dim=1)
    return nn.functional.pad(text, (0, 0, 0, max(missing, 0)))


def as_tokens(x: Tensor) -> Tensor:
    """Turn channels first [B, D, ...] into tokens [B, N, D].

    In this order in memory too: all residuals inherit it.
    """
    return x.flatten(2).transpose(1, 2).contiguous()


class OviHead(Head):
    """Wan's head, broadcasting its modulation over the tokens of a frame."""

    def forward(self, stream: Stream) -> Tensor:
        """Project the residual [B, N, D] to [B, N, patch volume * channels]."""
        x, per_token = stream.x, stream.for_tokens
        table = cast_to(self.modulation, dtype=x.dtype, device=x.device)  # [1, 2, D]
        shift, scale = (table.unsqueeze(0) + stream.time.unsqueeze(2)).unbind(2)  # [B, F, D]
        return self.head(modulate(self.norm, x, per_token(shift), per_token(scale)))


class OviTower(WanModel):
    """A Wan transformer whose blocks can read another tower's stream."""

    def __init__(self, *, dtype=None, device=None, operations=None, **settings):
        place = {"operations": operations, "device": device, "dtype": dtype}
        super().__init__(model_type="t2v", wan_attn_block_class=OviBlock, **place, **settings)
        self.head = OviHead(self.dim, self.out_dim, self.patch_size, self.eps,
                            operation_settings=place)

    def enter(self, x: Tensor, t: Tensor, freqs: Tensor, text: Tensor,
              timestep_of_token: Tensor | None = None, text_bias: Tensor | None = None) -> Stream:
        """The stream of embedded tokens x [B, N, D], timesteps t [B, F] and a text [B, n, C].

        text_bias: [B, n], see `Conditions`; the text is not padded then.
        """
        time, modulation = self.embed_time(t, x.dtype)
        if text_bias is not None:
            text, text_bias = self.text_embedding(text), text_bias[:, None, None]
        else:
            text = self.embed_text(text)
        return Stream(x, time, modulation, freqs, text, timestep_of_token, text_bias)

    def embed_time(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Map timesteps [B, F] to embeddings [B, F, D] and the blocks' modulation [B, F, 6, D]."""
        e = self.time_embedding(timestep_sinusoids(t, self.freq_dim).to(dtype))
        return e, self.time_projection(e).unflatten(-1, (6, self.dim))

    def embed_text(self, text: Tensor) -> Tensor:
        """Embed text [B, n, C] as [B, L, D]. Zero-padded before: padding is the response to 0."""
        return self.text_embedding(fit_text(text, self.text_len))


class OviAudioTower(OviTower):
    """The audio tower: one token a latent."""

    def __init__(self, *, in_dim, out_dim, dim, conv_hidden_dim, kernel_size=7, **settings):
        super().__init__(in_dim=in_dim, out_dim=out_dim, dim=dim, patch_size=(1, 1, 1), **settings)
        operation_settings = {k: settings[k] for k in ("operations", "device", "dtype")}
        self.patch_embedding = nn.Sequential(
            temporal_conv(in_dim, dim, kernel_size, True, operation_settings),
            nn.SiLU(),
            ConvMLP(dim, conv_hidden_dim, kernel_size, operation_settings),
        )

    def embed(self, audio: Tensor) -> Tensor:
        """Latents [B, 20, A] as tokens [B, A, D]."""
        return as_tokens(self.patch_embedding(audio))

    def project(self, stream: Stream) -> Tensor:
        """The velocity [B, 20, A] of a stream that has passed all blocks."""
        return self.head(stream).transpose(1, 2)

    def rope_table(self, length: int, start: float, step: float, device) -> Tensor:
        """Rotary matrices [1, A, 1, D / H / 2, 2, 2] for latents at `start + i * step` frames.

        Frames are the video's latent ones. Only the temporal pairs are rotated. Positions are
        float32 whatever the model's dtype: bf16 cannot hold a spacing of 0.197.
        """
        head_dim = self.dim // self.num_heads
        temporal = self.rope_embedder.axes_dim[0]
        positions = start + torch.arange(length, dtype=torch.float32, device=device) * step
        rotated = rope(positions.unsqueeze(0), temporal, ROPE_THETA)  # [1, A, pairs, 2, 2]
        identity = torch.eye(2, device=device).expand(1, length, (head_dim - temporal) // 2, 2, 2)
        return torch.cat([rotated, identity], dim=2).unsqueeze(2)


def temporal_conv(channels: int, out_channels: int, kernel_size: int, bias: bool,
                  operation_settings) -> nn.Module:
    """A convolution over time that keeps the length, [B, C, A] to [B, D, A], as one matrix product.

    Clips are short (157 latents for 5 s) and channels many: a product over every latent's window
    reads the weights once, as they lie in memory, where a convolution kernel would reorder them.
    """
    class TemporalConv(operation_settings["operations"].Conv1d):  # type: ignore[misc]
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            reach, size = self.padding[0], self.kernel_size[0]
            windows = nn.functional.pad(x, (reach, reach)).unfold(2, size, 1)  # [B, C, A, K]
            windows = windows.transpose(1, 2).flatten(2)  # [B, A, C * K]
            return nn.functional.linear(windows, weight.flatten(1), bias).transpose(1, 2)

    return TemporalConv(channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias,
                        device=operation_settings["device"], dtype=operation_settings["dtype"])


class ConvMLP(nn.Module):
    """Gated convolutional MLP over time (upstream `ConvMLP`): `w2(silu(w1 x) * w3 x)`."""

    def __init__(self, dim: int, hidden_dim: int, kernel_size: int, operation_settings):
        super().__init__()
        self.w1 = temporal_conv(dim, hidden_dim, kernel_size, False, operation_settings)
        self.w2 = temporal_conv(hidden_dim, dim, kernel_size, False, operation_settings)
        self.w3 = temporal_conv(dim, hidden_dim, kernel_size, False, operation_settings)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, A] to [B, D, A]."""
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))
