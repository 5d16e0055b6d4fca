"""`tools/dev.py` beyond set-up: which ComfyUI, its server, weights; foreseen failures are one sentence each."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from devlib import checks, comfyui, common, server, session, weights
from devlib.common import ROOT, DevError
from devlib.server import ComfyServer, ServerError
from support.dev_command import TOOL, assert_sentence, copy_of_tool, run_tool

# ComfyUI


def fake_comfyui(folder: Path, version: str) -> Path:
    """A folder that looks like a ComfyUI of that version."""
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "requirements.txt").touch()
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


def test_comfyui_path_comes_first_and_must_be_right(tmp_path):
    assert_sentence(run_tool("setup", COMFYUI_PATH=str(tmp_path)), "no ComfyUI", str(tmp_path), "COMFYUI_PATH")
    old = fake_comfyui(tmp_path / "old", "0.3.75")
    assert_sentence(run_tool("setup", COMFYUI_PATH=str(old)), "0.3.75", "0.30.0", "update it")


def test_comfy_cli_workspace_is_found(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    folders = {"win32": "AppData/Local/comfy-cli", "darwin": "Library/Application Support/comfy-cli"}
    config = tmp_path / folders.get(sys.platform, ".config/comfy-cli") / "config.ini"
    config.parent.mkdir(parents=True)
    recent = fake_comfyui(tmp_path / "recent", "0.31.2")
    default = fake_comfyui(tmp_path / "50% default", "1.0.0")
    config.write_text(f"[DEFAULT]\nrecent_workspace = {recent}\n")
    assert comfyui.find().path == recent
    config.write_text(f"[DEFAULT]\nrecent_workspace = {recent}\ndefault_workspace = {default}\n")
    found = comfyui.find()
    assert (found.path, found.version, found.ours) == (default, "1.0.0", False)


def test_outdated_comfy_cli_workspace_is_passed_over_with_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    fake_comfyui(tmp_path / ("comfy" if sys.platform == "linux" else "Documents/comfy") / "ComfyUI", "0.29.9")
    found = comfyui.find()
    assert found is None or found.ours
    assert "0.29.9" in capsys.readouterr().out


def test_link_and_its_refusals(tmp_path):
    theirs = fake_comfyui(tmp_path / "ComfyUI", "0.30.0")
    with pytest.raises(DevError, match="no custom_nodes"):
        comfyui.link(str(theirs))
    (theirs / "custom_nodes").mkdir()
    result = run_tool("link", str(theirs))
    assert result.returncode == 0, result.stderr
    assert (theirs / "custom_nodes" / "ovi-native").resolve() == ROOT
    assert comfyui.link(str(theirs)).resolve() == ROOT  # again: nothing to do
    (theirs / "custom_nodes" / "ovi-native").unlink()
    (theirs / "custom_nodes" / "ovi-native").mkdir()
    with pytest.raises(DevError, match="move it away"):
        comfyui.link(str(theirs))


def listing(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_existing_comfyui_is_used_with_its_models_and_left_as_it_was(tmp_path):
    ours = comfyui.find()
    theirs = tmp_path / "ComfyUI"
    shutil.copytree(ours.path, theirs, ignore=shutil.ignore_patterns("__pycache__", ".ovi-native-source"))
    (theirs / "models" / "vae").mkdir(parents=True, exist_ok=True)
    (theirs / "models" / "vae" / "their_vae.safetensors").touch()
    (theirs / "models" / "unet").mkdir(exist_ok=True)
    (theirs / "models" / "unet" / "their_model.safetensors").touch()
    before = listing(theirs)
    with ComfyServer(tmp_path / "base", found=comfyui.at(theirs, "test")) as running:
        from devlib.client import ComfyClient

        with ComfyClient(running.url) as client:
            assert "their_vae.safetensors" in str(client.object_info("VAELoader"))
            assert "their_model.safetensors" in str(client.object_info("UNETLoader"))
    assert listing(theirs) == before


# Server


def test_taken_port_is_one_sentence():
    with socket.socket() as holder:
        holder.bind((server.HOST, 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        assert_sentence(run_tool("serve", "--port", port), f"Port {port} cannot be used", "in use", "--port")
    assert_sentence(run_tool("serve", "--port", "70000"), "Port 70000 cannot be used")


def test_server_that_dies_at_start_shows_its_log(tmp_path):
    with pytest.raises(ServerError, match=r"stopped while starting \(exit code 2") as failure:
        ComfyServer(tmp_path, args=["--no-such-option"]).start()
    assert "--no-such-option" in failure.value.detail
    assert str(tmp_path / "server.log") in str(failure.value)


def test_custom_node_that_kills_the_server(tmp_path):
    node = tmp_path / "custom_nodes" / "killer"
    node.mkdir(parents=True)
    (node / "__init__.py").write_text("import os\nprint('the killer node was here', flush=True)\nos._exit(7)\n")
    with pytest.raises(ServerError, match=r"exit code 7.*the killer node was here"):
        ComfyServer(tmp_path).start()


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
@pytest.mark.parametrize(("broken", "words"), [("__init__.py", "Cannot import"), ("nodes/__init__.py", "Error while")])
def test_pack_that_does_not_import_is_reported(broken, words, tmp_path):
    tool = copy_of_tool(tmp_path)
    for name in (".venv", ".comfyui"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("nodes", "ovi_model", "server", "workflows"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "__init__.py", tmp_path)
    with (tmp_path / broken).open("a") as file:
        file.write("\nimport ovi_no_such_module\n")
    result = run_tool("demo", tool=tool)
    assert_sentence(result, "ComfyUI could not load the pack", words, "ovi_no_such_module", "server.log")


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((server.HOST, port)) == 0


def test_server_is_stopped_after_an_error(tmp_path):
    """In order: ComfyUI is asked, says so, and clears its temporary files."""
    with pytest.raises(ZeroDivisionError), ComfyServer(tmp_path) as running:
        port, process = running.port, running.process
        assert is_listening(port)
        left = tmp_path / "temp" / "left.txt"
        left.write_text("of a run")
        raise ZeroDivisionError
    assert not is_listening(port)
    if os.name == "posix":
        assert process.returncode == 0 and "Stopped server" in running.log_text() and not left.exists()
    running.stop()  # twice does no harm


DEAF = """
import http.server, signal, sys
signal.signal(signal.SIGINT, lambda *_: print("not now", flush=True))
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answer).serve_forever()
"""


def answering(folder: Path) -> comfyui.ComfyUI:
    """A program in ComfyUI's place that answers but will not stop when asked."""
    (folder / "comfyui").mkdir()
    (folder / "comfyui" / "main.py").write_text(DEAF)
    return comfyui.ComfyUI(folder / "comfyui", "9.9.9", "test")


