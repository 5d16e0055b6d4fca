"""The test suite's own means, on a real server: client, UI to API conversion, settings and `--tiny`."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
from devlib import weights, workflows
from devlib.client import ComfyClient, ExecutionError, RejectedError
from devlib.common import ROOT, DevError
from devlib.server import ComfyServer
from support.dev_command import run_tool

pytestmark = pytest.mark.slow

SLOW_NODE = """
import time
import comfy.model_management, comfy.utils

class SlowCounter:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"steps": ("INT", {"default": 3})}})
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "test", True

    def run(self, steps):
        bar = comfy.utils.ProgressBar(steps)
        for _ in range(steps):
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(0.02)
            bar.update(1)
        return {"ui": {"counted": [steps]}}

NODE_CLASS_MAPPINGS = {"SlowCounter": SlowCounter}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("base")
    (base / "custom_nodes" / "slow").mkdir(parents=True)
    (base / "custom_nodes" / "slow" / "__init__.py").write_text(SLOW_NODE)
    with ComfyServer(base) as running:
        yield running


@pytest.fixture
def client(server) -> Iterator[ComfyClient]:
    with ComfyClient(server.url) as connected:
        yield connected


def ui_workflow() -> dict:
    """A clip of one colour with silence, in the format that the browser saves."""

    def node(number, kind, values, inputs=(), output=None):
        return {"id": number, "type": kind, "pos": [number * 300, 0], "size": [270, 130], "flags": {}, "order": number,
                "mode": 0, "properties": {}, "widgets_values": values,
                "inputs": [{"name": name, "type": type_, "link": link} for name, type_, link in inputs],
                "outputs": [{"name": output, "type": output, "links": [number]}] if output else []}

    return {
        "last_node_id": 4, "last_link_id": 3, "version": 0.4, "groups": [], "config": {}, "extra": {},
        "nodes": [
            node(1, "EmptyImage", [64, 48, 12, 255], output="IMAGE"),
            node(2, "EmptyAudio", [0.5, 16000, 1], output="AUDIO"),
            node(3, "CreateVideo", [24.0], [("images", "IMAGE", 1), ("audio", "AUDIO", 2)], "VIDEO"),
            node(4, "SaveVideo", ["video/clip", "auto", "auto"], [("video", "VIDEO", 3)]),
        ],
        "links": [[1, 1, 0, 3, 0, "IMAGE"], [2, 2, 0, 3, 1, "AUDIO"], [3, 3, 0, 4, 0, "VIDEO"]],
    }


def test_run_gives_events_and_a_clip_with_both_streams(server, client, tmp_path):
    seen = []
    workflow = ui_workflow()
    api = workflows.to_api(workflow, client.object_info())
    run = client.run(api, workflow, on_event=lambda kind, data: seen.append((kind, data)), timeout=60)
    assert run.status == "success"
    assert [(kind, data) for _, kind, data in run.events] == seen
    assert {data["node"] for data in run.of("executing") if data["node"]} == set(api)
    (output,) = run.outputs
    assert output.node == "4" and output.filename.endswith(".mp4")
    content = client.view(output)
    assert output.path(server.base).read_bytes() == content
    saved = tmp_path / "clip.mp4"
    saved.write_bytes(content)
    with av.open(str(saved)) as clip:
        assert (clip.streams.video[0].frames, len(clip.streams.audio)) == (12, 1)
        assert json.loads(clip.metadata["workflow"]) == workflow
        assert json.loads(clip.metadata["prompt"]) == api


def test_api_workflow_passes_through_unchanged(client):
    api = workflows.to_api(ui_workflow(), client.object_info())
    again = workflows.to_api(api, client.object_info())
    assert again == api and again is not api


def test_values_shown_in_the_ui_are_the_values_that_ran(client):
    info = client.object_info()
    workflow = ui_workflow()
    before = copy.deepcopy(workflow)
    api = workflows.to_api(workflow, info)
    api["1"]["inputs"] |= {"width": 128, "batch_size": 3, "color": 255}
    api["2"]["inputs"]["duration"] = 0.25
    api["4"]["inputs"]["filename_prefix"] = "video/other"
    shown = workflows.show_in_ui(workflow, api, info)
    assert workflows.to_api(shown, info) == api
    assert shown["nodes"][0]["widgets_values"] == [128, 48, 3, 255]
    assert workflow == before


