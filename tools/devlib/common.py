"""Paths, the one-sentence error, sub-processes with a log, and the lock that set-ups share."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
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
# On a CPU that others use too, threads that wait by spinning make torch several times slower.
PATIENT_THREADS = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
Command = Sequence[str | Path]


class DevError(Exception):
    """A failure that the user can act on; its text is one sentence, after the lines in `detail` that led to it."""

    def __init__(self, sentence: str, detail: str = "") -> None:
        super().__init__(sentence)
        self.detail = detail

    def __str__(self) -> str:
        return "\n".join(filter(None, (self.detail.rstrip(), super().__str__())))


def say(text: str, end: str = "\n") -> None:
    """Print one line at once, also into a pipe, in place of what `show` left."""
    print(f"\r\033[K{text}" if sys.stdout.isatty() else text, end=end, flush=True)


def show(text: str, last: bool = False) -> None:
    """Print progress: on a terminal the next line replaces it, unless it is the `last`."""
    say(text, "" if sys.stdout.isatty() and not last else "\n")


def venv_program(name: str, venv: Path = VENV) -> Path:
    """Path of a program inside a virtual environment, on any system."""
    return venv / "Scripts" / f"{name}.exe" if os.name == "nt" else venv / "bin" / name


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
_NETWORK = re.compile(r"dns error|name resolution|connection refused|could not connect|error sending request"
                      r"|(operation|connection|connect|read) timed out|network timeout"
                      r"|unreachable|no route|newconnectionerror|connect error|failed to fetch|connection reset"
                      r"|remote disconnected|getaddrinfo|certificate", re.I)


def failure_sentence(what: str, output: str) -> str:
    """One sentence for a failed installer, by what it printed: a full disk, no network, or its own last error line."""
    if _DISK.search(output):
        return f"The disk is full while {what}: free some space on the disk that holds {ROOT}, then {AGAIN}."
    if _NETWORK.search(output):
        return f"No package index could be reached while {what}: check the network (or pip's index-url), then {AGAIN}."
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    reason = ([line for line in lines if re.search("error|failed", line, re.I)] or lines)[-1].rstrip(".")
    return f"Something failed while {what} ({reason}): the whole output is in {LOG}."


def run_logged(command: Command, what: str, *, env: dict[str, str] | None = None) -> str:
    """Run an installer and return its output, kept in setup.log too; on a terminal a line counts the seconds.

    `what` completes "while ...". Raises DevError with a sentence when the command fails.
    """
    words = [str(part) for part in command]
    started = time.monotonic()
    # It inherits our lock (close_fds): if we are killed, the next set-up waits until the installer has ended.
    with subprocess.Popen(words, cwd=ROOT, env=env or clean_env(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
                          close_fds=False) as process:
        try:
            output = None
            while output is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    output = process.communicate(timeout=1)[0]
                if output is None and sys.stdout.isatty():
                    show(f"  {what}: {time.monotonic() - started:.0f} s")
        finally:
            if process.returncode is None:
                process.terminate()
    with contextlib.suppress(OSError):  # a full disk must not hide the reason
        LOG.parent.mkdir(parents=True, exist_ok=True)
        with LOG.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(words)}\n{output}\n")
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


def try_hold(path: Path) -> int | None:
    """A handle that holds an exclusive lock on `path` until it is closed or this process ends; None if another does."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    if _try_lock(handle):
        return handle
    os.close(handle)
    return None


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
