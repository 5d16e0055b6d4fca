"""Workflow files: UI to API conversion, and the one table of inputs that options and `--tiny` set.

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
    "OviAudioVAELoader": {"vae_name": "audio_vae", "vocoder_name": "vocoder"},
}
# Which input of which node takes a setting of `demo` (see session.wanted_options).
OPTION_INPUTS = {
    "scene": {"OviPrompt": ("scene",)},
    "audio_caption": {"OviPrompt": ("audio_caption",)},
    "image": {"LoadImage": ("image",)},
    "resize": {"OviFirstFrame": ("resize",)},
    "seconds": {"OviEmptyLatent": ("seconds",)},
    "frames": {"OviEmptyLatent": ("frames",)},
    "aspect": {"OviEmptyLatent": ("aspect",)},
    "width": {"OviEmptyLatent": ("width",)},
    "height": {"OviEmptyLatent": ("height",)},
    "variant": {"OviModelLoader": ("variant",), "OviPrompt": ("variant",), "OviEmptyLatent": ("variant",),
                "OviFirstFrame": ("variant",)},
    "steps": {"OviSampler": ("steps",), "OviSchedule": ("steps",), "BasicScheduler": ("steps",),
              "KSampler": ("steps",)},
    "seed": {"OviSampler": ("seed",), "RandomNoise": ("noise_seed",), "KSampler": ("seed",)},
}
# What `--tiny` sets on a node of this type, and what it makes of an input of this name, anywhere, that holds more.
TINY_INPUTS: dict[str, dict[str, Any]] = {
    "OviTextEncoderLoader": {"tokenizer_name": "automatic"},
    "OviEmptyLatent": {"aspect": "custom", "width": 128, "height": 96, "frames": 9},
    "OviFirstFrame": {"resize": "crop"},
}
SMALL: dict[str, float] = {
    "width": 128, "height": 96, "seconds": 0.375, "frames": 9, "length": 9, "steps": 2, "batch_size": 1,
    "skip_layer": 1,
}


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


def schema(object_info: ObjectInfo, node_type: str, name: str) -> list[Any] | None:
    """The declaration `[type, options]` of an input, or None if the node has no such input."""
    declared = object_info.get(node_type, {}).get("input", {})
    for group in ("required", "optional"):
        if name in declared.get(group, {}):
            return list(declared[group][name])
    return None


def options_of(object_info: ObjectInfo, node_type: str, name: str) -> list[str]:
    """The values that a dropdown offers; empty if it is none."""
    declared = schema(object_info, node_type, name)
    if not declared:
        return []
    if isinstance(declared[0], list):
        return declared[0]
    return list(declared[1].get("options", [])) if declared[0] == "COMBO" and len(declared) > 1 else []


def offered_files(object_info: ObjectInfo) -> dict[str, list[str]]:
    """For each role the files that the server's loaders of the pack offer."""
    offered: dict[str, list[str]] = {}
    for node_type, inputs in FILE_INPUTS.items():
        for name, role in inputs.items():
            offered[role] = list(dict.fromkeys([*offered.get(role, []), *options_of(object_info, node_type, name)]))
    return offered


def _settable(api: Api, node_types: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    for node in api.values():
        for name in node_types.get(node["class_type"], ()):
            if name in node["inputs"] and not isinstance(node["inputs"][name], list):
                yield node["inputs"], name, node["class_type"]


def set_files(api: Api, files: Mapping[str, str]) -> Api:
    """A copy of `api` whose loaders name these `files` (role: file name)."""
    api = copy.deepcopy(api)
    for inputs, name, node_type in _settable(api, FILE_INPUTS):
        role = FILE_INPUTS[node_type][name]
        inputs[name] = files.get(role, inputs[name])
    return api


def set_options(api: Api, options: Mapping[str, Any]) -> Api:
    """A copy of `api` with these options (keys of OPTION_INPUTS) set on every node that has them.

    Raises DevError for an option that no node of the workflow takes.
    """
    api = copy.deepcopy(api)
    for option, value in options.items():
        hits = 0
        for inputs, name, _ in _settable(api, OPTION_INPUTS[option]):
            inputs[name] = value
            hits += 1
        if not hits:
            raise DevError(f"The workflow has no input for the option {option}.")
    return api


def shrink(api: Api, object_info: ObjectInfo) -> Api:
    """A copy of `api` with the tiny models, small sizes, few frames and few steps, so that it runs anywhere."""
    api = set_files(api, TINY)
    for inputs, name, node_type in _settable(api, TINY_INPUTS):
        inputs[name] = TINY_INPUTS[node_type][name]
    for node in api.values():
        for name, small in SMALL.items():
            declared = schema(object_info, node["class_type"], name)
            value = node["inputs"].get(name)
            if declared and declared[0] in ("INT", "FLOAT") and isinstance(value, int | float) and value > small:
                lowest = declared[1].get("min", small) if len(declared) > 1 else small
                node["inputs"][name] = max(small, lowest)
    return api


def show_in_ui(workflow: dict[str, Any], api: Api, object_info: ObjectInfo) -> dict[str, Any]:
    """A copy of a UI workflow whose widgets hold the values of `api`, so that a result restores what really ran.

    Which widget holds an input is found by trying: the one whose change makes exactly the wanted change in the API
    format. Nodes inside subgraphs keep their values.
    """
    shown = copy.deepcopy(workflow)
    before = to_api(shown, object_info)
    for node in shown["nodes"]:
        number = str(node["id"])
        values = node.get("widgets_values")
        if number not in api or number not in before or not isinstance(values, list):
            continue
        for name, wanted in api[number]["inputs"].items():
            if before[number]["inputs"].get(name) == wanted:
                continue
            target = {**before[number]["inputs"], name: wanted}
            for place, old in enumerate(values):
                values[place] = wanted
                after = to_api(shown, object_info)
                if after.get(number, {}).get("inputs") == target:
                    before = after
                    break
                values[place] = old
    return shown
