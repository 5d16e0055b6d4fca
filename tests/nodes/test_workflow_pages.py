"""How the shipped workflows look and what they teach."""

from __future__ import annotations

import re

from comfy_cli.layout_quality import score_workflow
from devlib.weights import TINY_FILES
from support.workflow_files import (
    NAMES,
    apart,
    box,
    every,
    every_real,
    every_small,
    group_box,
    jobs,
    members,
    models_of,
    notes,
    read,
    real_nodes,
)


@every
def test_nothing_overlaps(name: str):
    workflow = read(name)
    assert score_workflow(workflow).overlap_area == 0
    groups = [group_box(group) for group in workflow["groups"]]
    assert all(apart(one, other) for i, one in enumerate(groups) for other in groups[:i])


@every
def test_groups_lead_from_left_to_right(name: str):
    workflow = read(name)
    groups = sorted(workflow["groups"], key=lambda group: group["bounding"][0])
    assert [group["title"] for group in groups] == [f"{i} {job}" for i, job in enumerate(jobs(name), 1)]
    grouped = []
    for group in groups:
        here = members(workflow, group)
        taught = [node["title"] for node in here if node["type"] == "MarkdownNote"]
        assert len(taught) == (group["title"] != "1 Models"), f"{group['title']}: 'Start here' explains the models"
        assert len(here) > len(taught)
        grouped += [node["id"] for node in here]
    outside = [node for node in workflow["nodes"] if node["id"] not in grouped]
    assert [node["title"] for node in outside] == ["Start here"] and len(grouped) == len(set(grouped))
    left, top, _, _ = box(outside[0])
    assert left <= groups[0]["bounding"][0] and top <= min(group["bounding"][1] for group in groups), "read this first"


@every
def test_nodes_sit_in_the_group_of_their_job(name: str):
    workflow = read(name)
    for group in workflow["groups"]:
        here = {node["type"] for node in members(workflow, group)}
        belongs = {
            "Models": {"OviModelLoader", "OviTextEncoderLoader", "OviVAELoader"},
            "Clips": {"OviDataset"},
            "Training": {"OviTrainLora"},
            "Prompt": {"OviPrompt"},
            "Size": {"OviEmptyLatent", "OviFirstFrame", "LoadImage"},
            "Sampling": {"OviFast", "OviSampler", "OviGuider", "OviSolver", "OviSchedule", "RandomNoise",
                         "SamplerCustomAdvanced"},
            "Decode": {"OviDecode", "LTXVSeparateAVLatent", "VAEDecode", "VAEDecodeAudio", "CreateVideo", "SaveVideo"},
        }[group["title"].split()[1]]
        assert here <= belongs | {"MarkdownNote"}, group["title"]


@every
def test_notes_teach(name: str):
    texts = notes(read(name))
    assert len(texts) == len(jobs(name)) and all(len(text) > 100 for text in texts.values())
    everything = "\n".join(texts.values())
    assert not re.search(r"</?[A-Za-z]+>", everything), "the note would swallow this as an HTML tag"
    assert "&lt;S&gt;" in texts["Writing a prompt"] and "audio_caption" in texts["Writing a prompt"]
    assert {word for word in re.findall(r"ovi_\w+_av\w*", everything)} <= set(NAMES)


@every_small
def test_tiny_notes_promise_a_toy_world_alone(name: str):
    start = notes(read(name))["Start here"]
    assert "toy world" in start and "knows nothing else" in start and "install_tiny.py" in start


@every_real
def test_real_notes_list_the_files(name: str):
    start = notes(read(name))["Start here"]
    for model in models_of(read(name)):
        assert f"**{model['directory']}**: {model['name']}" in start
    assert "CC-BY-NC 4.0" in start and "non-commercial" in start, "MMAudio's licence stands where its files are named"


@every
def test_notes_name_inputs_and_nodes_that_exist(name: str, object_info):
    ours = [schema for node, schema in object_info.items() if node.startswith("Ovi")]
    known = {key for schema in ours for group in schema["input"].values() for key in group}
    known |= {entry["name"] for node in real_nodes(read(name)) for entry in [*node["inputs"], *node["outputs"]]}
    known |= {*NAMES, *(folder for folder, _ in TINY_FILES.values())}
    for text in notes(read(name)).values():
        assert set(re.findall(r"\*\*([a-z]+_[a-z_]+)\*\*", text)) <= known
        assert set(re.findall(r"'(Ovi [A-Z][A-Za-z ]+)'", text)) <= {schema["display_name"] for schema in ours}
