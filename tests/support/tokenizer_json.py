"""The tokenizer of the tiny bundle as a `tokenizer.json`."""

import json

import sentencepiece


def json_tokenizer(model: bytes) -> str:
    """A tokenizer.json with the pieces of a sentencepiece model."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = [[pieces.id_to_piece(i), -float(i)] for i in range(pieces.get_piece_size())]
    special = [{"id": i, "content": pieces.id_to_piece(i), "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True} for i in range(3)]
    end = {"id": "</s>", "ids": [1], "tokens": ["</s>"]}
    sequence = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    short = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    decoders = [{"type": "ByteFallback"}, metaspace]
    return json.dumps({
        "version": "1.0", "truncation": short, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": metaspace, "decoder": {"type": "Sequence", "decoders": decoders},
        "post_processor": {"type": "TemplateProcessing", "single": sequence,
                           "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 0}}],
                           "special_tokens": {"</s>": end}},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocabulary, "byte_fallback": True}})
