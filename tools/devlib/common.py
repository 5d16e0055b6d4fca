"""Paths, the one-sentence error, sub-processes with a log, and the lock that set-ups share."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
COMFYUI = ROOT / ".comfyui"
RUN = ROOT / ".run"
STATE = ROOT / ".setup"
LOG = STATE / "setup.log"
PACK_NAME = "ovi-native"
AGAIN = "run the same command again"


class DevError(Exception):
    """A failure that the user can act on; its text is one sentence, and `detail` may hold the lines that led to it."""

    def __init__(self, sentence: str, detail: str = "") -> None:
        super().__init__(sentence)
        self.detail = detail

    def __str__(self) -> str:
        sentence = super().__str__()
        return f"{self.detail.rstrip()}\n{sentence}" if self.detail else sentence


Command = Sequence[str | Path]
# On a CPU that others use too, threads that wait by spinning make torch several times slower.
PATIENT_THREADS = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}


def say(text: str) -> None:
    """Print one line at once, also into a pipe."""
    print(text, flush=True)


def venv_program(name: str, venv: Path = VENV) -> Path:
    """Path of a program inside a virtual environment, on any system."""
    return venv / ("Scripts" if os.name == "nt" else "bin") / (f"{name}.exe" if os.name == "nt" else name)


def clean_env(**extra: str) -> dict[str, str]:
    """The environment without what another Python would bleed into ours, plus `extra`."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    return {k: v for k, v in os.environ.items() if k not in dropped} | extra


def quiet_env(**extra: str) -> dict[str, str]:
    """Environment for comfy-cli: no tracking, and its own home, so that it asks nothing and writes nothing outside."""
    home = STATE / "home"
    home.mkdir(parents=True, exist_ok=True)
    return clean_env(DO_NOT_TRACK="1", HOME=str(home), USERPROFILE=str(home), **extra)


_DISK = re.compile(r"no space left|os error 28\b|errno 28\b|disk quota|not enough space|os error 112\b", re.I)
_NETWORK = re.compile(
    r"dns error|failed to lookup|name resolution|name or service not known|connection refused|could not connect"
    r"|error sending request|network is unreachable|no route to host|timed out|newconnectionerror|tcp connect error"
    r"|failed to fetch|connection reset|remote disconnected|getaddrinfo|certificate verify|invalid peer certificate",
    re.I,
)


def failure_sentence(what: str, output: str, log: Path = LOG) -> str:
    """One sentence for a failed installer, by what it printed: a full disk, no network, or its own last error line."""
    if _DISK.search(output):
        return f"The disk is full while {what}: free some space on the disk that holds {ROOT}, then {AGAIN}."
    if _NETWORK.search(output):
        return f"No package index could be reached while {what}: check the network (or pip's index-url), then {AGAIN}."
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error|failed", line, re.I)]
    reason = (errors or lines or ["no output"])[-1].rstrip(".")
    return f"Something failed while {what} ({reason}): the whole output is in {log}."


def run_logged(command: Command, what: str, *, env: dict[str, str] | None = None) -> str:
    """Run an installer and return its output, kept in setup.log too; on a terminal a line counts the seconds.

    `what` completes "while ...". Raises DevError with a sentence when the command fails.
    """
    LOG.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, env=env or clean_env(), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
        close_fds=False,  # it inherits our lock: if we are killed, the next set-up waits until the installer has ended
    )
    lines: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True)
    reader.start()
    started = time.monotonic()
    try:
        while process.poll() is None:
            if sys.stdout.isatty():
                print(f"\r  {what}: {time.monotonic() - started:.0f} s", end="", flush=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        if sys.stdout.isatty():
            print("\r\033[K", end="", flush=True)
    reader.join()
    output = "".join(lines)
    with contextlib.suppress(OSError), LOG.open("a", encoding="utf-8") as log:  # a full disk must not hide the reason
        log.write(f"$ {' '.join(map(str, command))}\n{output}\n")
    if process.returncode:
        raise DevError(failure_sentence(what, output))
    return output


def _try_lock(handle: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Hold an exclusive lock on `path`; says `waiting` once if another process has it.

    A killed holder frees it, once the installers that it started with `run_logged` have ended too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    os.set_inheritable(handle, True)
    try:
        if not _try_lock(handle):
            say(waiting)
            while not _try_lock(handle):
                time.sleep(0.2)
        yield
    finally:
        os.close(handle)
