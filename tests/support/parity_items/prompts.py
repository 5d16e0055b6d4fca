"""Prompt strings: each variant's caption style, cleaning for the tokenizer and for images."""

import json
from collections.abc import Iterator
from pathlib import Path

from ovi_native.ovi_model.ovi import prompt, variants

from . import EXACT, Item


def items(golden: Path) -> Iterator[Item]:
    path = golden / "prompts.json"
    if not path.exists():
        yield Item("prompts", float("inf"), EXACT, f"{path} is missing")
        return
    data = json.loads(path.read_text(encoding="utf-8"))
    entries = data["prompts"]
    for name in data["variants"]:
        style = variants.get_variant(name).caption_style
        yield strings(f"prompts/formatter/{name}", [
            (entry["formatter"][name], prompt.format_for(style, entry["input"])) for entry in entries])
    for key, function in (("clean_text", prompt.clean_text), ("tokenizer_clean", prompt.clean_for_tokenizer)):
        yield strings(f"prompts/{key}", [(entry[key], function(entry["input"])) for entry in entries])
    yield strings("prompts/variants", [(facts, variant_facts(name)) for name, facts in data["variants"].items()])


def variant_facts(name: str) -> dict:
    """The variant's table row under the reference's names."""
    variant = variants.get_variant(name)
    return {
        "path": variant.checkpoint,
        "video_latent_length": variant.latent_frames,
        "audio_latent_length": variants.GEOMETRY.audio_latents_for(variant.latent_frames),
        "video_area": variant.area,
    }


def strings(name: str, pairs: list[tuple]) -> Item:
    """Exact comparison of (expected, found) pairs; the detail shows the first difference. No pairs is a failure."""
    wrong = [pair for pair in pairs if pair[0] != pair[1]]
    if not pairs:
        return Item(name, float("inf"), EXACT, "nothing to compare")
    detail = f"expected {wrong[0][0]!r}, found {wrong[0][1]!r}" if wrong else f"{len(pairs)} equal"
    return Item(name, len(wrong) / len(pairs), EXACT, detail)
