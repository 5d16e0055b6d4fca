"""A real ComfyUI server as a context manager: started headless on a base directory of its own, stopped for certain.

Also when this process is killed and can stop nothing: the server holds one end of a pipe and ends with the other
(`launch`).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from . import comfyui
from .common import PACK_NAME, PATIENT_THREADS, DevError, clean_env, try_hold

HOST = "127.0.0.1"
LAUNCH = Path(__file__).with_name("launch.py")
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 10.0
TAIL_LINES = 15


class ServerError(DevError):
    """The server did not come up or went down; `detail` is the end of its log."""


def free_port(port: int = 0) -> int:
    """`port`, or if that is 0 one that nobody listens on at the moment. Raises DevError if it cannot be had."""
    with socket.socket() as probe:
        if os.name == "posix":  # as the server does; elsewhere the option would allow two listeners
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as failure:
            raise DevError(f"Port {port} cannot be used ({failure}): choose another one with --port.") from None
        return int(probe.getsockname()[1])


def has_gpu() -> bool:
    """Whether this interpreter's torch can use an accelerator; without a CUDA driver torch is not even imported."""
    if sys.platform == "darwin":
        return True
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    if driver.cuInit(0) != 0:
        return False
    import torch  # a driver is there; only torch knows whether it is new enough

    return bool(torch.cuda.is_available())


class ComfyServer:
    """One ComfyUI server process.

    `base` holds models, custom_nodes, input, output, user and temp, and gets the pack linked in. `models` replaces
    the models folder. `found` is the ComfyUI to run (default: the one `comfyui.find` names), `python` the interpreter.
    `args` are more of ComfyUI's own options. Without a `port` a free one is taken. The log is `base`/server.log, or
    server-2.log and so on while servers on the same base write to those before it.
    """

    def __init__(
        self,
        base: Path,
        *,
        found: comfyui.ComfyUI | None = None,
        python: Path | str = sys.executable,
        port: int | None = None,
        models: Path | None = None,
        args: Sequence[str] = (),
        cpu: bool | None = None,
    ) -> None:
        self.base = Path(base).resolve()
        self.comfyui = found or comfyui.find()
        self.python = python
        self.port = port
        self.models = models
        self.args = tuple(args)
        self.cpu = cpu
        self.log = self.base / "server.log"
        self.log_lock: int | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.seconds_to_start = 0.0

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    def command(self) -> list[str]:
        """The command line; also makes the base directory that it names."""
        if self.comfyui is None:
            raise DevError("There is no ComfyUI yet: run `python3 tools/dev.py setup` first.")
        options = comfyui.prepare_base(self.base, self.comfyui)
        if not has_gpu() if self.cpu is None else self.cpu:
            options.append("--cpu")
        if self.models:
            options += ["--models-directory", str(self.models)]
        return [str(self.python), str(LAUNCH), str(self.comfyui.path / "main.py"), "--port", str(self.port),
                "--disable-auto-launch", "--base-directory", str(self.base), "--database-url", "sqlite:///:memory:",
                *options, *self.args]

    def start(self) -> None:
        """Start and wait until the server answers. Raises ServerError with the log's tail, or DevError on its port."""
        self.port = free_port(self.port or 0)
        command = self.command()
        env = clean_env(PYTHONUNBUFFERED="1", PYTHONUTF8="1", **PATIENT_THREADS)
        if self.comfyui and not self.comfyui.ours:
            env["PYTHONDONTWRITEBYTECODE"] = "1"  # a user's ComfyUI is only read
        started = time.monotonic()
        self._take_log()
        with self.log.open("wb") as log:  # a session of its own: Ctrl-C reaches us first, and we stop it in order
            self.process = subprocess.Popen(command, cwd=self.base, env=env, stdin=subprocess.PIPE, stdout=log,
                                            stderr=subprocess.STDOUT, start_new_session=True)
        try:
            self._wait_until_ready(started + START_TIMEOUT_S)
        except BaseException:
            self.stop()
            raise
        self.seconds_to_start = time.monotonic() - started

    def _take_log(self) -> None:
        """Choose a log that no running server writes to, and hold it until this one is stopped."""
        for number in itertools.count(1):
            self.log = self.base / f"server{'' if number == 1 else f'-{number}'}.log"
            self.log_lock = try_hold(self.log.with_name(f".{self.log.name}.lock"))
            if self.log_lock is not None:
                return

    def _wait_until_ready(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            self.check_alive("while starting")
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5) as answer:
                    json.load(answer)
                return
            time.sleep(0.1)
        raise ServerError(f"The ComfyUI server did not answer within {START_TIMEOUT_S:.0f} s; its log is {self.log}.",
                          self.log_tail())

    def check_alive(self, when: str = "unexpectedly") -> None:
        """Raise ServerError when the process is gone."""
        code = self.process.poll() if self.process else None
        if code is not None:
            last = (self.log_tail() or "it printed nothing").splitlines()[-1].strip()
            raise ServerError(f"The ComfyUI server stopped {when} (exit code {code}: {last}); its log is {self.log}.",
                              self.log_tail())

    def log_text(self) -> str:
        """Everything that the server has printed so far."""
        return self.log.read_text("utf-8", errors="replace") if self.log.exists() else ""

    def log_tail(self) -> str:
        return "\n".join(self.log_text().rstrip().splitlines()[-TAIL_LINES:])

    def pack_failure(self) -> str | None:
        """ComfyUI's line about why the pack could not be imported; None if it was."""
        failure = rf"(?:Cannot import|Error while calling comfy_entrypoint)[^\n]*{PACK_NAME}.*"
        found = re.search(failure, self.log_text())
        return found[0].strip() if found else None

    def stop(self) -> None:
        """Stop the server: asked first, killed if it does not go. Safe to call twice."""
        lock, self.log_lock = self.log_lock, None
        process, self.process = self.process, None
        try:
            if process is not None:
                self._end(process)
        finally:
            if lock is not None:
                os.close(lock)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
        finally:  # also when a second Ctrl-C cuts the waiting short
            process.kill()
            process.wait()
            if process.stdin:
                process.stdin.close()
