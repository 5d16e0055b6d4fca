"""`tools/dev.py test`: every check and test; pytest itself says at its end what it skipped and why."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from . import weights
from .common import (
    PATIENT_THREADS,
    ROOT,
    STATE,
    Command,
    DevError,
    clean_env,
    quiet_env,
    run_logged,
    say,
    venv_program,
)
from .environment import Ready

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUICK = ("-m", "not slow")  # the tests that one runs before a commit
WORKERS = ("-n", "2", "--dist", "loadfile")  # each file's tests on one of two processes; `-- -n 0` for none


def run_all(ready: Ready, pytest_arguments: Sequence[str], install_browser: bool = False) -> int:
    """Run everything, pytest last; returns 0 only if all of it passed."""
    weights.ensure_tiny(ready.python)
    if install_browser or asked_by_ci():
        ensure_browser()
    pytest_env = clean_env(COMFYUI_PATH=str(ready.comfyui.path), **PATIENT_THREADS)
    checks: dict[str, Callable[[], bool]] = {
        "ruff": lambda: shown([venv_program("ruff"), "check", "."]),
        "mypy": type_check,
        "comfy node validate": lambda: shown([venv_program("comfy"), "--no-json", "node", "validate"]),
        "comfy node pack": pack_check,
        "pytest": lambda: shown([venv_program("pytest"), *WORKERS, *pytest_arguments], env=pytest_env),
    }
    failed = []
    for name, check in checks.items():
        say(f"== {name}")
        if not check():
            failed.append(name)
    say(f"Failed: {', '.join(failed)}." if failed else "Everything passed.")
    return 1 if failed else 0


def shown(command: Command, cwd: Path = ROOT, env: dict[str, str] | None = None) -> bool:
    """Run a check with its output on the screen; returns whether it passed."""
    return subprocess.run(command, cwd=cwd, env=env or quiet_env(), stdin=subprocess.DEVNULL).returncode == 0


def type_check() -> bool:
    """mypy on the tools, and on the pack under an importable name, since this folder may be called anything."""
    place = STATE / "mypy"
    place.mkdir(parents=True, exist_ok=True)
    alias = place / "ovi_native"
    if not alias.exists():
        alias.symlink_to(ROOT, target_is_directory=True)
    # Never from the root, where our `nodes` would pass for ComfyUI's.
    env = quiet_env(MYPYPATH=os.pathsep.join([str(place), str(ROOT / "tools")]))
    return shown([venv_program("mypy"), "--config-file", ROOT / "pyproject.toml", "--cache-dir", STATE / "mypy_cache",
                  "--explicit-package-bases", *(alias / folder for folder in ("ovi_model", "nodes", "server")),
                  ROOT / "tools"], place, env)


def pack_check() -> bool:
    """comfy-cli's archive of the files that git tracks: it must hold what a user needs and nothing of ours."""
    archive = ROOT / "node.zip"
    try:
        if not shown([venv_program("comfy"), "--no-json", "node", "pack"]):
            return False
        with zipfile.ZipFile(archive) as content:
            problems = archive_problems(content.namelist())
    finally:
        archive.unlink(missing_ok=True)
    for problem in problems:
        say(f"node.zip: {problem}")
    return not problems


def archive_problems(names: Sequence[str]) -> list[str]:
    """What is wrong with the archive's list of files."""
    needed = ["__init__.py", "nodes/__init__.py", "ovi_model/__init__.py", "server/__init__.py", "pyproject.toml",
              "requirements.txt", "LICENSE", "README.md", "tools/install_tiny.py", "tools/tiny_ovi/files.py",
              "assets/tiny_ovi/model.safetensors"]
    unwanted = ("tests/", ".ci/", "tools/dev", ".")
    return [f"{name} is missing" for name in needed if name not in names] + [
        f"{name} does not belong in it" for name in names if name.startswith(unwanted)]


def find_browser() -> Path | None:
    """A Chromium or Chrome on this machine, for the browser tests."""
    return next((Path(found) for found in map(shutil.which, BROWSERS) if found), None)


def asked_by_ci() -> bool:
    """Whether this is one of the throw-away machines of a CI service, which set CI: there one may be installed."""
    return os.environ.get("CI", "").strip().lower() in ("1", "true", "yes")


def ensure_browser() -> None:
    """Install Chromium if there is no browser and this is root on Debian; says so if it cannot."""
    if find_browser():
        return
    if not sys.platform.startswith("linux") or not shutil.which("apt-get") or os.geteuid() != 0:
        say("Browser tests cannot run: there is no Chromium or Chrome, and only root on Debian can let us install it.")
        return
    say("Installing Chromium for the browser tests.")
    env = clean_env(DEBIAN_FRONTEND="noninteractive")
    try:
        run_logged(["apt-get", "update", "-q"], "updating apt's lists", env=env)
        run_logged(["apt-get", "install", "-q", "-y", "--no-install-recommends", "chromium"], "installing Chromium",
                   env=env)
    except DevError as failure:
        say(f"Browser tests cannot run: {failure}")
