"""`benchmarks/gpu.py` and the kit for a machine without network: rehearsed, stopped, gone on with."""

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest
from devlib import comfyui
from devlib.common import clean_env

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402

pytestmark = pytest.mark.slow


def call(out: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu.py", "--out", out, "--rehearse", *options],
                          env=clean_env(COMFYUI_PATH=str(comfyui.find().path)), capture_output=True, text=True,
                          timeout=240)


def parts(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())["parts"]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("gpu")
    done = call(out, "--only", "parity", "decode")
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_a_rehearsal_writes_its_rows_and_the_targets(rehearsed):
    found = parts(rehearsed)
    assert {name: part["state"] for name, part in found.items()} == {"parity": gpu.DONE, "decode": gpu.DONE}
    rows = found["parity"]["rows"]
    assert len(rows) == 6 and all(row["ok"] for row in rows)
    assert all(0 < row["video"] < row["tolerance"] for row in rows if row["dtype"] == "bfloat16")
    text = (rehearsed / "results.md").read_text()
    assert "| reference, FlashAttention 3, 720x720, 121 frames, 50 steps | 83 |" in text and "one row skips" in text


def test_a_second_call_goes_on_with_what_has_not_ended(rehearsed):
    results = json.loads((rehearsed / "results.json").read_text())
    results["parts"]["decode"]["state"] = gpu.STOPPED
    (rehearsed / "results.json").write_text(json.dumps(results))
    parity = (rehearsed / "parity.jsonl").stat().st_mtime_ns
    done = call(rehearsed, "--only", "parity", "decode")
    assert done.returncode == 0 and "parity: done before" in done.stdout
    assert (rehearsed / "parity.jsonl").stat().st_mtime_ns == parity and parts(rehearsed)["decode"]["state"] == gpu.DONE


def test_a_part_over_its_time_is_stopped_and_the_rest_left(tmp_path):
    done = call(tmp_path, "--only", "workflows", "parity", "--minutes", "0.3")
    found = parts(tmp_path)
    assert done.returncode == 1
    assert found["workflows"]["state"] == gpu.STOPPED and found["parity"]["state"] == gpu.LEFT
    assert not servers(tmp_path)


@pytest.mark.parametrize("moment", ["starting", "running"])
def test_a_part_that_is_stopped_ends_its_server(tmp_path, moment):
    command = [sys.executable, ROOT / "benchmarks" / "gpu_parts.py", "workflows", "--out", tmp_path, "--rehearse"]
    part = subprocess.Popen(command, env=clean_env(COMFYUI_PATH=str(comfyui.find().path)), stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    rows = tmp_path / "workflows.jsonl"
    while not any("main.py" in line for line in servers(tmp_path)) or (moment == "running" and not rows.read_text()):
        assert time.monotonic() < deadline and part.poll() is None, "no server was seen to stop"
        time.sleep(0.2)
    part.terminate()
    assert part.wait(60) and (tmp_path / "workflows-server.log").is_file() == (moment == "running")
    assert not servers(tmp_path)


def servers(out: Path) -> list[str]:
    """Command lines of processes that work on the parts of a call."""
    lines = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return [line for line in lines if str(out) in line]


def test_without_a_gpu_it_says_what_to_do(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu_parts.py", "step", "--out", tmp_path],
                          env=clean_env(COMFYUI_PATH=str(comfyui.find().path), CUDA_VISIBLE_DEVICES=""),
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--rehearse" in done.stderr


def test_the_kit_installs_with_the_standard_library_alone(tmp_path):
    part = tmp_path / "kit" / "1"
    part.mkdir(parents=True)
    with zipfile.ZipFile(part / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried/__init__.py", "VALUE = 42")
    target = tmp_path / "a folder"
    subprocess.run([sys.executable, "-S", ROOT / "tools" / "bare_kit.py", "install", part, "--into", target],
                   check=True, env={"PATH": "/usr/bin:/bin"}, timeout=60)
    found = subprocess.run([target / "python", "-c", "import carried; print(carried.VALUE)"], capture_output=True,
                           text=True, timeout=60)
    assert found.stdout.strip() == "42", found.stderr
