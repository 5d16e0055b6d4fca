"""The project's own `.venv`: made once by the pinned uv, and known to be complete by a stamp.

The stamp is a hash of everything that went in. It is written last and compared first, so a finished set-up costs
nothing, a killed one is taken up again, and a changed requirement is installed at the next command.

No lock file: uv.lock holds the addresses of one index, and here any index, mirror or folder of wheels that pip is set
to must do; and part of the requirements are those of the ComfyUI in use, which may be the user's own. What is ours is
pinned in requirements-dev.txt, and uv itself by hashes in uv.txt.
"""

from __future__ import annotations

import ast
import contextlib
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
UV_PINS = Path(__file__).with_name("uv.txt")
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
        say("  installing packages (about 6 GB the first time)")
        install(VENV, (found.requirements, *REQUIREMENTS))
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
    """Return the Python of `venv`, made anew with uv in it unless a finished one for this Python stands there.

    An unfinished one is thrown away: an installer killed in the middle can leave a package that looks installed.
    What it had downloaded is still in its cache.
    """
    python = venv_program("python", venv)
    if stamp_of(venv) and python_of(venv) == sys.version_info[:2] and venv_program("uv", venv).exists():
        return python
    shutil.rmtree(venv, ignore_errors=True)
    free = shutil.disk_usage(venv.parent).free / 1e9
    if free < DISK_NEEDED_GB:
        raise DevError(f"Set-up needs about {DISK_NEEDED_GB:.0f} GB of free disk in {venv.parent} and found "
                       f"{free:.1f} GB: free some space, then {AGAIN}.")
    try:
        run_logged([BASE_PYTHON, "-m", "venv", "--clear", venv], "making .venv")
    except DevError as failure:
        raise DevError("This Python cannot make virtual environments: install its venv module (Debian and Ubuntu: "
                       f"apt install python3-venv), then {AGAIN}.", str(failure)) from None
    run_logged([python, "-m", "pip", "install", "--no-input", "--require-hashes", "--only-binary=:all:", "-r",
                UV_PINS], "fetching uv")
    return python


def python_of(venv: Path) -> tuple[int, ...] | None:
    """The version (major, minor) of a virtual environment's Python."""
    with contextlib.suppress(OSError):
        found = re.search(r"^version(?:_info)? *= *(\d+)\.(\d+)", (venv / "pyvenv.cfg").read_text("utf-8"), re.M)
        return (int(found[1]), int(found[2])) if found else None
    return None


def install(venv: Path, files: Sequence[Path]) -> None:
    """Install requirement `files` together into `venv`, with bytecode (or servers start slowly), then stamp it."""
    (venv / STAMP).unlink(missing_ok=True)
    settings = pip_settings(venv_program("python", venv))
    patience = {"UV_HTTP_TIMEOUT": "180", "UV_COMPILE_BYTECODE_TIMEOUT": "1800"}  # a busy machine takes long
    if "cert" in settings:
        patience["SSL_CERT_FILE"] = settings["cert"][0]
    env = patience | clean_env()
    wanted = [word for path in files for word in ("-r", str(path))]
    run_logged([venv_program("uv", venv), "pip", "install", "--python", venv_program("python", venv),
                "--compile-bytecode", *index_options(settings), *wanted], "installing packages", env=env)
    temporary = venv / f"{STAMP}.part"
    temporary.write_text(fingerprint(*files), "utf-8")
    os.replace(temporary, venv / STAMP)


def pip_settings(python: Path | str) -> dict[str, list[str]]:
    """pip's configured `find-links`, `index-url` and so on, from its files and PIP_* variables; uv reads neither."""
    listed = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True,
                            env=clean_env(PIP_DISABLE_PIP_VERSION_CHECK="1")).stdout
    settings: dict[str, list[str]] = {}
    for section in ("global", "install", ":env:"):  # the later, the stronger
        for name, value in re.findall(rf"^{section}\.([\w-]+)=(.*)$", listed, re.M):
            settings[name] = str(ast.literal_eval(value)).split()
    return settings


def index_options(settings: dict[str, list[str]]) -> list[str]:
    """uv options that make it look where pip would: same indexes, and the best version among all of them."""
    names = {"index-url": "--index-url", "extra-index-url": "--extra-index-url", "find-links": "--find-links",
             "trusted-host": "--allow-insecure-host"}
    options = ["--index-strategy", "unsafe-best-match"]
    for name, option in names.items():
        for value in settings.get(name, []):
            options += [option, value]
    if settings.get("no-index", ["0"])[0].lower() in ("1", "true", "yes", "on"):
        options.append("--no-index")
    return options
