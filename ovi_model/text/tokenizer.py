"""UMT5's tokenizer: where it is found, and core's class built from it.

It is a sentencepiece model (inside ComfyUI's encoder files, or `spiece.model`) or a `tokenizer.json`. What it may
contain is checked first (`tokenizer_files.py`); the libraries run inside `Guarded`, because a panic of theirs is no
Exception to Python and would end ComfyUI's worker.
"""

import os
from pathlib import Path
from types import TracebackType

import comfy.text_encoders.wan
import folder_paths
import tokenizers
import torch
from comfy.sd1_clip import SDTokenizer

from ..files.disk import human
from ..files.names import first_line, printable
from ..files.reader import UNREADABLE, StateDict, load_weights
from .tokenizer_files import LARGEST_TOKENIZER, check_tokenizer

MAX_TOKENS = 512
END_TOKEN = 1
TEXT_MODEL = "umt5xxl"  # core's name for the encoder, in token dictionaries and in model options
SPARE_ROWS = 1024  # an embedding table may be this much longer than the tokenizer's vocabulary
TRIALS = ("", "a b", " Ünicode ☃ \U0001F98A \t\n\u0378", "<S>Wait here!<E>")

TOKENIZER_FILES = ("spiece.model", "tokenizer.json")
TOKENIZER_ENDINGS = (".model", ".json")
TOKENIZER_FOLDERS = ("", "umt5-xxl", "google/umt5-xxl", "umt5_xxl", "google/umt5_xxl")
AGAIN = "Download spiece.model or tokenizer.json of google/umt5-xxl again."


class Guarded:
    """A `with` block around a call of the `tokenizers` library: whatever stops it becomes a RuntimeError.

    Its errors are plain Exceptions, its panics `pyo3_runtime.PanicException`, a BaseException that no module offers by
    name. What the user does (Ctrl-C, an exit) passes.
    """

    def __init__(self, doing: str) -> None:
        self.doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 _: TracebackType | None) -> None:
        if error is not None and kind is not None and (
                isinstance(error, Exception) or kind.__name__ == "PanicException"):
            raise RuntimeError(f"The tokenizer fails when {self.doing} ({first_line(error)}): its file is damaged. "
                               f"{AGAIN}") from error


class JsonPieces:
    """The `tokenizers` library behind the interface core expects of a tokenizer class.

    Raises RuntimeError with a sentence for the user if the file, or the library at any text, is wrong.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        with Guarded("it is opened"):
            self.tokenizer = tokenizers.Tokenizer.from_buffer(data)
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            self.size = 1 + max(self.tokenizer.get_vocab().values(), default=-1)
        for text in TRIALS:
            self.decode(self(text)["input_ids"])

    @classmethod
    def from_pretrained(cls, data: bytes) -> "JsonPieces":
        """Named as core calls it; takes the contents of tokenizer.json."""
        return cls(data)

    def __call__(self, text: str) -> dict[str, list[int]]:
        with Guarded("a text is split"):
            ids = self.tokenizer.encode(text).ids
        if not ids or ids[-1] >= self.size or min(ids) < 0 or max(ids) >= self.size:
            raise RuntimeError(f"The tokenizer gives no end token, or tokens outside its vocabulary. {AGAIN}")
        return {"input_ids": ids}

    def get_vocab(self) -> dict[str, int]:
        """Piece to number."""
        with Guarded("its vocabulary is read"):
            return self.tokenizer.get_vocab()

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Numbers to text."""
        with Guarded("tokens are made a text again"):
            return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


class JsonUMT5Tokenizer(SDTokenizer):
    """Core's UMT5 tokenizer for a tokenizer.json in place of a sentencepiece model."""

    def __init__(self, embedding_directory: str | None = None, *, tokenizer_data: dict) -> None:
        super().__init__(
            tokenizer_data["tokenizer_json"], embedding_directory=embedding_directory, embedding_key=TEXT_MODEL,
            tokenizer_class=JsonPieces, has_start_token=False, pad_with_end=False, pad_token=0,
            pad_to_max_length=False, max_length=99999999, min_length=MAX_TOKENS, tokenizer_data=tokenizer_data)

    def state_dict(self) -> StateDict:
        """What core saves with the encoder."""
        return {"tokenizer_json": _byte_tensor(self.tokenizer.data)}


