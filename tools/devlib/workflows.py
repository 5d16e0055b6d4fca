"""Workflow files: UI to API conversion, and the inputs that options and `--tiny` set.

A workflow in API format maps a node id to `{"class_type": ..., "inputs": {...}}`; an input is a value or a link
`[node id, output]`. Inputs that a link feeds, or that a node does not have, are left alone.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .common import DevError
from .weights import TINY

Api = dict[str, Any]
ObjectInfo = Mapping[str, Any]

# Which input of which node takes the file of a role (see weights.TINY).
FILE_INPUTS = {
    "OviModelLoader": {"model_name": "model"},
    "UNETLoader": {"unet_name": "model"},
    "OviTextEncoderLoader": {"text_encoder_name": "text_encoder"},
    "CLIPLoader": {"clip_name": "text_encoder"},
    "VAELoader": {"vae_name": "video_vae"},
    "OviVAELoader": {"video_vae_name": "video_vae", "audio_vae_name": "audio_vae", "vocoder_name": "vocoder"},
    "OviAudioVAELoader": {"vae_name": "audio_vae", "vocoder_name": "vocoder"},
}
# What `--tiny` sets on a node of this type, and what it makes of an input of this name, anywhere, that holds more.
TINY_INPUTS: dict[str, dict[str, Any]] = {
    "OviTextEncoderLoader": {"tokenizer_name": "automatic"},
    "OviEmptyLatent": {"aspect": "custom", "width": 128, "height": 96, "frames": 9},
    "OviFirstFrame": {"resize": "crop"},
}
SMALL = {"width": 128, "height": 96, "seconds": 0.375, "frames": 9, "length": 9, "steps": 2, "batch_size": 1,
         "skip_layer": 1}
# What a browser keeps behind a seed among a node's values; comfy-cli knows the place by these words.
MARK = "value in place "
CONTROLS = ("fixed", "increment", "decrement", "randomize")


def load(path: Path) -> dict[str, Any]:
    """Read a workflow file; raises DevError with a sentence when it is not one."""
    try:
        workflow = json.loads(path.read_text("utf-8"))
    except OSError as failure:
        raise DevError(f"The workflow {path} cannot be read: {failure.strerror}.") from None
    except ValueError as failure:
        raise DevError(f"The workflow {path} is not JSON ({failure}).") from None
    if not isinstance(workflow, dict) or not (is_ui(workflow) or is_api(workflow)):
        raise DevError(f"{path} is JSON but no ComfyUI workflow: save it in ComfyUI with Save or Export (API).")
    return workflow


def is_ui(workflow: Mapping[str, Any]) -> bool:
    """Whether this is the format that ComfyUI's Save writes."""
    return isinstance(workflow.get("nodes"), list) and isinstance(workflow.get("links"), list)


def is_api(workflow: Mapping[str, Any]) -> bool:
    """Whether this is the format that ComfyUI's Export (API) writes."""
    return bool(workflow) and all(isinstance(node, dict) and "class_type" in node for node in workflow.values())


def to_api(workflow: dict[str, Any], object_info: ObjectInfo) -> Api:
    """The API format of a workflow in either format, as the browser would make it.

    Raises DevError naming the node types that the server does not have.
    """
    from comfy_cli.workflow_to_api import WorkflowConversionError, convert_ui_to_api

    if is_api(workflow):
        api = copy.deepcopy(workflow)
    else:
        try:
            api = convert_ui_to_api(copy.deepcopy(workflow), dict(object_info))
        except WorkflowConversionError as failure:
            raise DevError(f"The workflow cannot be converted: {failure}.") from None
    missing = sorted({node["class_type"] for node in api.values()} - set(object_info))
    if missing:
        raise DevError(f"The server has no node {', '.join(missing)}, which the workflow needs.")
    return api


