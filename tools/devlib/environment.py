"""The project's own `.venv`: made once, by uv when it can be had, and known to be complete by a stamp.

The stamp is a hash of everything that went in. It is written last and compared first, so a finished set-up costs
nothing, a killed one is taken up again, and a changed requirement is installed at the next command.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import comfyui
from .common import AGAIN, LOG, ROOT, STATE, VENV, DevError, clean_env, locked, run_logged, say, venv_program

REQUIREMENTS = (ROOT / "requirements.txt", ROOT / "requirements-dev.txt")
DISK_NEEDED_GB = 8.0  # torch with its CUDA libraries takes 5.8 GB of it
STAMP = "ovi-native-stamp"
# The two installers themselves, which run before anything else is checked: version and hashes of every system's file.
UV_PINS, PIP_PINS = (Path(__file__).with_name(name) for name in ("uv.txt", "pip.txt"))
# The interpreter behind a virtual environment: rebuilding `.venv` must not depend on the Python inside it.
BASE_PYTHON: str = getattr(sys, "_base_executable", None) or sys.executable


@dataclass(frozen=True)
class Ready:
    """What a finished set-up offers: the environment's Python and the ComfyUI to run."""

    python: Path
    comfyui: comfyui.ComfyUI


def setup() -> Ready:
    """Make the environment and ComfyUI ready and return them; does nothing when they already are.

    Raises DevError with one sentence on no network, no disk, an unusable ComfyUI or Python.
    """
    with locked(STATE / "lock", "Another set-up of this folder is running; waiting for it."):
        found = comfyui.find()
        if found and stamp_of(VENV) == fingerprint(found.requirements, *REQUIREMENTS):
            return Ready(venv_program("python"), found)
        say("Setting up (first use, or something changed); this is done once.")
        started = time.monotonic()
        LOG.unlink(missing_ok=True)
        python = make_venv(VENV)
        if found is None:
            say(f"  fetching ComfyUI {comfyui.FETCHED_VERSION}")
            found = comfyui.fetch(python)
        say(f"  ComfyUI {found.version} in {found.path} ({found.origin})")
        files = (found.requirements, *REQUIREMENTS)
        say("  installing packages (about 6 GB the first time)")
        install(VENV, files)
        say(f"Set up in {time.monotonic() - started:.0f} s.")
        return Ready(python, found)


