"""The shipped workflows, and what is in them."""

from __future__ import annotations

from typing import Any

import pytest
from devlib import workflows
from devlib.client import Api
from devlib.common import ROOT

FOLDER = ROOT / "workflows"
REAL = ("ovi_text_to_av", "ovi_image_to_av", "ovi_text_to_av_custom_sampler", "ovi_fast")
SMALL = ("ovi_text_to_av_tiny", "ovi_image_to_av_tiny", "ovi_train_lora_tiny")
NAMES = (*REAL, *SMALL)
TITLE_HEIGHT = 30

every = pytest.mark.parametrize("name", NAMES)
every_real = pytest.mark.parametrize("name", REAL)
every_small = pytest.mark.parametrize("name", SMALL)


def jobs(name: str) -> list[str]:
    """The titles of a workflow's groups without their numbers, from left to right."""
    training = ["Clips", "Training"] if "train" in name else []
    size = "Size and first frame" if "image" in name else "Size"
    return ["Models", *training, "Prompt", size, "Sampling", "Decode and save"]


def read(name: str) -> dict[str, Any]:
    return workflows.load(FOLDER / f"{name}.json")


def models_of(workflow: dict[str, Any]) -> list[dict[str, str]]:
    return [model for node in workflow["nodes"] for model in node["properties"].get("models", [])]


def apart(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def real_nodes(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes that run, without the notes."""
    return [node for node in workflow["nodes"] if node["type"] != "MarkdownNote"]


def notes(workflow: dict[str, Any]) -> dict[str, str]:
    return {node["title"]: node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote"}


def box(node: dict[str, Any]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a node with its title."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_HEIGHT, x + width, y + height


def group_box(group: dict[str, Any]) -> tuple[float, float, float, float]:
    x, y, width, height = group["bounding"]
    return x, y, x + width, y + height


def inside(inner: tuple[float, ...], outer: tuple[float, ...]) -> bool:
    return inner[0] >= outer[0] and inner[1] >= outer[1] and inner[2] <= outer[2] and inner[3] <= outer[3]


def members(workflow: dict[str, Any], group: dict[str, Any]) -> list[dict[str, Any]]:
    return [node for node in workflow["nodes"] if inside(box(node), group_box(group))]


def files_named(api: Api) -> dict[str, str]:
    """Role: file, over all loaders of a workflow."""
    return {
        role: node["inputs"][name]
        for node in api.values()
        for name, role in workflows.FILE_INPUTS.get(node["class_type"], {}).items()
    }
