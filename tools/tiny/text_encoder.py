"""A tiny UMT5 in ComfyUI's layout with a tokenizer trained on the corpus below. Needs torch and sentencepiece."""

from __future__ import annotations

import io
import math

import torch

from .draws import Draws, Tensors, round_up
from .sizes import BUNDLE

TEXT_LAYERS, TEXT_HEADS, TEXT_HEAD_DIM, TEXT_FFN, BUCKETS = 2, 2, 64, 256, 32
PIECES = 768

CORPUS = """\
A wide shot of a quiet harbour at dawn, fishing boats rocking on grey water while gulls circle above the pier.
The camera moves slowly forward. A woman in a red coat turns, smiles and says: <S>We were right about the weather.<E>
Two men sit at a small kitchen table. The older man lowers his cup. <S>You never told me that before.<E>
He answers in a low voice, <S>You never asked me, did you?<E> The younger man looks down at the floor.
<AUDCAP>Gentle waves, distant gulls, a clear female voice speaking with mild amusement.<ENDAUDCAP>
<AUDCAP>Rain on a tin roof, thunder far away, a radio playing soft piano music, footsteps.<ENDAUDCAP>
Audio: a loud crowd cheering in a stadium, a whistle, an announcer shouting over the noise.
Audio: birds, wind in dry grass, then a dog barking twice and a door closing with a heavy sound.
A close-up of hands playing an old guitar by a camp fire; sparks rise into the dark sky full of stars.
A robot with a bright yellow face walks through a busy market (at 3:30) and buys 12 oranges, 45 apples & 678 plums!
The singer stands on a stage under blue light, holding the microphone, and sings: <S>Hold on, hold on to me.<E>
An astronaut on the moon picks up a stone, looks at the Earth, and breathes heavily inside the helmet.
jitter, bad hands, blur, distortion, robotic, muffled, echo, distorted, low quality, watermark, text, still picture
The old clock in the hall strikes nine; its pendulum swings "left" and 'right' \\ under a dusty glass case.
In slow motion, a white horse gallops along the beach, water splashing high, mane flying, sun low behind it.
"""


def tokenizer_model(corpus: str = CORPUS) -> bytes:
    """A sentencepiece model trained on the corpus, with UMT5's pad 0 and end 1; bytes cover every other character."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.splitlines()), model_writer=model, model_type="bpe", vocab_size=PIECES,
        hard_vocab_limit=False, byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )
    return model.getvalue()


def text_encoder(seed: int, width: int = BUNDLE.text, corpus: str = CORPUS, heads: int = TEXT_HEADS,
                 position_std: float = 0.5) -> Tensors:
    """UMT5 under ComfyUI's names: a relative position table in every layer, gated feed-forward.

    position_std: how far the position table tells tokens apart.
    """
    w = Draws(seed, "umt5", torch.float16)
    inner = heads * TEXT_HEAD_DIM
    w.random("shared.weight", round_up(PIECES, 64), width, std=1.0)
    for index in range(TEXT_LAYERS):
        block = f"encoder.block.{index}"
        attention = f"{block}.layer.0.SelfAttention"
        w.kernel(f"{attention}.q.weight", inner, width, gain=1 / math.sqrt(TEXT_HEAD_DIM))  # T5 has no 1/sqrt(d)
        w.kernel(f"{attention}.k.weight", inner, width)
        w.kernel(f"{attention}.v.weight", inner, width)
        w.kernel(f"{attention}.o.weight", width, inner)
        w.random(f"{attention}.relative_attention_bias.weight", BUCKETS, heads, std=position_std)
        w.random(f"{block}.layer.0.layer_norm.weight", width, mean=1.0, std=0.1)
        w.kernel(f"{block}.layer.1.DenseReluDense.wi_0.weight", TEXT_FFN, width)
        w.kernel(f"{block}.layer.1.DenseReluDense.wi_1.weight", TEXT_FFN, width)
        w.kernel(f"{block}.layer.1.DenseReluDense.wo.weight", width, TEXT_FFN)
        w.random(f"{block}.layer.1.layer_norm.weight", width, mean=1.0, std=0.1)
    w.random("encoder.final_layer_norm.weight", width, mean=1.0, std=0.1)
    w.tensors["spiece_model"] = torch.frombuffer(bytearray(tokenizer_model(corpus)), dtype=torch.uint8)
    return w.tensors
