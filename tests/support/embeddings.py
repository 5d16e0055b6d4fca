"""Embeddings of a text, as tests compare them."""

from ovi_native.ovi_model.text.umt5 import TextInfo, encode_conditioning
from torch import Tensor


def encode(clip, text: str) -> tuple[Tensor, TextInfo]:
    """Embeddings [1, L, D] of a text and how it was tokenised; see `umt5.encode_conditioning`."""
    conditioning, info = encode_conditioning(clip, text)
    return conditioning[0][0], info