@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_workflows_shrink_and_show_what_ran(client, path):
    info = client.object_info()
    workflow = workflows.load(path)
    small = workflows.shrink(workflows.to_api(workflow, info), info)
    assert workflows.to_api(workflows.show_in_ui(workflow, small, info), info) == small
    files = {name for node in small.values() for name in node["inputs"].values() if str(name).endswith(".safetensors")}
    assert files == set(weights.TINY.values())
    for node in small.values():
        wanted = workflows.TINY_INPUTS.get(node["class_type"], {})
        for name, value in node["inputs"].items():
            assert isinstance(value, list) or wanted.get(name, value) == value
            assert isinstance(value, list) or value is None or value <= workflows.SMALL.get(name, value)


def test_unknown_node_and_broken_files_are_sentences(client, tmp_path):
    with pytest.raises(DevError, match="no node OviNoSuchNode"):
        workflows.to_api({"1": {"class_type": "OviNoSuchNode", "inputs": {}}}, client.object_info())
    path = tmp_path / "workflow.json"
    for content, words in (("{", "not JSON"), ("[]", "no ComfyUI workflow"), ('{"a": 1}', "no ComfyUI workflow")):
        path.write_text(content)
        with pytest.raises(DevError, match=words):
            workflows.load(path)
    with pytest.raises(DevError, match="cannot be read"):
        workflows.load(tmp_path / "absent.json")


def test_refused_workflow_names_node_and_reason(client):
    api = workflows.to_api(ui_workflow(), client.object_info())
    api["1"]["inputs"]["width"] = -5
    with pytest.raises(RejectedError, match=r"EmptyImage \(node 1\): Value -5 smaller than min") as refusal:
        client.queue(api)
    assert refusal.value.errors["1"]["class_type"] == "EmptyImage"


