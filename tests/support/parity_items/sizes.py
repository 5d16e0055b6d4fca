"""Sizes in pixels: text-to-video snapping, latent size, first-frame sizes, and the area warning."""

import json
from collections.abc import Iterator
from pathlib import Path

from ovi_native.ovi_model.geometry import area_is_off, scale_hw_to_area
from ovi_native.ovi_model.ovi import variants
from ovi_native.ovi_model.ovi.variants import GEOMETRY

from . import EXACT, Item
from .prompts import strings


def items(golden: Path) -> Iterator[Item]:
    path = golden / "sizes.json"
    if not path.exists():
        yield Item("sizes", float("inf"), EXACT, f"{path} is missing")
        return
    entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
    for name in variants.VARIANTS:
        found = [variant_sizes(entry["h"], entry["w"], variants.get_variant(name).area) for entry in entries]
        for key in ("snap_hw", "latent_hw", "t2i_hw", "image_target_hw", "area_warning"):
            yield strings(f"sizes/{name}/{key}", [
                (entry["per_variant"][name][key], sizes[key]) for entry, sizes in zip(entries, found, strict=True)])
    for key, function in (
        ("scale_hw_to_area_divisible_raw", scale_hw_to_area),
        ("snap_no_area", lambda h, w: GEOMETRY.snap_hw(h, w, None)),
        ("image_target_hw_no_area", lambda h, w: GEOMETRY.image_target_hw(h, w, None)),
    ):
        yield strings(f"sizes/{key}", [(entry[key], list(function(entry["h"], entry["w"]))) for entry in entries])


def variant_sizes(height: int, width: int, area: int) -> dict:
    """Everything the reference derives from an input size for one variant, under its names."""
    snapped = GEOMETRY.snap_hw(height, width, area)
    return {
        "snap_hw": list(snapped),
        "latent_hw": list(GEOMETRY.latent_hw(*snapped)),
        "t2i_hw": list(scale_hw_to_area(*snapped)),
        "image_target_hw": list(GEOMETRY.image_target_hw(height, width, area)),
        "area_warning": area_is_off(height, width, area),
    }