def test_a_server_leaves_the_log_of_another_on_its_base(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "STOP_TIMEOUT_S", 0.1)
    found = answering(tmp_path)
    with ComfyServer(tmp_path / "base", found=found) as first:
        first.log.write_text("what the first one said")
        with ComfyServer(tmp_path / "base", found=found) as second:
            assert (first.log.name, second.log.name) == ("server.log", "server-2.log")
        assert first.log_text().startswith("what the first one said")
    with ComfyServer(tmp_path / "base", found=found) as third:
        assert third.log == first.log and "what the first one said" not in third.log_text()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
def test_server_that_does_not_go_when_asked_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "STOP_TIMEOUT_S", 1.0)
    with ComfyServer(tmp_path / "base", found=answering(tmp_path)) as running:
        process = running.process
    assert process.returncode == -signal.SIGKILL and running.log_text().endswith("not now\n")
    assert not is_listening(running.port)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_command_stops_its_server(number):
    port = server.free_port()
    with subprocess.Popen([sys.executable, str(TOOL), "serve", "--port", str(port)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, env=common.clean_env()) as tool:
        while "Open http" not in (line := tool.stdout.readline()):
            assert line, tool.stderr.read()
        assert is_listening(port)
        tool.send_signal(number)
        output = tool.communicate(timeout=30)
    assert tool.returncode == 130
    assert output[1].strip().splitlines()[-1].startswith("Stopped")
    assert not is_listening(port)


def wait_until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


STARTER = """
import sys
sys.path.insert(0, {tools!r})
from pathlib import Path
from devlib import comfyui, server
running = server.ComfyServer(Path({base!r}), found=comfyui.ComfyUI(Path({comfyui!r}), "9.9.9", "test"))
running.start()
print(running.port, running.pid, flush=True)
sys.stdin.read()
"""


def start_starter(base: Path, path: Path) -> tuple[subprocess.Popen[str], int, psutil.Process]:
    """A process that started a server and waits; the server's port and process."""
    program = STARTER.format(tools=str(ROOT / "tools"), base=str(base), comfyui=str(path))
    starter = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, env=common.clean_env())
    port, pid = map(int, starter.stdout.readline().split())
    return starter, port, psutil.Process(pid)


def test_server_ends_when_its_starter_is_killed(tmp_path):
    """In order, as after Ctrl-C: also a real ComfyUI clears its temporary files."""
    starter, port, process = start_starter(tmp_path, comfyui.find().path)
    with starter:
        left = tmp_path / "temp" / "left.txt"
        left.write_text("of a run")
        starter.kill()
        wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)
    wait_until(lambda: not is_listening(port))  # the last of its threads may hold it a little longer
    assert os.name != "posix" or ("Stopped server" in (tmp_path / "server.log").read_text() and not left.exists())


def test_server_that_will_not_go_with_its_starter_is_ended(tmp_path):
    (tmp_path / "comfyui").mkdir()
    (tmp_path / "comfyui" / "main.py").write_text(DEAF)
    starter, port, _ = start_starter(tmp_path / "base", tmp_path / "comfyui")
    with starter:
        starter.kill()
    wait_until(lambda: not is_listening(port))


# Browser


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root would install one")
@pytest.mark.parametrize(("install", "ci", "calls"), [
    (False, "", ""), (False, "false", ""), (False, "true", "update install "), (True, "", "update install ")])
