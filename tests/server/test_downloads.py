"""'Ovi Weights' in a real server, and `tools/dev.py weights`: lists, downloads on request only, refuses the rest."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import websocket
from devlib import comfyui, common
from devlib.client import ComfyClient
from devlib.common import ROOT
from devlib.server import ComfyServer
from ovi_native.ovi_model.files import model_folders
from ovi_native.ovi_model.ovi import catalogue
from support.hub_server import HubServer, publish, put_pinned

pytestmark = pytest.mark.slow

RESTRICTED = ("For non-commercial use only (CC-BY-NC-4.0): MMAudio 16 kHz VAE, BigVGAN vocoder. Every clip passes "
              "through them.")
SIZE = 1_280_000  # of each stand-in: more than what passes for a pointer
WAIT_S = 30
NEEDED = catalogue.needed_files("960x960_5s", "bf16")
ALL = [file.id for file in NEEDED]
FREE = [file for file in NEEDED if file.sha256 is None]  # those that a stand-in can stand in for
PROGRAM = """
import sys
sys.path.insert(0, {tools!r})
from devlib import cli, fetch
cli.stop_like_ctrl_c()
try:
    fetch.run(cli.parser().parse_args(["weights", *sys.argv[1:]]))
except KeyboardInterrupt:
    sys.exit(cli.fail("Stopped.", 130))
except cli.DevError as failure:
    sys.exit(cli.fail(str(failure)))
