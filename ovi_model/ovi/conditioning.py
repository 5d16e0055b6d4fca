"""What Ovi reads from a CONDITIONING: a text for each tower, and the block it skips."""

import torch

AUDIO_TEXT_KEY = "ovi_audio_text"
"""Conditioning key: text embedding [1, n, C] for the audio tower, when it is another one."""
TEXT_TOKENS = 512
"""Tokens of text that both towers read, whatever the checkpoint."""
SKIP_LAYER_KEY = "ovi_skip_layer"
"""Conditioning key: index of the block to skip (skip-layer guidance), -1 for none."""


def read_texts(options: dict) -> tuple:
    """The texts (video, audio) of a conditioning as core hands it to a model; None for none."""
    text, audio_text = options.get("cross_attn"), options.get(AUDIO_TEXT_KEY)
    return text, text if audio_text is None else audio_text


def check_text(text, expected: int) -> None:
    """Raise ValueError for what is no text [B, n, expected] of the right encoder."""
    if not torch.is_tensor(text) or text.ndim != 3 or 0 in text.shape:
        found = f"one of shape {list(text.shape)}" if torch.is_tensor(text) else "none"
        raise ValueError("This conditioning holds no text that Ovi can read: expected an "
                         f"embedding [batch, tokens, {expected}], got {found}. Encode the prompt "
                         "with 'Ovi Prompt' and connect it to positive and negative ('Dual Model "
                         "CFG Guider' leaves the text out where no negative is connected).")
    if text.shape[-1] != expected:
        raise ValueError(
            f"The text embedding is {text.shape[-1]} wide, but this Ovi model reads {expected}. "
            "Encode the prompt with the UMT5 text encoder from 'Load Ovi Text Encoder'.")


def lost_tokens(text, audio_text) -> list[str]:
    """A sentence for each text [B, n, C] of a conditioning with more tokens than Ovi reads.

    Waits for the device only where a text is long enough for that.
    """
    texts = {"picture's text": text, "sound's text": audio_text}
    if audio_text is text:
        texts = {"text": text}
    sentences = []
    for name, each in texts.items():
        tokens = int((each != 0).any(dim=-1).sum(dim=1).max()) if each.shape[1] > TEXT_TOKENS else 0
        if tokens > TEXT_TOKENS:
            sentences.append(f"The {name} has {tokens} tokens, as joined prompts may have. Ovi "
                             f"reads {TEXT_TOKENS}: the last {tokens - TEXT_TOKENS} have no "
                             "effect. Shorten the prompts.")
    return sentences


def text_tokens_cut(conditioning: list) -> list[str]:
    """What the texts of a CONDITIONING lose because Ovi reads no more: a sentence each.

    A sampling logs the same as warnings. Entries without a text are left to `check_text`.
    """
    texts = (read_texts({**options, "cross_attn": text}) for text, options in conditioning
             if torch.is_tensor(text))
    return list(dict.fromkeys(sentence for pair in texts for sentence in lost_tokens(*pair)))
