"""What a tokenizer file may contain: what UMT5's contain, and nothing else.

The libraries that read them are made for any tokenizer: a regular expression, a chain of replacements or a table of
texts can take time and memory without end, and some values stop the `tokenizers` library with a panic. So the contents
are checked before the libraries see them: the parts by name, the sizes by what google/umt5-xxl has (256,300 pieces of
at most 48 bytes; its tokenizer.json has 16.8 MB, its spiece.model 4.5 MB).
"""

import base64
import math
from collections.abc import Iterator

from ..files.disk import human
from ..files.strict_json import parse_json

LARGEST_TOKENIZER = 64 << 20  # bytes
MOST_PIECES = 300_000
LONGEST_PIECE = 256  # characters, or bytes with its number in a sentencepiece model
LARGEST_REST = 4 << 20  # bytes of a sentencepiece model beside its pieces
LONGEST_REPLACEMENT = 128  # bytes; the longest of Unicode's has 33
MOST_PARTS = 2_000_000  # values in a tokenizer.json
MOST_STEPS = 8  # of a chain
MOST_ADDED = 2000  # tokens
SPACES = (" {2,}", r"\s+", " +")  # the regular expressions that converted sentencepiece models have

# The kinds of parts, and the fields of each beside "type".
CHAINS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
METASPACE = {"replacement", "prepend_scheme", "split", "add_prefix_space", "str_rep"}
PARTS: dict[str, dict[str, set[str]]] = {
    "normalizer": {"Precompiled": {"precompiled_charsmap"}, "Replace": {"pattern", "content"},
                   "Strip": {"strip_left", "strip_right"}, "Prepend": {"prepend"}, "Nmt": set(), "NFC": set(),
                   "NFD": set(), "NFKC": set(), "NFKD": set()},
    "pre_tokenizer": {"Metaspace": METASPACE, "WhitespaceSplit": set()},
    "post_processor": {"TemplateProcessing": {"single", "pair", "special_tokens"}},
    "decoder": {"Metaspace": METASPACE, "ByteFallback": set(), "Fuse": set(), "Replace": {"pattern", "content"},
                "Strip": {"content", "start", "stop"}},
}
FIELDS = {"version", "truncation", "padding", "added_tokens", "model", *PARTS}


def check_tokenizer(kind: str, data: bytes) -> None:
    """Raise ValueError unless a tokenizer (`spiece_model` or `tokenizer_json`) holds what UMT5's hold, in its size."""
    if len(data) > LARGEST_TOKENIZER:
        raise ValueError(f"it has {human(len(data))}, UMT5's has 17 MB")
    check_json(data) if kind == "tokenizer_json" else check_sentencepiece(data)


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


def check_json(data: bytes) -> None:
    """Raise ValueError, or RecursionError, unless this is a Unigram tokenizer made of the parts above."""
    content = parse_json(data, MOST_PARTS)
    if not isinstance(content, dict):
        raise ValueError("it is no table of parts")
    _only(content, FIELDS, "it")
    for place in PARTS:
        _check_part(content.get(place), place)
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > MOST_ADDED:
        raise ValueError("its list of added tokens is too long, or none")
    for token in added:
        if not isinstance(token, dict) or not _short(token.get("content"), LONGEST_PIECE):
            raise ValueError("an added token is no text, or too long")
    _check_model(content.get("model"))


def _check_model(model: object) -> None:
    if not isinstance(model, dict) or model.get("type") != "Unigram":
        kind = model.get("type") if isinstance(model, dict) else None
        raise ValueError(f"its model is {str(kind)[:20]!r} instead of 'Unigram'")
    _only(model, {"type", "unk_id", "vocab", "byte_fallback"}, "its model")
    pieces = model.get("vocab")
    if not isinstance(pieces, list) or not 1 <= len(pieces) <= MOST_PIECES:
        raise ValueError("its vocabulary is too long, or none")
    for piece in pieces:
        if not isinstance(piece, list) or len(piece) != 2 or not _short(piece[0], LONGEST_PIECE):
            raise ValueError("a piece of its vocabulary is no text, or too long")
        if not isinstance(piece[1], float) or not math.isfinite(piece[1]):
            raise ValueError("a piece of its vocabulary has no number")
    unknown = model.get("unk_id")
    if unknown is not None and not (isinstance(unknown, float) and 0 <= unknown < len(pieces)):
        raise ValueError("its piece for unknown text is none of its vocabulary")