def test_failing_node_is_named_with_its_message(client, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    name = client.upload(broken)
    api = {"1": {"class_type": "LoadImage", "inputs": {"image": name}},
           "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}
    try:
        with pytest.raises(ExecutionError, match=r"LoadImage \(node 1\) failed: ."):
            client.run(api, timeout=30)
    except RejectedError:
        pytest.fail("the upload was not found by LoadImage")


def test_interrupt_ends_a_run_and_the_next_one_works(client):
    started = threading.Event()

    def on_event(kind, _data):
        if kind == "progress" and not started.is_set():
            started.set()
            client.interrupt()

    slow = {"1": {"class_type": "SlowCounter", "inputs": {"steps": 3000}}}
    run = client.run(slow, on_event=on_event, timeout=30)
    assert started.is_set() and run.status == "interrupted"
    assert run.events[-1][0] < 10
    again = client.run({"1": {"class_type": "SlowCounter", "inputs": {"steps": 4}}}, timeout=30)
    assert [data["value"] for data in again.of("progress")][-1] == 4
    assert again.history["outputs"]["1"]["counted"] == [4]


def test_two_clients_get_their_own_events(server, client):
    with ComfyClient(server.url) as other:
        one = client.queue({"1": {"class_type": "SlowCounter", "inputs": {"steps": 5}}})
        two = other.queue({"1": {"class_type": "SlowCounter", "inputs": {"steps": 6}}})
        assert other.wait(two, timeout=30).history["outputs"]["1"]["counted"] == [6]
        assert client.wait(one, timeout=30).history["outputs"]["1"]["counted"] == [5]


def test_run_that_takes_too_long_is_a_sentence(client):
    with pytest.raises(DevError, match="did not finish within 1 s"):
        client.run({"1": {"class_type": "SlowCounter", "inputs": {"steps": 200}}}, timeout=1)
    client.interrupt()


def test_server_that_is_gone_is_a_sentence(tmp_path):
    with ComfyServer(tmp_path) as running, ComfyClient(running.url) as client:
        number = client.queue({"1": {"class_type": "EmptyImage", "inputs": {}}} | workflows.to_api(
            ui_workflow(), client.object_info()))
        running.process.kill()
        with pytest.raises(DevError, match="broke off"):
            client.wait(number, timeout=30)
        running.process.wait()
        with pytest.raises(DevError, match="stopped while running"):
            running.check_alive("while running")
    with pytest.raises(DevError, match="No ComfyUI server answers"):
        ComfyClient(running.url)


def test_tables_name_inputs_that_exist(client):
    info = client.object_info()
    for table in (workflows.FILE_INPUTS, workflows.TINY_INPUTS):
        for node, names in table.items():
            for name in names:
                assert workflows.schema(info, node, name) != ("", {}), f"{node} has no input {name}"


def test_settings_reach_every_node_that_takes_them_and_links_are_kept():
    api = {"1": {"class_type": "OviPrompt", "inputs": {"scene": "a room", "variant": "960x960_10s"}},
           "2": {"class_type": "OviPrompt", "inputs": {"scene": ["9", 0], "variant": "720x720_5s"}}}
    before = copy.deepcopy(api)
    changed = workflows.set_options(api, {"scene": "a street", "variant": "960x960_5s"})
    assert [node["inputs"]["scene"] for node in changed.values()] == ["a street", ["9", 0]]
    assert {node["inputs"]["variant"] for node in changed.values()} == {"960x960_5s"}
    assert api == before
    with pytest.raises(DevError, match="no input for the option image"):
        workflows.set_options(api, {"image": "x.png"})


def test_run_command_with_a_ui_workflow(tmp_path):
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(ui_workflow()))
    result = run_tool("run", str(path), "--tiny")
    assert result.returncode == 0, result.stderr
    clip = Path(result.stdout.strip().splitlines()[-1])
    with av.open(str(clip)) as opened:
        assert json.loads(opened.metadata["workflow"])["nodes"][0]["widgets_values"] == [64, 48, 1, 255]
    clip.unlink()


def test_run_command_without_the_weights_points_at_tiny(tmp_path):
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps({"1": {"class_type": "VAELoader", "inputs": {"vae_name": "absent.safetensors"}},
                                "2": {"class_type": "VAEDecode", "inputs": {"vae": ["1", 0], "samples": ["3", 0]}},
                                "3": {"class_type": "EmptyLatentImage", "inputs": {
                                    "width": 64, "height": 64, "batch_size": 1}},
                                "4": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}}}))
    result = run_tool("run", str(path))
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert "absent.safetensors" in last and last.endswith("or add --tiny.")


def demo(*arguments: str) -> tuple[Path, str]:
    result = run_tool("demo", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return Path(result.stdout.strip().splitlines()[-1]), result.stdout


def embedded_workflow(clip: Path) -> dict:
    with av.open(str(clip)) as opened:
        return json.loads(opened.metadata["workflow"])


def test_demo_ends_with_a_clip_that_restores_the_prompt_it_was_made_from():
    clip, output = demo("--prompt", "A bell rings <S>now<E>", "--steps", "2", "--seconds", "0.5", "--size", "128x96",
                        "--seed", "7", "--model", weights.TINY["model"])
    assert "sampling started" in output
    values = str([node.get("widgets_values") for node in embedded_workflow(clip)["nodes"]])
    assert "A bell rings <S>now<E>" in values
    with av.open(str(clip)) as opened:
        video, audio = opened.streams.video[0], opened.streams.audio[0]
        assert (video.width, video.height, video.frames, audio.rate) == (128, 96, 13, 16000)
        assert video.average_rate == 24
    clip.unlink()


def test_demo_from_an_image(tmp_path):
    from PIL import Image

    image = tmp_path / "first frame.png"
    Image.new("RGB", (200, 150), (200, 40, 40)).save(image)
    clip, _ = demo("--image", str(image), "--steps", "1", "--seconds", "0.2", "--size", "96x64", "--model",
                   weights.TINY["model"])
    assert "first frame.png" in str(embedded_workflow(clip))
    with av.open(str(clip)) as opened:
        assert (opened.streams.video[0].width, opened.streams.video[0].height) == (96, 64)
    clip.unlink()
