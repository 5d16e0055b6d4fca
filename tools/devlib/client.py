"""Talking to a ComfyUI server: queue a workflow, follow its events, read its results.

Needs websocket-client, which `.venv` has. One client is one websocket; the server sends it the events of the prompts
that it queued.
"""

from __future__ import annotations

import json
import textwrap
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import websocket

from .common import DevError

Api = dict[str, Any]
OnEvent = Callable[[str, Any], None]
HISTORY_WAIT_S = 15.0
ENDS = {"execution_success": "success", "execution_error": "error", "execution_interrupted": "interrupted"}


class RejectedError(DevError):
    """The server refused a workflow before running it; `errors` is its `node_errors`."""

    def __init__(self, sentence: str, errors: dict[str, Any]) -> None:
        super().__init__(sentence)
        self.errors = errors

    @property
    def reasons(self) -> list[dict[str, Any]]:
        """All errors of all nodes."""
        return [error for node in self.errors.values() for error in node.get("errors", [])]


class ExecutionError(DevError):
    """A node failed while running; `event` is the server's `execution_error`."""

    def __init__(self, event: dict[str, Any]) -> None:
        self.event = event
        self.message = str(event.get("exception_message", "")).strip()
        super().__init__(f"{event.get('node_type')} (node {event.get('node_id')}) failed: {self.message}")


@dataclass(frozen=True)
class Output:
    """One file that a run produced."""

    node: str
    filename: str
    subfolder: str
    type: str

    def path(self, base: Path) -> Path:
        """Where the file lies in a server's base directory."""
        return base / self.type / self.subfolder / self.filename


@dataclass
class Run:
    """What one prompt did: how it ended, every event with its arrival time in seconds, and its outputs."""

    prompt_id: str
    status: str = "running"  # success, error, interrupted
    events: list[tuple[float, str, Any]] = field(default_factory=list)
    history: dict[str, Any] = field(default_factory=dict)

    def of(self, kind: str) -> list[Any]:
        """The data of all events of one `kind`, such as "progress", "executing" or "preview"."""
        return [data for _, name, data in self.events if name == kind]

    @property
    def outputs(self) -> list[Output]:
        """All files in the history, in the server's order."""
        return [Output(node, entry["filename"], entry.get("subfolder", ""), entry.get("type", "output"))
                for node, ui in self.history.get("outputs", {}).items()
                for listed in ui.values() if isinstance(listed, list)
                for entry in listed if isinstance(entry, dict) and "filename" in entry]


