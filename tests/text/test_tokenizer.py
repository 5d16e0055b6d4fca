"""Tokenizers: hostile and damaged ones are refused in a sentence, where they are opened and where a text is split."""

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from ovi_native.ovi_model.text import umt5
from ovi_native.ovi_model.text.tokenizer import Guarded, JsonPieces, build_tokenizer
from ovi_native.ovi_model.text.tokenizer_files import check_tokenizer
from safetensors.torch import save_file
from support.tokenizer_json import json_tokenizer
from tiny.text_encoder import text_encoder

SHARED = Path(__file__).resolve().parents[3] / "shared" / "repro" / "files"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return text_encoder(0)


@pytest.fixture(scope="module")
def good(weights) -> dict:
    return json.loads(json_tokenizer(weights["spiece_model"].numpy().tobytes()))


def build(content: bytes, kind: str = "tokenizer_json"):
    return build_tokenizer({kind: content}, 768, "umt5.pth")


def panics() -> dict:
    """A part at which the library panics when a text is split, not when it is opened."""
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(
        struct.pack("<I", 1024) + b"\xff\x7f\xff\x7f" * 256 + b"a\0").decode()}


CONVERTED = {"type": "Sequence", "normalizers": [
    {"type": "Strip", "strip_left": False, "strip_right": True},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}]}
GROWING = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10_000}
BACKTRACKING = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
NO_END = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
          "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
          "special_tokens": {}}
MANY_ENDS = {"type": "TemplateProcessing", "special_tokens": {"</s>": {"id": "</s>", "ids": [1] * 10**6,
                                                                       "tokens": ["</s>"] * 10**6}},
             "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}] * 4, "pair": []}
OUTSIDE = {"type": "TemplateProcessing", "special_tokens": {"</s>": {"id": "</s>", "ids": [10**6], "tokens": ["x"]}},
           "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
           "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]}
JSON: dict[str, Callable[[dict], object]] = {
    "another model": lambda good: good | {"model": {"type": "BPE", "vocab": {}, "merges": []}},
    "no model": lambda _: {"version": "1.0"},
    "a list": lambda _: [],
    "a growing text": lambda good: good | {"normalizer": GROWING},
    "a chain of growing texts": lambda good: good | {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 60}},
    "backtracking": lambda good: good | {"normalizer": BACKTRACKING},
    "backtracking in a chain": lambda good: good | {"normalizer": {"type": "Sequence", "normalizers": [BACKTRACKING]}},
    "a regular expression that splits": lambda good: good | {"pre_tokenizer": {
        "type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Removed", "invert": False}},
    "a wrong regular expression": lambda good: good | {"normalizer": BACKTRACKING | {"pattern": {"Regex": "["}}},
    "a deep chain": lambda good: good | {"normalizer": json.loads(
        '{"type":"Sequence","normalizers":[' * 90 + "null" + "]}" * 90)},
    "a long replacement": lambda good: good | {"normalizer": {
        "type": "Precompiled", "precompiled_charsmap": base64.b64encode(
            struct.pack("<I", 1024) + bytes(1024) + b"a" * 10**6 + b"\0").decode()}},
    "no table of replacements": lambda good: good | {"normalizer": {"type": "Precompiled",
                                                                    "precompiled_charsmap": "AAAA"}},
    "a panic": lambda good: good | {"normalizer": panics()},
    "no end token": lambda good: good | {"post_processor": NO_END},
    "many end tokens": lambda good: good | {"post_processor": MANY_ENDS},
    "tokens outside": lambda good: good | {"post_processor": OUTSIDE},
    "no unknown piece": lambda good: good | {"model": good["model"] | {"unk_id": 10**6}},
    "infinite numbers": lambda good: good | {"model": good["model"] | {"vocab": [["a", 1e999]]}},
    "an empty piece": lambda good: good | {"model": good["model"] | {"vocab": [["", 0.0]] * 768}},
    "a long piece": lambda good: good | {"model": good["model"] | {"vocab": [["a" * 10**5, 0.0]] * 768}},
    "many added tokens": lambda good: good | {"added_tokens": good["added_tokens"] * 10_000},
    "an added token far away": lambda good: good | {"added_tokens": [*good["added_tokens"], {
        **good["added_tokens"][0], "id": 2**31, "content": "far"}] * 2000},
    "a strange part": lambda good: good | {"model": good["model"] | {"dropout": 0.5}},
}


@pytest.mark.parametrize("what", JSON)
def test_hostile_json(good, what):
    with pytest.raises(RuntimeError, match=r"(?s)^The tokenizer (for umt5\.pth cannot be read|has ).*google/umt5-xxl"):
        build(json.dumps(JSON[what](good)).encode())


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 10**6, b'{"version":"1.0","model":{"type":"BPE"}}', b"\xff" * 99,
                                     b'{"a":' * 10**5, b"9" * 10**6, b"[" + b"[]," * 3_000_000 + b"[]]"])