def test_browser_is_installed_only_where_that_was_asked_for(tmp_path, monkeypatch, install, ci, calls):
    """A stand-in for apt-get notes what it is called for; there is no browser and no other program."""
    called = tmp_path / "called"
    called.touch()
    (tmp_path / "apt-get").write_text(f'#!/bin/sh\nprintf "%s " "$1" >> {called}\n')
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CI", ci)
    if install or checks.asked_by_ci():
        checks.ensure_browser()
    assert called.read_text() == calls


# Weights and results


def offered(**files: list[str]) -> dict[str, list[str]]:
    return {role: [*files.get(role, []), tiny] for role, tiny in weights.TINY.items()}


REAL = {"model": ["Ovi/model.safetensors"], "text_encoder": ["umt5_xxl_fp16.safetensors"],
        "video_vae": ["wan_2.1_vae.safetensors", "wan2.2_vae.safetensors"],
        "audio_vae": ["mmaudio_vae_44k_fp16.safetensors", "v1-16.pth"], "vocoder": ["best_netG.pt"]}


def test_real_weights_are_chosen_when_all_are_there():
    assert weights.choose(offered(**REAL)) == {
        "model": "Ovi/model.safetensors", "text_encoder": "umt5_xxl_fp16.safetensors",
        "video_vae": "wan2.2_vae.safetensors", "audio_vae": "v1-16.pth", "vocoder": "best_netG.pt"}


def test_tiny_models_are_chosen_when_no_model_is_there_or_they_are_asked_for():
    assert weights.choose(offered()) == weights.WORLD
    assert weights.choose(offered(**{**REAL, "model": []})) == weights.WORLD
    assert weights.choose(offered(**REAL), weights.WORLD["model"]) == weights.WORLD
    assert weights.choose(offered(**REAL), weights.TINY["model"]) == weights.TINY


def test_missing_companion_and_unknown_model_are_sentences():
    with pytest.raises(DevError, match=r"no Wan 2\.2 video VAE"):
        weights.choose(offered(**{**REAL, "video_vae": ["wan_2.1_vae.safetensors"]}))
    with pytest.raises(DevError, match=r"no model other\.safetensors.*found: Ovi/model\.safetensors"):
        weights.choose(offered(**REAL), "other.safetensors")


@pytest.mark.parametrize("name", [
    "model.safetensors", "model_fp8_e4m3fn.safetensors", "model_960x960.safetensors", "model_960x960_10s.safetensors",
    "Wan2_2-5B-Ovi_960x960_10s_fp8_e4m3fn_scaled_KJ.safetensors", "sub/ovi_960x960_5s_int8.safetensors",
    "wan2.2_ovi1_1_video_10B_bf16.safetensors",
])
def test_names_in_circulation(name):
    files = [name, name.replace("video", "audio")]  # the loader finds the other half by itself
    assert weights.choose(offered(**{**REAL, "model": files}))["model"] == name


def test_the_better_model_is_preferred_wherever_it_stands():
    models = ["ovi_720x720_x.safetensors", "model.safetensors", "model_960x960_10s.safetensors"]
    assert weights.choose(offered(**{**REAL, "model": models}))["model"] == models[2]
    assert weights.choose(offered(**{**REAL, "model": models[:2]}))["model"] == models[1]
    assert weights.choose(offered(**REAL), "model.safetensors")["model"] == "Ovi/model.safetensors"


def test_wans_own_text_encoder_is_taken_without_a_look_at_its_tokenizer():
    files = {**REAL, "text_encoder": ["models_t5_umt5-xxl-enc-bf16.pth"]}
    assert weights.choose(offered(**files))["text_encoder"] == files["text_encoder"][0]


@pytest.mark.parametrize("name", [
    "Wan_2_2_Ovi_video_model_bf16.safetensors", "wan2.2_ti2v_5B_fp16.safetensors", "wan2.2_vae.safetensors",
    "Wan2_2_5B_FastWanFullAttn_lora_rank_128_bf16.safetensors", "ovi_tiny_random.safetensors",
    "ovi_tiny_world.safetensors",
])
def test_names_that_are_no_whole_model(name):
    assert weights.names_table().best_model([name]) == ()


def test_clip_without_sound_is_refused(tmp_path):
    path = tmp_path / "silent.mp4"
    with av.open(str(path), "w") as clip:
        stream = clip.add_stream("h264", rate=24)
        stream.width = stream.height = 64
        for _ in range(3):
            clip.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        clip.mux(stream.encode())
    with pytest.raises(DevError, match="no sound"):
        session.streams(path)


@pytest.mark.parametrize(("arguments", "word"), [
    (["demo", "--size", "big"], "big"), (["run", "/no/such/file.json"], "/no/such/file.json"),
    (["demo", "--image", "/no/such.png"], "/no/such.png"), (["nonsense"], "nonsense"),
])
def test_wrong_arguments_are_named(arguments, word):
    result = run_tool(*arguments)
    assert result.returncode in (1, 2)
    assert word in result.stderr and "Traceback" not in result.stderr
