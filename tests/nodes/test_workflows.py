"""The shipped workflows: sound as files, valid against the nodes, teaching, and running end to end on tiny models."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfy_cli.link_integrity import broken_link_findings
from devlib import workflows
from devlib.client import Api
from devlib.common import PACK_NAME, ROOT, quiet_env, venv_program
from devlib.graphs import files
from devlib.media import read_media
from devlib.weights import TINY, TINY_FILES, WORLD
from packaging.version import Version
from PIL import Image
from support.workflow_files import (
    FOLDER,
    NAMES,
    SMALL,
    every,
    every_real,
    every_small,
    files_named,
    models_of,
    read,
    real_nodes,
)
from tiny_ovi.clip_files import LESSON
from tiny_ovi.lora import RECIPE

VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)[1]
NOT_STOCK = {"OviModelLoader", "OviTextEncoderLoader", "OviVAELoader", "OviPrompt", "OviEmptyLatent"}

def of_type(api: Api, class_type: str) -> dict[str, Any]:
    """The inputs of the only node of a type."""
    found = [node["inputs"] for node in api.values() if node["class_type"] == class_type]
    assert len(found) == 1, f"{len(found)} nodes of type {class_type}"
    return found[0]


def offering(object_info: dict[str, Any], api: Api) -> dict[str, Any]:
    """The schemas as they are once the workflow's files are in the model folders."""
    info = copy.deepcopy(object_info)
    for node in api.values():
        for name in workflows.FILE_INPUTS.get(node["class_type"], {}):
            options = workflows.options_of(info, node["class_type"], name)
            if node["inputs"][name] not in options:
                options = [*options, node["inputs"][name]]
            info[node["class_type"]]["input"]["required"][name] = ["COMBO", {"options": options}]
    return info


def origin(api: Api, number: str, name: str) -> tuple[str, int]:
    """Type and output of the node that feeds an input."""
    source, output = api[number]["inputs"][name]
    return api[source]["class_type"], output


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_folder_holds_the_promised_workflows_and_their_thumbnails():
    expected = {f"{name}.{ending}" for name in NAMES for ending in ("json", "jpg")}
    assert {path.name for path in FOLDER.iterdir()} == expected


@every
def test_thumbnail(name: str):
    path = FOLDER / f"{name}.jpg"
    assert path.stat().st_size < 60_000
    with Image.open(path) as image:
        assert image.format == "JPEG" and image.mode == "RGB"
        assert 350 <= image.width <= 800 and 1.2 <= image.width / image.height <= 1.8
        pixels = np.asarray(image, dtype=np.float32)
    assert pixels.std() > 10, "the thumbnail is nearly one colour"


@every
def test_the_format_is_the_front_ends_own(name: str):
    workflow = read(name)
    assert workflow["version"] == 0.4
    assert str(uuid.UUID(workflow["id"])) == workflow["id"]
    numbers = [node["id"] for node in workflow["nodes"]]
    links = [link[0] for link in workflow["links"]]
    assert len(set(numbers)) == len(numbers) and max(numbers) <= workflow["last_node_id"]
    assert len(set(links)) == len(links) and max(links) <= workflow["last_link_id"]
    assert {"ds", "frontendVersion"} <= set(workflow["extra"])
    assert len({read(other)["id"] for other in NAMES}) == len(NAMES)


@every
def test_nodes_have_all_their_outputs(name: str, object_info):
    for node in real_nodes(read(name)):
        assert [entry["name"] for entry in node["outputs"]] == list(object_info[node["type"]]["output_name"])


@every
def test_links_fit_together(name: str):
    workflow = read(name)
    assert broken_link_findings(workflow) == ([], [])
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, source, output, target, slot, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == number
        assert {nodes[source]["outputs"][output]["type"], nodes[target]["inputs"][slot]["type"]} == {kind}
    held = {entry["link"] for node in nodes.values() for entry in node["inputs"] if entry["link"] is not None}
    assert held == {link[0] for link in workflow["links"]}


