"""A file of settings: its sections, what may stand in them, and sentences about what may not."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ovi_native.ovi_model.training.samples import SampleSettings


@dataclass(frozen=True)
class Model:
    """[model]: the checkpoint that is trained, paths relative to the file of settings."""

    file: str
    second_file: str = ""  # the other half of a split model; "" looks beside the first
    weight_dtype: str = "default"  # as in 'Load Ovi Model'
    variant: str = ""  # "" asks the file


@dataclass(frozen=True)
class Data:
    """[data]: the clips, and what encodes them."""

    folder: str
    vae: str
    audio_vae: str
    text_encoder: str
    vocoder: str = ""  # "" if it is in audio_vae
    tokenizer: str = ""  # "" if it is in text_encoder or beside it
    variant: str = "960x960_5s"
    size: int = 0
    longest_seconds: float = 0.0
    caption_prefix: str = ""
    caption_dropout: float = 0.1
    cache: str = ""  # "" keeps it where the node does


@dataclass(frozen=True)
class Lora:
    """[lora]"""

    rank: int = 32
    alpha: float = 32.0
    towers: str = "both"
    layers: tuple[str, ...] = ("self-attention", "text", "fusion", "feed-forward")


@dataclass(frozen=True)
class Full:
    """[full]: in place of [lora]."""

    recipe: str
    fresh_fusion: bool = False


@dataclass(frozen=True)
class Training:
    """[training]"""

    steps: int
    learning_rate: float = 1e-4
    audio_learning_rate: float = 0.0  # 0: the same
    warmup: int = 100
    tail: int = 0
    weight_decay: float = 0.01
    average: float = 0.0
    video_share: float = 0.85
    seed: int = 0
    batch: int = 1
    accumulate: int = 1
    distribution: str = "logit-normal"
    shift: float = 5.0
    video_given: float = 0.0
    audio_given: float = 0.0
    first_frame: float = 0.2
    blocks_without_checkpointing: int = 0  # so many blocks keep their activations: faster, more memory
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    tensorboard: bool = False


@dataclass(frozen=True)
class File:
    """All of it."""

    name: str
    model: Model
    data: Data
    training: Training
    lora: Lora | None = None
    full: Full | None = None
    samples: SampleSettings = field(default_factory=SampleSettings)  # written beside the checkpoints
    output: str = "trained"
    base: Path = field(default=Path(), repr=False)  # the folder of the file, which its paths start from

    def path(self, name: str) -> Path:
        return self.base / Path(name).expanduser()


SECTIONS: dict[str, type] = {"model": Model, "data": Data, "training": Training, "lora": Lora, "full": Full,
                            "samples": SampleSettings}


def read_settings(path: Path) -> File:
    """Read a file of settings. ValueError, naming section and setting, for what is missing, unknown or no such value;
    RuntimeError if there is no such file."""
    try:
        import tomllib  # of Python 3.11
    except ModuleNotFoundError as error:
        raise RuntimeError("Files of settings need Python 3.11 or newer.") from error
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise RuntimeError(f"{path} is not there.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is no TOML: {error}.") from error
    sections = {name: section(kind, table.pop(name), name) for name, kind in SECTIONS.items() if name in table}
    for name in ("model", "data", "training"):
        if name not in sections:
            raise ValueError(f"{path.name} lacks the section [{name}].")
    if ("lora" in sections) == ("full" in sections):
        raise ValueError(f"{path.name} must have one of the sections [lora] and [full].")
    top = checked(File, {**table, **{name: "" for name in sections}}, "", skip=sections)
    return File(**top, **sections, base=path.resolve().parent)


def section(kind: type, table: Any, name: str) -> Any:
    if not isinstance(table, dict):
        raise ValueError(f"[{name}] must be a section, but got {table!r}.")
    return kind(**checked(kind, table, name))


def checked(kind: type, table: dict[str, Any], name: str, skip: Any = ()) -> dict[str, Any]:
    """The values of a section, each of the type that its field has."""
    hints, known = get_type_hints(kind), {each.name: each for each in fields(kind) if each.name != "base"}
    where = f"[{name}] " if name else ""
    out = {}
    for key, value in table.items():
        if key in skip:
            continue
        if key not in known or key in SECTIONS:
            raise ValueError(f"{where}{key} is no setting: expected one of "
                             f"{', '.join(each for each in known if each not in SECTIONS)}.")
        out[key] = as_type(value, hints[key], f"{where}{key}")
    missing = [key for key, each in known.items() if key not in table and key not in SECTIONS
               and each.default is MISSING and each.default_factory is MISSING]
    if missing:
        raise ValueError(f"{where}{missing[0]} is missing.")
    return out


def as_type(value: Any, hint: Any, name: str) -> Any:
    if get_args(hint):  # texts
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return tuple(value)
        raise ValueError(f"{name} must be a list of texts, but got {value!r}.")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        raise ValueError(f"{name} must be {words[hint]}, but got {value!r}.")
    return value