class ComfyClient:
    """A connection to the server at `url`; use it as a context manager, or call `close`."""

    def __init__(self, url: str, *, timeout: float = 60.0) -> None:
        self.url = url.rstrip("/")
        self.id = uuid.uuid4().hex
        self.timeout = timeout
        address = self.url.replace("http", "ws", 1) + f"/ws?clientId={self.id}"
        try:
            self.socket = websocket.create_connection(address, timeout=timeout)
        except (OSError, websocket.WebSocketException) as failure:
            raise DevError(f"No ComfyUI server answers at {self.url} ({failure}).") from None

    def __enter__(self) -> ComfyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def request(self, path: str, body: Any = None, *, kind: str = "application/json", raw: bool = False) -> Any:
        """GET `path`, or POST `body` to it, as JSON unless it is bytes of another `kind`.

        Returns the parsed answer (None if empty), or bytes if `raw`. An error status raises urllib.error.HTTPError.
        """
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            content = answer.read()
        if raw:
            return content
        return json.loads(content) if content.strip() else None

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """The schemas of all nodes, or of one."""
        return dict(self.request("/object_info" + (f"/{urllib.parse.quote(node)}" if node else "")))

    def queue(self, api: Api, workflow: dict[str, Any] | None = None) -> str:
        """Queue an API-format workflow and return its prompt id.

        `workflow`, the same in UI format, is written into the outputs, so that dropping one restores the graph.
        Raises RejectedError with the server's reasons when the workflow is invalid.
        """
        extra = {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
        try:
            answer = self.request("/prompt", {"prompt": api, "client_id": self.id, "extra_data": extra})
        except urllib.error.HTTPError as failure:
            with failure:
                body = json.loads(failure.read() or b"{}")
            raise RejectedError(rejection(body), body.get("node_errors") or {}) from None
        return str(answer["prompt_id"])

    def wait(self, prompt_id: str, *, timeout: float = 600.0, on_event: OnEvent | None = None) -> Run:
        """Follow a queued prompt to its end and return the Run, with its history.

        `on_event(kind, data)` sees every event as it comes; a preview image comes as kind "preview" with bytes.
        Raises ExecutionError when a node failed, DevError after `timeout` seconds. An interrupted run is returned.
        """
        run = Run(prompt_id)
        started = time.monotonic()
        while run.status == "running":
            if time.monotonic() > started + timeout:
                raise DevError(f"The workflow did not finish within {timeout:.0f} s.")
            kind, data = self._receive()
            if not kind or (isinstance(data, dict) and data.get("prompt_id", prompt_id) != prompt_id):
                continue
            run.events.append((time.monotonic() - started, kind, data))
            if on_event:
                on_event(kind, data)
            run.status = ENDS.get(kind, run.status)
        run.history = self.history(prompt_id)
        if run.status == "error":
            raise ExecutionError(run.of("execution_error")[-1])
        return run

    def _receive(self) -> tuple[str, Any]:
        """The next event; kind "" when a second brings none."""
        self.socket.settimeout(1.0)
        try:
            message = self.socket.recv()
        except websocket.WebSocketTimeoutException:
            return "", None
        except (OSError, websocket.WebSocketException):
            raise DevError(f"The connection to the ComfyUI server at {self.url} broke off.") from None
        if isinstance(message, bytes):
            return "preview", message
        event = json.loads(message)
        return event["type"], event.get("data")

    def run(self, api: Api, workflow: dict[str, Any] | None = None, **options: Any) -> Run:
        """`queue`, and `wait` with its options, in one."""
        return self.wait(self.queue(api, workflow), **options)

    def history(self, prompt_id: str) -> dict[str, Any]:
        """The history entry of a finished prompt; waits for it, since it appears a little after the last event."""
        deadline = time.monotonic() + HISTORY_WAIT_S
        while time.monotonic() < deadline:
            found = self.request(f"/history/{prompt_id}")
            if prompt_id in found:
                return dict(found[prompt_id])
            time.sleep(0.05)
        raise DevError(f"The server has no history of prompt {prompt_id}.")

    def view(self, output: Output) -> bytes:
        """The content of an output file."""
        query = {"filename": output.filename, "subfolder": output.subfolder, "type": output.type}
        return bytes(self.request(f"/view?{urllib.parse.urlencode(query)}", raw=True))

    def interrupt(self) -> None:
        """Ask the running prompt to stop."""
        self.request("/interrupt", {})

    def free(self) -> None:
        """Ask the server to unload its models and drop its caches."""
        self.request("/free", {"unload_models": True, "free_memory": True})

    def upload(self, path: Path) -> str:
        """Put an image (or another input file) into the server's input folder; returns the name LoadImage takes."""
        boundary = uuid.uuid4().hex
        head = (f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{path.name}"\r\n'
                "Content-Type: application/octet-stream\r\n\r\n").encode()
        body = head + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        stored = self.request("/upload/image", body, kind=f"multipart/form-data; boundary={boundary}")
        return "/".join(part for part in (stored.get("subfolder"), stored["name"]) if part)


def rejection(body: dict[str, Any]) -> str:
    """One sentence out of the server's answer to an invalid workflow; a dropdown's list of files can be endless."""
    reasons = [
        f"{node.get('class_type')} (node {number}): {error.get('message')} "
        f"({textwrap.shorten(str(error.get('details')), 160, placeholder='...')})"
        for number, node in (body.get("node_errors") or {}).items() for error in node.get("errors", [])
    ]
    error = body.get("error") or {}
    general = error.get("message", "no reason given") if isinstance(error, dict) else str(error)
    return "The server refused the workflow: " + ("; ".join(reasons) or general).rstrip(".") + "."