def fingerprint(*files: Path) -> str:
    """Hash of what an environment is made of: these files' content, the Python version and the platform."""
    parts = [sys.platform, ".".join(map(str, sys.version_info[:2])), *(path.read_text("utf-8") for path in files)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def stamp_of(venv: Path) -> str | None:
    """The fingerprint that `venv` was completed with; None while it is absent or unfinished."""
    with contextlib.suppress(OSError):
        return (venv / STAMP).read_text("utf-8")
    return None


def make_venv(venv: Path) -> Path:
    """Return the Python of `venv`, made anew unless a finished one for this Python version stands there.

    An unfinished one is thrown away: an installer killed in the middle can leave a package that looks installed.
    What it had downloaded is still in its cache.
    """
    python = venv_program("python", venv)
    if stamp_of(venv) and python.exists() and _version_of(venv) == f"{sys.version_info[0]}.{sys.version_info[1]}":
        return python
    if venv.exists():
        shutil.rmtree(venv)
    check_disk(venv.parent, DISK_NEEDED_GB)
    uv = find_uv()
    if uv:
        run_logged([uv, "venv", "--python", BASE_PYTHON, venv], "making .venv", env=uv_env())
        run_logged([uv, "pip", "install", "--python", python, *uv_index_options(), "--require-hashes", "-r", PIP_PINS],
                   "making .venv", env=uv_env())
    else:
        run_logged([BASE_PYTHON, "-m", "venv", venv], "making .venv")
    return python


def _version_of(venv: Path) -> str | None:
    with contextlib.suppress(OSError):
        found = re.search(r"^version(?:_info)?\s*=\s*(\d+\.\d+)", (venv / "pyvenv.cfg").read_text("utf-8"), re.M)
        return found[1] if found else None
    return None


def install(venv: Path, files: Sequence[Path]) -> None:
    """Install requirement `files` together into `venv`, with bytecode (or servers start slowly), then stamp it."""
    mark = fingerprint(*files)
    (venv / STAMP).unlink(missing_ok=True)
    wanted = [word for path in files for word in ("-r", str(path))]
    python = venv_program("python", venv)
    uv = find_uv()
    command: list[str | Path]
    if uv:
        command = [uv, "pip", "install", "--python", python, "--compile-bytecode", *uv_index_options(), *wanted]
        run_logged(command, "installing packages", env=uv_env())
    else:
        command = [python, "-m", "pip", "install", "--no-input", "--compile", *wanted]
        run_logged(command, "installing packages")
    temporary = venv / f"{STAMP}.part"
    temporary.write_text(mark, "utf-8")
    os.replace(temporary, venv / STAMP)


def check_disk(folder: Path, needed_gb: float) -> None:
    """Raise DevError when the disk that holds `folder` has less than `needed_gb` free."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < needed_gb:
        raise DevError(
            f"Set-up needs about {needed_gb:.0f} GB of free disk in {folder} and found {free:.1f} GB: "
            f"free some space, then {AGAIN}."
        )


@functools.cache
def find_uv() -> Path | None:
    """A uv that works: the user's own on PATH, else the pinned one, in `.setup/uv`. None when only pip can be had."""
    own = venv_program("uv", STATE / "uv")
    for candidate in (shutil.which("uv"), own):
        if candidate and _runs(candidate):
            return Path(candidate)
    say("  fetching uv")
    python = venv_program("python", STATE / "uv")
    try:
        run_logged([BASE_PYTHON, "-m", "venv", "--clear", STATE / "uv"], "making a place for uv")
    except DevError as failure:
        raise DevError(
            f"This Python cannot make virtual environments: install its venv module "
            f"(Debian and Ubuntu: apt install python3-venv) or uv, then {AGAIN}.", str(failure),
        ) from None
    try:
        run_logged([python, "-m", "pip", "install", "--no-input", "--require-hashes", "--only-binary=:all:", "-r",
                    UV_PINS], "fetching uv")
    except DevError as failure:
        if "No package index" in str(failure) or "disk is full" in str(failure):
            raise
        say("  uv is not to be had here; pip does the work, more slowly")
        return None
    return own


def _runs(program: str | Path) -> bool:
    try:
        return subprocess.run([program, "--version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def pip_settings() -> dict[str, list[str]]:
    """pip's configured `find-links`, `index-url` and so on, from its files and PIP_* variables; uv reads neither."""
    listed = subprocess.run([BASE_PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True,
                            env=clean_env(PIP_DISABLE_PIP_VERSION_CHECK="1"))
    settings: dict[str, list[str]] = {}
    for line in listed.stdout.splitlines():  # global.find-links='/a /b', install.…, :env:.…: the later, the stronger
        key, _, value = line.partition("=")
        with contextlib.suppress(ValueError, SyntaxError):
            settings[key.rpartition(".")[2]] = str(ast.literal_eval(value)).split()
    for name, value in os.environ.items():  # a Python without pip lists nothing
        if name.startswith("PIP_") and value.strip():
            settings[name[4:].lower().replace("_", "-")] = value.split()
    return settings


def uv_index_options() -> list[str]:
    """uv options that make it look where pip would: same indexes, and the best version among all of them."""
    settings = pip_settings()
    options: list[str] = []
    for name in ("index-url", "extra-index-url", "find-links"):
        for value in settings.get(name, []):
            options += [f"--{name}", value]
    for host in settings.get("trusted-host", []):
        options += ["--allow-insecure-host", host]
    if settings.get("no-index", ["0"])[0].lower() in ("1", "true", "yes", "on"):
        options.append("--no-index")
    if "extra-index-url" in settings:
        options += ["--index-strategy", "unsafe-best-match"]
    return options


def uv_env() -> dict[str, str]:
    """Environment for uv: pip's certificate bundle and patience, unless the user set uv's own."""
    env = clean_env()
    env.setdefault("UV_HTTP_TIMEOUT", "180")
    certificates = pip_settings().get("cert")
    if certificates:
        env.setdefault("SSL_CERT_FILE", certificates[0])
    return env
