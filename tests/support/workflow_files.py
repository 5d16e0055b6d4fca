"""The shipped workflows, and what is in them."""

from __future__ import annotations

from typing import Any

from devlib import workflows
from devlib.common import ROOT

FOLDER = ROOT / "workflows"
REAL = ("ovi_text_to_av", "ovi_image_to_av", "ovi_text_to_av_custom_sampler", "ovi_fast")
SMALL = ("ovi_text_to_av_tiny", "ovi_image_to_av_tiny")
NAMES = (*REAL, *SMALL)


def read(name: str) -> dict[str, Any]:
    return workflows.load(FOLDER / f"{name}.json")


def models_of(workflow: dict[str, Any]) -> list[dict[str, str]]:
    return [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]


def apart(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