def schema(object_info: ObjectInfo, node_type: str, name: str) -> tuple[Any, dict[str, Any]]:
    """The declaration of an input as (type, options); type "" if the node has no such input."""
    declared = object_info.get(node_type, {}).get("input", {})
    kind, *options = {**declared.get("optional", {}), **declared.get("required", {})}.get(name, ("",))
    return kind, options[0] if options else {}


def options_of(object_info: ObjectInfo, node_type: str, name: str) -> list[str]:
    """The values that a dropdown offers; empty if it is none."""
    kind, options = schema(object_info, node_type, name)
    return kind if isinstance(kind, list) else list(options.get("options", [])) if kind == "COMBO" else []


def offered_files(object_info: ObjectInfo) -> dict[str, list[str]]:
    """For each role the files that the server's loaders of the pack offer."""
    offered: dict[str, list[str]] = {}
    for node_type, inputs in FILE_INPUTS.items():
        for name, role in inputs.items():
            offered[role] = list(dict.fromkeys([*offered.get(role, []), *options_of(object_info, node_type, name)]))
    return offered


def _widgets(api: Api) -> Iterator[tuple[dict[str, Any], str, str]]:
    """All inputs that hold a value: (the node's inputs, name, node type)."""
    for node in api.values():
        for name, value in node["inputs"].items():
            if not isinstance(value, list):
                yield node["inputs"], name, node["class_type"]


def set_files(api: Api, files: Mapping[str, str]) -> Api:
    """A copy of `api` whose loaders name these `files` (role: file name)."""
    api = copy.deepcopy(api)
    for inputs, name, node_type in _widgets(api):
        inputs[name] = files.get(FILE_INPUTS.get(node_type, {}).get(name, ""), inputs[name])
    return api


def set_options(api: Api, options: Mapping[str, Any]) -> Api:
    """A copy of `api` with these inputs (name: value) set on every node that has them.

    Raises DevError for an option that no node of the workflow takes.
    """
    api = copy.deepcopy(api)
    absent = set(options) - {name for _, name, _ in _widgets(api)}
    if absent:
        raise DevError(f"The workflow has no input for the option {', '.join(sorted(absent))}.")
    for inputs, name, _ in _widgets(api):
        inputs[name] = options.get(name, inputs[name])
    return api


def shrink(api: Api, object_info: ObjectInfo) -> Api:
    """A copy of `api` with the tiny models, small sizes, few frames and few steps, so that it runs anywhere."""
    api = set_files(api, TINY)
    for inputs, name, node_type in _widgets(api):
        inputs[name] = TINY_INPUTS.get(node_type, {}).get(name, inputs[name])
        kind, options = schema(object_info, node_type, name)
        if name in SMALL and kind in ("INT", "FLOAT") and inputs[name] > SMALL[name]:
            inputs[name] = max(SMALL[name], options.get("min", SMALL[name]))
    return api


def show_in_ui(workflow: dict[str, Any], api: Api, object_info: ObjectInfo) -> dict[str, Any]:
    """A copy of a UI workflow whose widgets hold the values of `api`, so that a result restores what really ran.

    Which widget holds an input is read off a conversion of marked values. Nodes inside subgraphs keep theirs.
    """
    marked, shown, before = copy.deepcopy(workflow), copy.deepcopy(workflow), to_api(workflow, object_info)
    for node in marked["nodes"]:
        number = str(node["id"])
        if before.get(number) != api.get(number) and isinstance(node.get("widgets_values"), list):
            node["widgets_values"] = [value if value in CONTROLS else f"{MARK}{place}"
                                      for place, value in enumerate(node["widgets_values"])]
    places = to_api(marked, object_info)
    for node in shown["nodes"]:
        number = str(node["id"])
        for name, mark in places.get(number, {"inputs": {}})["inputs"].items():
            if str(mark).startswith(MARK) and number in api:
                node["widgets_values"][int(mark.removeprefix(MARK))] = api[number]["inputs"][name]
    return shown