def _check_part(part: object, place: str, nested: bool = False) -> None:
    if part is None:
        return
    if not isinstance(part, dict):
        raise ValueError(f"its {place} is no table")
    kind, chain = part.get("type"), CHAINS.get(place)
    if kind == "Sequence" and chain and not nested:
        steps = part.get(chain)
        _only(part, {"type", chain}, f"its {place}")
        if not isinstance(steps, list) or len(steps) > MOST_STEPS:
            raise ValueError(f"its {place} has too many steps, or none")
        for step in steps:
            _check_part(step, place, nested=True)
    elif not isinstance(kind, str) or kind not in PARTS[place]:
        raise ValueError(f"its {place} is {str(kind)[:20]!r}, which UMT5's is not")
    else:
        _only(part, {"type", *PARTS[place][kind]}, f"its {place}")
        for name, value in part.items():
            _check_field(name, value, place)


def _check_field(name: str, value: object, place: str) -> None:
    """Raise ValueError unless a setting of a part is one that cannot make a text grow, or time."""
    match name, value:
        case "precompiled_charsmap", str():
            check_replacements(base64.b64decode(value, validate=True))
        case "pattern", {"Regex": expression, **more} if not more:
            known = expression in SPACES
        case "pattern", {"String": text, **more} if not more:
            known = _short(text, 4)
        case "content" | "replacement" | "prepend" | "str_rep", str():  # one character for one or more
            known = len(value) <= 1
        case "single" | "pair", list():
            known = len(value) <= 4 and all(isinstance(item, dict) for item in value)
        case "special_tokens", dict():
            known = len(value) <= 4 and all(isinstance(item, dict) and all(
                not isinstance(field, list) or len(field) == 1 for field in item.values()) for item in value.values())
        case _:
            known = value is None or isinstance(value, bool) or (isinstance(value, float) and 0 <= value <= 8) or (
                _short(value, 20) and name in ("type", "prepend_scheme"))
    if name != "precompiled_charsmap" and not known:
        raise ValueError(f"the {name} of its {place} is not one of UMT5's")


def _short(text: object, longest: int) -> bool:
    return isinstance(text, str) and 1 <= len(text) <= longest


def _only(table: dict, names: set[str], what: str) -> None:
    strange = next((name for name in table if name not in names), None)
    if strange is not None:
        raise ValueError(f"{what} has {strange[:30]!r}, which UMT5's has not")


def check_replacements(table: bytes) -> None:
    """Raise ValueError if a sentencepiece table of replacements (a tree, then texts that end in 0) has a long text."""
    tree = int.from_bytes(table[:4], "little")
    texts = table[4 + tree:]
    if table and (tree > len(table) - 4 or max(map(len, texts.split(b"\0"))) > LONGEST_REPLACEMENT):
        raise ValueError("its table of replacements is damaged")


# --- sentencepiece ----------------------------------------------------------------------------------------------------


def check_sentencepiece(data: bytes) -> None:
    """Raise ValueError if a sentencepiece model has more pieces, longer ones, or more beside them than UMT5's."""
    pieces = rest = 0
    for number, value in _fields(data):
        if number == 1:
            pieces += 1
            if pieces > MOST_PIECES or len(value) > LONGEST_PIECE:
                raise ValueError("its vocabulary is too long, or a piece of it")
            continue
        rest += len(value) + 2
        if rest > LARGEST_REST:
            raise ValueError("it has too much beside its vocabulary")
        if number in (3, 5):  # how texts are normalised before, and after
            for inner, table in _fields(value):
                if inner == 2:
                    check_replacements(table)


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of each field of a protobuf message; a number's content is empty."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 2:
            length, at = _varint(data, at)
        elif key & 7 == 0:
            _, at = _varint(data, at)
            length = 0
        elif key & 7 in (1, 5):
            length = 8 if key & 7 == 1 else 4
        else:
            raise ValueError("it is no sentencepiece model")
        if length > len(data) - at:
            raise ValueError("its end is missing")
        yield key >> 3, data[at:at + length] if key & 7 == 2 else b""
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("it is no sentencepiece model")