@pytest.mark.parametrize("kind", ["tokenizer_json", "spiece_model"])
def test_junk(content, kind):
    with pytest.raises(RuntimeError, match=r"umt5\.pth cannot be read .*google/umt5-xxl again"):
        build(content, kind)


@pytest.mark.parametrize("name", ["tokenizer_29.json", "tokenizer_562.json", "tokenizer_739.json"])
def test_files_that_once_stopped_the_worker(name):
    if not (SHARED / name).is_file():
        pytest.skip("a file that is kept elsewhere; its equivalent is made here")
    with pytest.raises(RuntimeError, match=r"umt5\.pth cannot be read .*google/umt5-xxl again"):
        build((SHARED / name).read_bytes())


def test_a_panic_of_the_library_is_an_error(good, monkeypatch):
    """Where a text is split too: the check of the file is taken away, and the texts tried when it is opened."""
    monkeypatch.setattr("ovi_native.ovi_model.text.tokenizer.TRIALS", ())
    pieces = JsonPieces(json.dumps(good | {"normalizer": panics()}).encode())
    with pytest.raises(BaseException) as caught:
        pieces.tokenizer.encode("a text")
    assert not isinstance(caught.value, Exception), "the library no longer panics here: find another way"
    with pytest.raises(RuntimeError, match="fails when a text is split"):
        pieces("a text")


def test_guarded_lets_the_user_stop():
    for kind in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(kind), Guarded("x"):
            raise kind


@pytest.mark.parametrize("normalizer", [None, CONVERTED, {"type": "Sequence", "normalizers": []}, {
    "type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}])
@pytest.mark.parametrize("splits", [False, True])
def test_converted_tokenizers_are_taken(good, normalizer, splits):
    """What transformers makes of T5's sentencepiece models, in its older and newer forms."""
    metaspace = good["pre_tokenizer"]
    words = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]}
    older = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    content = good | {"normalizer": normalizer, "pre_tokenizer": words if splits else metaspace, "decoder": older,
                      "truncation": None}
    content["model"] = {name: value for name, value in content["model"].items() if splits or name != "byte_fallback"}
    assert build(json.dumps(content, indent=2).encode()).tokenize_with_weights("a dog", disable_weights=True)
    again = tokenizers.Tokenizer.from_str(json.dumps(content)).to_str(pretty=True)  # as the library writes it today
    assert build(again.encode())


def test_a_full_size_vocabulary_is_taken(good):
    pieces = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], *([f"piece{i}", -float(i)] for i in range(256_297))]
    content = json.dumps(good | {"model": good["model"] | {"vocab": pieces, "byte_fallback": False}}, indent=2)
    check_tokenizer("tokenizer_json", content.encode())


# --- sentencepiece ----------------------------------------------------------------------------------------------------


def field(number: int, content: bytes) -> bytes:
    length = len(content)
    size = bytes([length & 127 | 128, length >> 7 & 127 | 128, length >> 14 & 127 | 128, length >> 21])
    return bytes([number << 3 | 2]) + size + content


@pytest.mark.parametrize("more", [
    field(1, b"") * 400_000, field(1, b"\x0a\xff\x01" + b"a" * 10**5), field(3, bytes(5 << 20)),
    field(3, field(2, struct.pack("<I", 1024) + bytes(1024) + b"a" * 10**6 + b"\0")), field(4, bytes(5 << 20)),
    b"\x0f", field(1, b"\x0a\x01a")[:-1]])
def test_hostile_sentencepiece(weights, more):
    with pytest.raises(RuntimeError, match=r"umt5\.pth cannot be read .*google/umt5-xxl again"):
        build(weights["spiece_model"].numpy().tobytes() + more, "spiece_model")


# --- sizes and places -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model", "models_t5.pth"])
def test_only_what_can_be_a_tokenizer_is_read(weights, tmp_path, name):
    without = {key: value for key, value in weights.items() if key != "spiece_model"}
    save_file(without, tmp_path / "umt5.safetensors")
    (tmp_path / "given").mkdir()
    with (tmp_path / "given" / name).open("wb") as file:
        file.truncate(11 << 30)  # takes no room on the disk
    with pytest.raises(RuntimeError, match=rf"{name} \(\d+\.\d GB\) is no tokenizer"):
        umt5.load_text_encoder(str(tmp_path / "umt5.safetensors"), str(tmp_path / "given" / name))
    save_file(without | {"tokenizer_json": torch.zeros(65 << 20, dtype=torch.uint8)}, tmp_path / "large.safetensors")
    with pytest.raises(RuntimeError, match=r"large\.safetensors has a tokenizer of 68\.2 MB inside"):
        umt5.load_text_encoder(str(tmp_path / "large.safetensors"))


def test_half_a_character_is_refused(weights, tmp_path):
    save_file(weights, tmp_path / "umt5.safetensors")
    clip = umt5.load_text_encoder(str(tmp_path / "umt5.safetensors"))
    with pytest.raises(ValueError, match="half of a character"):
        umt5.tokenize(clip, "a \ud83e fox")
