"""`tools/dev.py test`: every check and test, and at the end one line about what could not run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from . import weights
from .common import (
    PACK_NAME,
    PATIENT_THREADS,
    ROOT,
    RUN,
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
REPORT = RUN / "pytest.xml"


def run_all(ready: Ready, pytest_arguments: Sequence[str], install_browser: bool = False) -> int:
    """Run everything, pytest last; returns 0 only if all of it passed."""
    weights.ensure_tiny(ready.python)
    missing = [reason for reason in (ensure_browser(install_browser or asked_by_ci()),) if reason]
    checks: dict[str, Callable[[], bool]] = {
        "ruff": lambda: shown([venv_program("ruff"), "check", "."]),
        "mypy": type_check,
        "comfy node validate": lambda: shown([venv_program("comfy"), "--no-json", "node", "validate"]),
        "comfy node pack": pack_check,
        "pytest": lambda: run_pytest(ready, pytest_arguments),
    }
    failed = []
    for name, check in checks.items():
        say(f"== {name}")
        if not check():
            failed.append(name)
    missing += skipped(REPORT)
    verdict = f"Failed: {', '.join(failed)}." if failed else "Everything passed."
    say(f"{verdict} {'Could not run: ' + '; '.join(missing) + '.' if missing else 'Nothing was left out.'}")
    return 1 if failed else 0


def shown(command: Command, cwd: Path = ROOT, env: dict[str, str] | None = None) -> bool:
    """Run a check with its output on the screen; returns whether it passed."""
    sys.stdout.flush()
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
    """comfy-cli's archive of the pack, made in a copy: it must hold what a user needs and nothing of ours."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / PACK_NAME
        for file in pack_files():
            target = copy / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, target)
        for command in (["git", "init", "-q"], ["git", "add", "-A"]):
            subprocess.run(command, cwd=copy, check=True, env=quiet_env())
        if not shown([venv_program("comfy"), "--no-json", "node", "pack"], copy):
            return False
        with zipfile.ZipFile(copy / "node.zip") as archive:
            problems = archive_problems(archive.namelist())
    for problem in problems:
        say(f"node.zip: {problem}")
    return not problems


def pack_files() -> list[str]:
    """Files that are, or with the next commit would be, in the repository."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        raise DevError(f"git cannot list the files of {ROOT} ({listed.stderr.strip()}): the pack check needs a clone.")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def archive_problems(names: Sequence[str]) -> list[str]:
    """What is wrong with the archive's list of files."""
    needed = ["__init__.py", "nodes/__init__.py", "ovi_model/__init__.py", "server/__init__.py", "pyproject.toml",
              "requirements.txt", "LICENSE", "README.md", "tools/make_tiny.py",
              "tools/tiny/bundle.py"]
    problems = [f"{name} is missing" for name in needed if name not in names]
    unwanted = ("tests/", ".ci/", "tools/dev", ".")
    return problems + [f"{name} does not belong in it" for name in names if name.startswith(unwanted)]


def run_pytest(ready: Ready, arguments: Sequence[str]) -> bool:
    """pytest, told where ComfyUI is; its report feeds the closing line."""
    REPORT.unlink(missing_ok=True)
    command: list[str | Path] = [venv_program("pytest"), f"--junitxml={REPORT}", *arguments]
    return shown(command, env=clean_env(COMFYUI_PATH=str(ready.comfyui.path), **PATIENT_THREADS))


def skipped(report: Path) -> list[str]:
    """Reasons for skipped tests out of a pytest report, each once with its count."""
    if not report.is_file():
        return ["pytest (it left no report)"]
    reasons = Counter(
        (case.get("message") or "no reason given").splitlines()[0].rstrip(".")
        for case in ElementTree.parse(report).iter("skipped")
    )
    return [f"{count} test{'s' if count > 1 else ''} ({reason})" for reason, count in sorted(reasons.items())]


def find_browser() -> Path | None:
    """A Chromium or Chrome on this machine, for the browser tests."""
    for name in BROWSERS:
        found = shutil.which(name)
        if found:
            return Path(found)
    return None


def asked_by_ci() -> bool:
    """Whether this is one of the throw-away machines of a CI service, which set CI: there one may be installed."""
    return os.environ.get("CI", "").strip().lower() in ("1", "true", "yes")


def ensure_browser(install: bool) -> str | None:
    """Install Chromium if that was asked for (it takes root on Debian); returns why the browser tests cannot run."""
    if find_browser():
        return None
    if not install:
        return ("browser tests (no Chromium or Chrome on this machine: install one, or let `--install-browser` do it, "
                "which runs apt-get as root)")
    if not sys.platform.startswith("linux") or not shutil.which("apt-get") or os.geteuid() != 0:
        return "browser tests (no Chromium or Chrome on this machine, and only root on Debian can let us install it)"
    say("Installing Chromium for the browser tests.")
    env = clean_env(DEBIAN_FRONTEND="noninteractive")
    try:
        run_logged(["apt-get", "update", "-q"], "updating apt's lists", env=env)
        run_logged(["apt-get", "install", "-q", "-y", "--no-install-recommends", "chromium"], "installing Chromium",
                   env=env)
    except DevError as failure:
        return f"browser tests (Chromium could not be installed: {failure})"
    return None
