"""The sizes of a joint checkpoint, and the one list of its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

Value = TypeVar("Value")
VIDEO_CHANNELS, AUDIO_CHANNELS = 48, 20
ATTENTION = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k",
             "cross_attn.v", "cross_attn.o", "cross_attn.k_fusion", "cross_attn.v_fusion")
ATTENTION_GAINS = ("self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k",
                   "cross_attn.norm_k_fusion")


@dataclass(frozen=True)
class Sizes:
    """A tiny model: heads of 128 as in the real one."""

    heads: int = 2
    blocks: int = 3
    ffn: int = 192
    text: int = 64
    frequencies: int = 256
    conv_hidden: int = 0  # of the sound's embedding; 0: as upstream's rule has it

    @property
    def dim(self) -> int:
        return 128 * self.heads


TINY = Sizes()
BUNDLE = Sizes(blocks=4, ffn=512, text=128)  # of the file that `tools/make_tiny.py` writes


def tensor_shapes(sizes: Sizes) -> dict[str, list[int]]:
    """Names (upstream layout) and shapes of a joint checkpoint."""
    d, hidden = sizes.dim, sizes.conv_hidden or 256 * math.ceil(int(8 * sizes.dim / 3) / 256)
    shapes: dict[str, list[int]] = {}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = [*shape]
        shapes[f"{name}.bias"] = [shape[0]]

    for tower, channels, volume in (("video_model", VIDEO_CHANNELS, 4), ("audio_model", AUDIO_CHANNELS, 1)):
        layer(f"{tower}.text_embedding.0", d, sizes.text)
        layer(f"{tower}.text_embedding.2", d, d)
        layer(f"{tower}.time_embedding.0", d, sizes.frequencies)
        layer(f"{tower}.time_embedding.2", d, d)
        layer(f"{tower}.time_projection.1", 6 * d, d)
        for index in range(sizes.blocks):
            block = f"{tower}.blocks.{index}"
            for name in ATTENTION:
                layer(f"{block}.{name}", d, d)
            shapes |= {f"{block}.{name}.weight": [d] for name in ATTENTION_GAINS}
            layer(f"{block}.norm3", d)
            layer(f"{block}.cross_attn.pre_attn_norm_fusion", d)
            layer(f"{block}.ffn.0", sizes.ffn, d)
            layer(f"{block}.ffn.2", d, sizes.ffn)
            shapes[f"{block}.modulation.modulation"] = [1, 6, d]
        shapes[f"{tower}.head.modulation"] = [1, 2, d]
        layer(f"{tower}.head.head", volume * channels, d)
    layer("video_model.patch_embedding", d, VIDEO_CHANNELS, 1, 2, 2)
    layer("audio_model.patch_embedding.0", d, AUDIO_CHANNELS, 7)
    shapes["audio_model.patch_embedding.2.w1.weight"] = [hidden, d, 7]
    shapes["audio_model.patch_embedding.2.w2.weight"] = [d, hidden, 7]
    shapes["audio_model.patch_embedding.2.w3.weight"] = [hidden, d, 7]
    return shapes


def core_layout(weights: dict[str, Value]) -> dict[str, Value]:
    """The same tensors under core's names: the video tower at the root, tables one level up."""
    return {name.removeprefix("video_model.").replace(".modulation.modulation", ".modulation"): tensor
            for name, tensor in weights.items()}


def upstream_layout(weights: dict[str, Value]) -> dict[str, Value]:
    """The inverse: core's names as upstream has them."""
    def name(key: str) -> str:
        key = key if key.startswith("audio_model.") else f"video_model.{key}"
        in_block = ".blocks." in key and key.endswith(".modulation")
        return f"{key}.modulation" if in_block else key

    return {name(key): tensor for key, tensor in weights.items()}