@every
def test_nodes_say_whose_they_are(name: str):
    for node in real_nodes(read(name)):
        ours = node["type"].startswith("Ovi")
        properties = node["properties"]
        assert properties["cnr_id"] == (PACK_NAME if ours else "comfy-core")
        assert Version(properties["ver"]) <= Version(VERSION if ours else "0.30.0")
        assert properties["Node name for S&R"] == node["type"]


# --- models -----------------------------------------------------------------------------------------------------------


@every_real
def test_every_file_can_be_fetched(name: str, object_info, comfy_client):
    workflow = read(name)
    api = workflows.to_api(workflow, object_info)
    folders = comfy_client.request("/models")
    for node in real_nodes(workflow):
        chosen = [api[str(node["id"])]["inputs"][key] for key in workflows.FILE_INPUTS.get(node["type"], {})]
        models = node["properties"].get("models", [])
        assert [model["name"] for model in models] == chosen, f"{node['type']} offers other files than it names"
        for model in models:
            assert re.fullmatch(r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/[\w./-]+", model["url"])
            assert model["url"].rsplit("/", 1)[-1] == model["name"]
            assert model["directory"] in folders
    assert len(models_of(workflow)) == len(TINY)


@every_real
def test_folders_are_where_the_loaders_look(name: str):
    roles = dict(zip(TINY_FILES, (folder for folder, _ in TINY_FILES.values()), strict=True))
    expected = [roles[role] for role in ("model", "text_encoder", "video_vae", "audio_vae", "vocoder")]
    assert [model["directory"] for model in models_of(read(name))] == expected


@every_small
def test_tiny_workflows_name_the_shipped_files(name: str, object_info):
    workflow = read(name)
    assert files_named(workflows.to_api(workflow, object_info)) == WORLD
    assert models_of(workflow) == [], "they come with the pack"


# --- meaning ----------------------------------------------------------------------------------------------------------


@every
def test_every_value_is_one_the_nodes_accept(name: str, object_info):
    api = workflows.to_api(read(name), object_info)
    info = offering(object_info, api)
    for number, node in api.items():
        declared = {**info[node["class_type"]]["input"]["required"],
                    **info[node["class_type"]]["input"].get("optional", {})}
        assert set(node["inputs"]) <= set(declared), f"{node['class_type']} has no such input"
        missing = set(info[node["class_type"]]["input"]["required"]) - set(node["inputs"])
        assert not missing, f"{node['class_type']} lacks {missing}"
        for key, value in node["inputs"].items():
            if isinstance(value, list):
                assert value[0] in api and value[1] < len(info[api[value[0]]["class_type"]]["output"])
                continue
            kind, options = declared[key][0], (declared[key][1] if len(declared[key]) > 1 else {})
            where = f"{node['class_type']} {number}: {key} = {value!r}"
            if kind in ("INT", "FLOAT"):
                assert isinstance(value, int | float) and options["min"] <= value <= options["max"], where
            elif kind == "STRING":
                assert isinstance(value, str), where
            elif kind == "BOOLEAN":
                assert isinstance(value, bool), where
            elif node["class_type"].startswith("Ovi"):  # comfy-cli checks core's other kinds of input
                assert value in workflows.options_of(info, node["class_type"], key), where


@pytest.mark.slow
@every
def test_comfy_cli_validates_it_offline(name: str, object_info, tmp_path: Path):
    schemas = tmp_path / "object_info.json"
    schemas.write_text(json.dumps(offering(object_info, workflows.to_api(read(name), object_info))), "utf-8")
    command = [venv_comfy(), "--json", "workflow", "validate", "--workflow", FOLDER / f"{name}.json", "--input",
               schemas]
    finished = subprocess.run(command, capture_output=True, text=True, env=quiet_env(), cwd=tmp_path)
    answer = json.loads(finished.stdout)
    assert finished.returncode == 0 and answer["data"]["valid"], answer
    assert answer["data"]["warnings"] == []


def venv_comfy() -> Path:
    """comfy-cli beside the running Python, else the project's own."""
    beside = Path(sys.executable).with_name("comfy")
    return beside if beside.exists() else venv_program("comfy")


@every
def test_the_settings_are_the_released_ones(name: str, object_info):
    api = workflows.to_api(read(name), object_info)
    tiny = name in SMALL
    assert of_type(api, "OviModelLoader")["variant"] == "automatic"
    settings: dict[str, Any] = {}
    for node in api.values():
        if node["class_type"] in ("OviSampler", "OviGuider", "OviSchedule"):
            settings |= node["inputs"]
    assert (settings["solver"], settings["shift"], settings["denoise"]) == ("unipc", 5.0, 1.0)
    assert (settings["video_guidance"], settings["audio_guidance"]) == ((2.5, 2.5) if tiny else (4.0, 3.0))
    assert (settings["steps"], settings["skip_layer"]) == ((25, -1) if tiny else (50, 11))
    latent = of_type(api, "OviEmptyLatent")
    assert (latent["seconds"], latent["frames"], latent["batch_size"]) == (0.0, 0, 1)
    size = ("custom", 64, 64) if tiny else ("16:9 wide", 1280, 704)
    assert (latent["aspect"], latent["width"], latent["height"]) == size
    if not tiny:
        assert files_named(api)["model"] == "model_960x960.safetensors"


@every
def test_the_prompt_follows_its_own_advice(name: str, object_info):
    from ovi_native.ovi_model.ovi import prompt
    from ovi_native.ovi_model.ovi.variants import get_variant
    from ovi_native.tiny_world.captions import parse

    inputs = of_type(workflows.to_api(read(name), object_info), "OviPrompt")
    text = prompt.assemble(inputs["scene"], inputs["audio_caption"], get_variant("960x960_5s"))
    assert prompt.check_tags(text) == []
    assert inputs["audio_caption"] and inputs["video_negative"] and inputs["audio_negative"]
    if name in SMALL:
        asked = parse(text)
        assert all((asked.ball, asked.place, asked.speed, asked.timbre)), "all of it is in the toy world's words"
    else:
        assert "<S>" in inputs["scene"] and 60 < len(text.split()) < 300


@every
def test_the_graph_is_the_one_its_name_promises(name: str, object_info):
    api = workflows.to_api(read(name), object_info)
    by_type = {node["class_type"]: number for number, node in api.items()}
    sampler = by_type.get("OviSampler") or by_type["SamplerCustomAdvanced"]
    latent = "latent" if "OviSampler" in by_type else "latent_image"
    begins = "OviFirstFrame" if "image" in name else "OviEmptyLatent"
    assert origin(api, sampler, latent) == (begins, 0)
    assert ("LoadImage" in by_type) == ("image" in name)
    if "image" in name:
        first = by_type["OviFirstFrame"]
        assert origin(api, first, "image") == ("LoadImage", 0) and origin(api, first, "latent")[0] == "OviEmptyLatent"
        picture = "ovi_tiny_world.png" if name in SMALL else "example.png"  # the one that every ComfyUI has
        assert of_type(api, "LoadImage")["image"] == picture
        assert of_type(api, "OviFirstFrame")["resize"] == ("crop" if name in SMALL else "reference")
    guided = by_type.get("OviGuider", sampler)
    assert origin(api, guided, "positive") == ("OviPrompt", 0) and origin(api, guided, "negative") == ("OviPrompt", 1)
    assert origin(api, by_type["SaveVideo"], "video") == ("CreateVideo", 0)
    fps = ("OviDecode", 2) if "OviDecode" in by_type else ("OviEmptyLatent", 4)
    assert origin(api, by_type["CreateVideo"], "fps") == fps, "ComfyUI's own default is 30"


@every
def test_the_model_decides_the_variant_everywhere(name: str, object_info):
    api = workflows.to_api(read(name), object_info)
    users = [number for number, node in api.items() if node["class_type"] in ("OviPrompt", "OviEmptyLatent",
                                                                             "OviFirstFrame", "OviDataset")]
    assert len(users) == (3 if "image" in name or "train" in name else 2)
    assert {origin(api, number, "variant") for number in users} == {("OviModelLoader", 1)}


def test_the_custom_sampler_workflow_uses_stock_nodes(object_info):
    api = workflows.to_api(read("ovi_text_to_av_custom_sampler"), object_info)
    by_type = {node["class_type"]: number for number, node in api.items()}
    assert {kind for kind in by_type if kind.startswith("Ovi")} == NOT_STOCK | {
        "OviGuider", "OviSolver", "OviSchedule"}
    feeds = {name: origin(api, by_type["SamplerCustomAdvanced"], name)[0]
             for name in ("noise", "guider", "sampler", "sigmas")}
    assert feeds == {"noise": "RandomNoise", "guider": "OviGuider", "sampler": "OviSolver", "sigmas": "OviSchedule"}
    assert origin(api, by_type["LTXVSeparateAVLatent"], "av_latent") == ("SamplerCustomAdvanced", 0)
    assert origin(api, by_type["VAEDecode"], "samples") == ("LTXVSeparateAVLatent", 0)
    assert origin(api, by_type["VAEDecodeAudio"], "samples") == ("LTXVSeparateAVLatent", 1)
    assert of_type(api, "OviSolver")["solver"] == of_type(api, "OviSchedule")["solver"]


def test_the_fast_workflow_is_the_plain_one_with_one_node_more(object_info):
    fast, plain = (workflows.to_api(read(name), object_info) for name in ("ovi_fast", "ovi_text_to_av"))
    by_type = {node["class_type"]: number for number, node in fast.items()}
    assert origin(fast, by_type["OviSampler"], "model") == ("OviFast", 0)
    assert origin(fast, by_type["OviFast"], "model") == ("OviModelLoader", 0)
    by_type = {node["class_type"]: number for number, node in plain.items()}
    assert {node["class_type"] for node in fast.values()} - set(by_type) == {"OviFast"}
    for node in fast.values():
        if node["class_type"] != "OviFast":
            values = plain[by_type[node["class_type"]]]["inputs"]
            assert {name: value for name, value in node["inputs"].items() if not isinstance(value, list)} == {
                name: value for name, value in values.items() if not isinstance(value, list)}


def test_the_training_workflow_samples_with_what_it_trains(object_info):
    api = workflows.to_api(read("ovi_train_lora_tiny"), object_info)
    by_type = {node["class_type"]: number for number, node in api.items()}
    assert origin(api, by_type["OviTrainLora"], "dataset") == ("OviDataset", 0)
    assert origin(api, by_type["OviTrainLora"], "model") == ("OviModelLoader", 0)
    assert origin(api, by_type["OviSampler"], "model") == ("OviTrainLora", 0)
    assert of_type(api, "OviDataset")["folder"] == LESSON, "which install_tiny.py writes"
    assert "purple ball" in of_type(api, "OviPrompt")["scene"]
    assert of_type(api, "OviTrainLora").items() >= RECIPE.items(), "the settings that were found good"


# --- running ----------------------------------------------------------------------------------------------------------


@every
def test_it_runs_to_a_clip_with_sound(name: str, comfy_client, object_info):
    workflow = read(name)
    api = workflows.shrink(workflows.to_api(workflow, object_info), object_info)
    run = comfy_client.run(api, workflow)
    assert run.status == "success" and run.of("progress")
    save = next(number for number, node in api.items() if node["class_type"] == "SaveVideo")
    clip = read_media(files(comfy_client, run, save)[0])
    assert clip.codecs == {"video": "h264", "audio": "aac"} and clip.fps == 24
    assert clip.frames.shape == (9, 96, 128, 3) and clip.frames.std() > 1
    assert clip.sound.shape[0] / clip.rate == pytest.approx(9 / 24, abs=0.1) and np.abs(clip.sound).max() > 1e-3