""".format(tools=str(ROOT / "tools"))


@pytest.fixture
def hub():
    with HubServer().running() as server:
        yield server


@pytest.fixture(scope="module")
def server_and_hub(tmp_path_factory):
    """A ComfyUI whose Hub is a local one. Tests empty its folders before they begin."""
    if comfyui.find() is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH or run tools/dev.py setup")
    with HubServer().running() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        base = tmp_path_factory.mktemp("weights")
        with ComfyServer(base, models=base / "models") as server:
            yield server, hub


class Page:
    """What the browser does: requests, and the events of the websocket."""

    def __init__(self, server):
        self.url = server.url
        address = f"{server.url.replace('http', 'ws')}/ws?clientId=weights"
        self.socket = websocket.create_connection(address, timeout=WAIT_S)

    def ask(self, path="", body=None, kind="application/json", **headers):
        """(status, answer); a `body` is posted."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()} | {"Content-Type": kind}
        request = urllib.request.Request(f"{self.url}/ovi-native/weights{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as refusal:
            text = refusal.read().decode()
            return refusal.code, json.loads(text) if text.startswith("{") else {}

    def events(self):
        """The events of a download, up to the one that ends it."""
        seen = []
        while not seen or seen[-1]["state"] == "running":
            message = self.socket.recv()
            if isinstance(message, str) and json.loads(message)["type"] == "ovi-native.weights":
                seen.append(json.loads(message)["data"])
        return seen


@pytest.fixture
def models(server_and_hub):
    """The server's models, emptied."""
    models = server_and_hub[0].base / "models"
    for path in models.rglob("*"):
        if path.is_file():
            path.unlink()
    return models


@pytest.fixture
def local_hub(server_and_hub):
    """The server's hub, emptied."""
    hub = server_and_hub[1]
    for kept in (hub.files, hub.faults, hub.requests):
        kept.clear()
    return hub


@pytest.fixture
def page(server_and_hub, models, local_hub):  # noqa: ARG001
    page = Page(server_and_hub[0])
    yield page
    page.ask("/cancel", {})
    page.socket.close()


# --- the server -------------------------------------------------------------------------------------------------------


def test_list_and_graph_touch_no_network(page, local_hub, models, server_and_hub):
    status, found = page.ask("?variant=960x960_5s&precision=fp8")
    assert status == 200 and found["job"] is None
    assert [file["id"] for file in found["files"]] == found["missing"] == ["model_960x960_5s_fp8", *ALL[1:]]
    assert [file["folder"] for file in found["files"]] == [
        str(models / folder) for folder in ("diffusion_models", "text_encoders", "vae", "vae", "vae")]
    assert set(found["free"]) == {file["folder"] for file in found["files"]}
    assert found["bytes_to_fetch"] == found["missing_size"] > 20e9

    graph = {"1": {"class_type": "OviWeights", "inputs": {"variant": "960x960_5s", "precision": "bf16"}}}
    with ComfyClient(server_and_hub[0].url) as client:
        texts = [client.run(graph).history["outputs"]["1"]["text"][0]]
        for file in NEEDED:
            (models / file.folder / file.name).parent.mkdir(exist_ok=True)
            (models / file.folder / file.name).write_bytes(bytes(SIZE))
        texts.append(client.run(graph).history["outputs"]["1"]["text"][0])  # the same inputs, another list
    assert "⚠ 5 of 5 files are missing" in texts[0]
    assert "✘ Ovi model: model_960x960.safetensors (23.3 GB, Apache-2.0)" in texts[0]
    assert "⚠" not in texts[1] and "✔ Ovi model: model_960x960.safetensors (Apache-2.0)" in texts[1]
    assert all(RESTRICTED in text for text in texts)
    assert local_hub.requests == []


def test_download_reports_and_ends_with_everything_in_place(page, local_hub, models, server_and_hub):
    contents = publish(local_hub, FREE, SIZE, pause_s=0.02) | put_pinned(models, NEEDED, SIZE)
    missing = page.ask()[1]["missing"]
    assert missing == [file.id for file in FREE]
    status, started = page.ask("/download", {"files": missing})
    assert status == 202 and started["job"]["state"] == "running"
    assert page.ask("/download", {"files": missing})[0] == 409
    seen = page.events()
    assert seen[-1]["state"] == "done" and seen[-1]["error"] == ""
    assert [step["all_done"] for step in seen] == sorted(step["all_done"] for step in seen)
    assert len({step["name"] for step in seen}) > 2 and seen[-1]["all_done"] == len(FREE) * SIZE
    assert {path.name: path.read_bytes() for path in models.rglob("*") if path.is_file()} == contents
    found = page.ask()[1]
    assert found["missing"] == [] and all(file["present"] for file in found["files"])
    with ComfyClient(server_and_hub[0].url) as client:
        options = client.object_info()["OviModelLoader"]["input"]["required"]["model_name"]
    assert "model_960x960.safetensors" in json.dumps(options)


def test_pinned_file_that_changed_is_refused(page, local_hub, models):
    publish(local_hub, NEEDED, SIZE)
    page.ask("/download", {"files": ["vocoder", "text_encoder"]})
    end = page.events()[-1]
    assert end["state"] == "failed" and "has another umt5_xxl_fp8_e4m3fn_scaled.safetensors" in end["error"]
    assert "c3355d30191f1f066b26d93fba017ae9809dce6c627dda5f6a66eaa651204f68 was expected" in end["error"]
    assert local_hub.bodies() == [] and not [path for path in models.rglob("*") if path.is_file()]


def test_lists_say_which_hashes_are_the_hubs_own(page, models):
    found = page.ask()[1]
    assert {file["id"] for file in found["files"] if file["pinned"]} == {"text_encoder", "video_vae"}
    assert found["unpinned"].startswith("Checked against the Hub's own hash only") and found["unpinned"].endswith(
        "model_960x960.safetensors, mmaudio_vae_16k_bf16.safetensors, "
        "mmaudio_vocoder_bigvgan_best_netG_bf16.safetensors.")
    for file in FREE:
        (models / file.folder).mkdir(exist_ok=True)
        (models / file.folder / file.name).write_bytes(bytes(SIZE))
    assert page.ask()[1]["unpinned"] == ""


def test_licences_are_told_before_and_after_the_download(page, models):
    licences = ["Apache-2.0"] * 3 + ["CC-BY-NC-4.0"] * 2
    for put in (False, True):
        if put:
            for file in NEEDED:
                (models / file.folder).mkdir(exist_ok=True)
                (models / file.folder / file.name).write_bytes(bytes(SIZE))
        found = page.ask()[1]
        assert [(file["licence"], file["present"]) for file in found["files"]] == [(one, put) for one in licences]
        assert found["restricted"] == RESTRICTED


def test_cancel_of_a_silent_hub(page, local_hub):
    publish(local_hub, FREE[:1], SIZE, stall="hub")
    page.ask("/download", {"files": [FREE[0].id]})
    time.sleep(0.3)
    started = time.monotonic()
    page.ask("/cancel", {})
    assert page.events()[-1]["state"] == "cancelled" and time.monotonic() - started < 2


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_that_are_no_utf8_are_listed(page, models, server_and_hub):
    folder = os.fsencode(models / "vae") + b"/na\xffme\n"
    os.makedirs(folder, exist_ok=True)
    with open(folder + b"/v1-16.pth", "wb") as file:
        file.write(bytes(SIZE))
    try:
        files = {file["id"]: file for file in page.ask()[1]["files"]}
        assert files["audio_vae"]["found"] == ["na\\xffme\\n/v1-16.pth"]
        graph = {"1": {"class_type": "OviWeights", "inputs": {"variant": "960x960_5s", "precision": "fp8"}}}
        with ComfyClient(server_and_hub[0].url) as client:
            for _ in range(2):  # the second finds the worker alive
                text = client.run(graph).history["outputs"]["1"]["text"][0]
        assert "MMAudio 16 kHz VAE: na\\xffme\\n/v1-16.pth" in text
        code, out, err = run_tool("http://127.0.0.1:9", "--models", str(models))
        assert code == 0 and "na\\xffme\\n/v1-16.pth" in out and not err
    finally:
        os.unlink(folder + b"/v1-16.pth")
        os.rmdir(folder)


def test_cancel_and_go_on(page, local_hub, models):
    faults = publish(local_hub, NEEDED[:1], 4 * SIZE, pause_s=0.02) and list(local_hub.faults.values())
    page.ask("/download", {"files": ALL[:1]})
    while not page.ask()[1]["files"][0]["partial"]:
        time.sleep(0.05)
    assert page.ask("/cancel", {})[0] == 200
    assert page.events()[-1]["state"] == "cancelled"
    partial = page.ask()[1]["files"][0]["partial"]
    assert 0 < partial < 4 * SIZE and not (models / "diffusion_models" / NEEDED[0].name).exists()
    faults[0].pause_s = 0.0
    local_hub.requests.clear()
    page.ask("/download", {"files": ALL[:1]})
    assert page.events()[-1]["state"] == "done"
    assert [request.range for request in local_hub.bodies()] == [f"bytes={partial}-"]


def test_failure_is_told_in_a_sentence_and_ends_the_job(page, local_hub):
    page.ask("/download", {"files": ["vocoder"]})  # the hub has nothing
    end = page.events()[-1]
    assert end["state"] == "failed" and end["error"].endswith(".") and "(404)" in end["error"]
    assert page.ask()[1]["job"] == end
    publish(local_hub, [catalogue.FILES["vocoder"]], SIZE)
    assert page.ask("/download", {"files": ["vocoder"]})[0] == 202
    assert page.events()[-1]["state"] == "done"


@pytest.mark.parametrize("body", [
    {"files": ["../../etc/passwd"]}, {"files": ["https://example.com/x.safetensors"]}, {"files": ["vocoder", "x"]},
    {"files": []}, {"files": "vocoder"}, {"files": [1]}, {"files": [["vocoder"]]}, ["vocoder"], {}, None, b"{", b"\xff",
    {"url": "http://127.0.0.1/x", "path": "/tmp/x"}, b"", b"[" * 60_000, b'{"files":' * 900 + b"1" + b"}" * 900,
    b"9" * 5000, b'{"files": ["\\ud800"]}', b'{"files": ["' + b"x" * 60_000 + b'"]}', b"\xef\xbb\xbf{}", b"NaN",
], ids=lambda body: str(body)[:40])
def test_only_ids_of_the_table_are_taken(page, local_hub, models, body):
    status, answer = page.ask("/download", b"null" if body is None else body)
    assert status == 400 and answer["error"].endswith(".") and len(answer["error"]) < 300
    assert page.ask()[1]["job"] is None or page.ask()[1]["job"]["state"] != "running"
    assert local_hub.requests == [] and not [path for path in models.rglob("*") if path.is_file()]


@pytest.mark.parametrize("body, headers, status, words", [
    (b"{}", {"kind": "application/json; charset=klingon"}, 415, "in UTF-8, not in 'klingon'"),
    (b"{}", {"kind": "application/json; charset=utf-16"}, 415, "not in 'utf-16'"),
    (b"{}", {"kind": "application/json; charset=" + "x" * 3000}, 415, "Send JSON in UTF-8"),
    (b"{}", {"kind": "application/json; charset=\xff"}, 415, "Send JSON in UTF-8"),
    (b"{}", {"Content_Encoding": "gzip"}, 415, "not compressed"),
    (b" " * 70_000 + b"{}", {}, 413, "at most 65536 bytes"),
    (b"[" * 10_000_000, {}, 413, "too long"),
    (b"[" * 60_000, {"kind": "application/json; charset=UTF8"}, 400, "nested too deeply"),
], ids=lambda value: str(value)[:40])
def test_odd_bodies_are_refused_in_words(page, local_hub, body, headers, status, words):
    found, answer = page.ask("/download", body, **headers)
    assert (found, words in answer["error"]) == (status, True), answer
    assert local_hub.requests == [] and page.ask()[0] == 200


def test_cancel_stops_whatever_its_body_says(page):
    for body in (b"", b"[" * 60_000, b"\xff"):
        assert page.ask("/cancel", body)[0] == 200
        assert page.ask("/cancel", body, kind="application/json; charset=klingon")[0] == 200


@pytest.mark.parametrize("path", ["/download", "/cancel"])
@pytest.mark.parametrize("headers, status", [
    ({"Origin": "http://evil.example"}, 403), ({"Sec_Fetch_Site": "cross-site"}, 403),
    ({"kind": "text/plain"}, 415), ({"kind": "application/x-www-form-urlencoded"}, 415),
], ids=str)
def test_other_sites_cannot_start_or_stop_a_download(page, local_hub, path, headers, status):
    assert page.ask(path, {"files": ["vocoder"]}, **headers)[0] == status
    assert local_hub.requests == []


def test_get_starts_nothing(page, local_hub):
    for path in ("/download", "/cancel", "/download?files=vocoder"):
        assert page.ask(path)[0] in (404, 405)
    assert local_hub.requests == []


@pytest.mark.parametrize("query", ["?variant=../x", "?variant=", "?precision=fp4", "?variant=%ff", "?variant=%00",
                                   "?variant=" + "x" * 7000, "?precision=%ed%a0%80", "?variant=4k&variant=960x960_5s"])
def test_unknown_lists_are_refused(page, query):
    status, answer = page.ask(query)
    assert status == 400 and "xpected one of" in answer["error"] and len(answer["error"]) < 400


# --- the command ------------------------------------------------------------------------------------------------------


def start_tool(hub_url, *arguments):
    env = common.clean_env(HF_ENDPOINT=hub_url)
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=env)


