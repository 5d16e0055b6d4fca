"""Attention that has a gradient: written out for short clips, PyTorch's own for long ones.

Each takes the place of core's as `optimized_attention_override` of transformer_options: what a user
chose for sampling, such as SageAttention, may have none.
"""

from __future__ import annotations

import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor


def plain_attention(_function, q: Tensor, k: Tensor, v: Tensor, heads: int,
                    mask: Tensor | None = None, **_) -> Tensor:
    """Softmax attention of q [B, N, H * D] to k, v [B, M, H * D], the mask added to its logits.

    PyTorch's fused kernels save memory by computing the weights again in the backward pass. At a
    few hundred tokens that costs more than it saves: on a CPU they take three times as long.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, H, N, D]
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits + mask
    return (torch.softmax(logits, dim=-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


def fused_attention(_function, q: Tensor, k: Tensor, v: Tensor, heads: int,
                    mask: Tensor | None = None, **_) -> Tensor:
    """The same by PyTorch's kernels, which keep no matrix of weights."""
    mask = None if mask is None else mask.to(q.dtype)
    return attention_pytorch(q, k, v, heads, mask=mask, _inside_attn_wrapper=True)
