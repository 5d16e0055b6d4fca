"""The frozen text encoder of the tiny Ovi: random, its tokenizer made for the world's captions, and captions encoded.

A random encoder keeps words apart and, by its position tables, their order; what they mean is learnt by the towers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from ovi_native.ovi_model.ovi.prompt import assemble, clean_for_tokenizer
from ovi_native.ovi_model.ovi.variants import DEFAULT_VARIANT, VARIANTS
from ovi_native.ovi_model.text.umt5 import encode_conditioning
from ovi_native.tiny_world.captions import caption
from ovi_native.tiny_world.scenes import draw_scene
from safetensors.torch import save_file
from tiny.text_encoder import CORPUS, text_encoder

WIDTH, HEADS, POSITION_STD = 128, 4, 1.5


def write_text_encoder(path: Path, seed: int = 0) -> None:
    random = np.random.default_rng(seed)
    captions = [caption(draw_scene(random, 5.0)) for _ in range(400)]
    save_file(text_encoder(seed, WIDTH, CORPUS + "\n".join(captions), HEADS, POSITION_STD), path)


def encode(clip, texts: list[str]) -> dict[str, torch.Tensor]:
    """Each text's embedding [n, C], as 'Ovi Prompt' makes it."""
    out = {}
    for text in texts:
        prompt = clean_for_tokenizer(assemble(text, "", VARIANTS[DEFAULT_VARIANT])) if text else ""
        conditioning, _ = encode_conditioning(clip, prompt)
        out[text] = conditioning[0][0][0].float().clone()
    return out