def run_tool(hub_url, *arguments):
    process = start_tool(hub_url, *arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_command_lists_and_downloads(hub, tmp_path):
    code, out, _ = run_tool(hub.url, "--models", str(tmp_path / "models"))
    assert code == 0 and "5 of 5 files are missing, 32.0 GB. Add --download" in out and hub.requests == []
    assert "Checked against the Hub's own hash only" in out
    assert "mmaudio_vae_16k_bf16.safetensors (326 MB, CC-BY-NC-4.0) from Kijai" in out and RESTRICTED in out
    contents = publish(hub, FREE, SIZE) | put_pinned(tmp_path / "models", NEEDED, SIZE)
    code, out, _ = run_tool(hub.url, "--models", str(tmp_path / "models"), "--download")
    assert code == 0 and out.endswith("All files are there.\n")
    assert f"model_960x960.safetensors goes to {tmp_path / 'models' / 'diffusion_models'}" in out
    assert {path.name: path.read_bytes() for path in (tmp_path / "models").rglob("*") if path.is_file()} == contents
    hub.requests.clear()
    code, out, _ = run_tool(hub.url, "--models", str(tmp_path / "models"), "--download")
    assert code == 0 and "All files are there." in out and hub.requests == []


def test_command_is_stopped_and_goes_on(hub, tmp_path):
    publish(hub, FREE, 4 * SIZE, pause_s=0.02)
    put_pinned(tmp_path, NEEDED, SIZE)
    arguments = ("--models", str(tmp_path), "--download")
    process = start_tool(hub.url, *arguments)
    deadline = time.monotonic() + WAIT_S
    while not model_folders.partial_bytes(tmp_path / "diffusion_models" / NEEDED[0].name):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130 and err.strip() == "Stopped."
    for fault in hub.faults.values():
        fault.pause_s = 0.0
    hub.requests.clear()
    assert run_tool(hub.url, *arguments)[0] == 0
    assert hub.bodies()[0].range != "bytes=0-"


@pytest.mark.parametrize("arguments, words", [
    (("--variant", "4k"), ["Unknown Ovi variant '4k'", "960x960_10s"]),
    (("--precision", "fp4"), ["Unknown precision 'fp4'"]),
    (("--download",), ["has no model_960x960.safetensors in chetwinlow1/Ovi (404)", "run the same command again"]),
])
def test_command_refuses_in_one_line(hub, tmp_path, arguments, words):
    code, _, err = run_tool(hub.url, "--models", str(tmp_path), *arguments)
    assert code == 1 and len(err.strip().splitlines()) == 1 and all(word in err for word in words), err


def test_command_wants_a_models_folder(hub, tmp_path):
    (tmp_path / "main.py").touch()
    code, _, err = run_tool(hub.url, "--models", str(tmp_path))
    assert code == 1 and f"give {os.path.join(tmp_path, 'models')}." in err
