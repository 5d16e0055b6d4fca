"""Which weights of an Ovi model are quantised: one recipe for files (`tools/convert.py`) and for loading.

Only the matrices of the transformer blocks are: attention and feed-forward, 94 % of all weights. Norms, biases,
embeddings (patch, text, time), modulation and heads stay bf16: small, and read at every token. So do the first blocks,
since what they get wrong every later block builds on. How a matrix is quantised stands in `files.quantise`; errors of
each format: `benchmarks/precision.py`.
"""

import re
from dataclasses import replace

from ..files import quantise

BLOCK_MATRICES = re.compile(
    r"(audio_model\.)?blocks\.(?P<block>\d+)\.((self_attn|cross_attn)\.([qkvo]|k_fusion|v_fusion)|ffn\.[02])")
FIRST_TWO = 2 / 30

FORMATS: dict[str, quantise.Format] = {
    name: replace(target, layers=BLOCK_MATRICES, kept_share=FIRST_TWO) for name, target in quantise.FORMATS.items()}
"""What core reads with its own records."""

PLAIN_FP8 = replace(quantise.PLAIN_FP8, layers=BLOCK_MATRICES)