def build_tokenizer(data: dict[str, bytes], vocab_size: int, name: str) -> comfy.text_encoders.wan.WanT5Tokenizer:
    """Core's tokenizer from `spiece_model` or `tokenizer_json`, checked against the encoder's vocabulary."""
    kind = next(iter(data))
    tokenizer_data: dict = dict(data)
    if kind == "tokenizer_json":
        tokenizer_data[f"clip_{TEXT_MODEL}_tokenizer_class"] = JsonUMT5Tokenizer
    try:
        check_tokenizer(kind, data[kind])
        tokenizer = comfy.text_encoders.wan.WanT5Tokenizer(tokenizer_data=tokenizer_data)
        inner = getattr(tokenizer, tokenizer.clip)
        pieces = max(inner.inv_vocab) + 1
    except UNREADABLE as error:  # from the check, from sentencepiece, from tokenizers
        raise RuntimeError(f"The tokenizer for {name} cannot be read ({first_line(error)}). {AGAIN}") from error
    if inner.end_token != END_TOKEN or not 0 <= vocab_size - pieces < SPARE_ROWS:
        raise RuntimeError(f"The tokenizer has {pieces} pieces and end token {inner.end_token}, but {name} is for "
                           f"{vocab_size} and {END_TOKEN}: it belongs to another model. Use that of google/umt5-xxl.")
    return tokenizer


# --- where it is ------------------------------------------------------------------------------------------------------


def tokenizer_data(weights: StateDict, path: str, tokenizer_path: str | None) -> dict[str, bytes]:
    """The tokenizer's contents under core's name for its kind; takes an embedded one out of the weights.

    Raises RuntimeError with a sentence for the user if there is none, or what is given can be none.
    """
    inside = _embedded(weights, Path(path))
    if tokenizer_path is None and inside is not None:
        return inside
    given = None if tokenizer_path is None else Path(tokenizer_path)
    if given is not None and given.suffix.lower() in (".safetensors", ".sft"):
        inside = _embedded(load_weights(given)[0], given)
        if inside is None:
            raise RuntimeError(f"{printable(given.name)} has no tokenizer inside; give spiece.model or tokenizer.json "
                               "instead.")
        return inside
    file = _find_tokenizer(Path(path)) if given is None else _tokenizer_file(given)
    if file is None:
        folder = folder_paths.get_folder_paths("text_encoders")[0]
        place = printable(os.path.join(folder, "umt5-xxl") if given is None else given)
        raise RuntimeError(f"{printable(Path(path).name)} needs its tokenizer, which is a separate file, and none was "
                           f"found. Put tokenizer.json or spiece.model of google/umt5-xxl into {place}, or choose "
                           "umt5_xxl_fp16.safetensors of Comfy-Org, which has it inside.")
    return {"tokenizer_json" if file.suffix.lower() == ".json" else "spiece_model": _read(file)}


def _read(file: Path) -> bytes:
    name, size = printable(file.name), file.stat().st_size
    if file.suffix.lower() not in TOKENIZER_ENDINGS or size > LARGEST_TOKENIZER:
        raise RuntimeError(f"{name} ({human(size)}) is no tokenizer: those of UMT5 are spiece.model (4.5 MB) and "
                           "tokenizer.json (17 MB). Choose one of them, or download it from google/umt5-xxl.")
    try:
        return file.read_bytes()
    except OSError as error:
        raise RuntimeError(f"{name} cannot be read ({first_line(error)}). {AGAIN}") from error


def _embedded(weights: StateDict, path: Path) -> dict[str, bytes] | None:
    for kind in ("spiece_model", "tokenizer_json"):
        if kind in weights:
            tensor = weights.pop(kind)
            if tensor.nbytes > LARGEST_TOKENIZER:
                raise RuntimeError(f"{printable(path.name)} has a tokenizer of {human(tensor.nbytes)} inside, "
                                   "UMT5's has 17 MB: the file is damaged. Download it again.")
            return {kind: tensor.reshape(-1).view(torch.uint8).numpy().tobytes()}
    return None


def _find_tokenizer(path: Path) -> Path | None:
    """The tokenizer beside an encoder file, else in the text_encoders folders."""
    own_name = path.with_suffix(".model")
    folders = [path.parent, *map(Path, folder_paths.get_folder_paths("text_encoders"))]
    candidates = [folder / below for folder in folders for below in TOKENIZER_FOLDERS]
    return own_name if own_name.is_file() else next(filter(None, map(_tokenizer_file, candidates)), None)


def _tokenizer_file(place: Path) -> Path | None:
    if place.is_file():
        return place
    return next((place / name for name in TOKENIZER_FILES if (place / name).is_file()), None)


def _byte_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
