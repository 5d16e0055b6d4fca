"""A local server that speaks as much of the Hugging Face Hub as `huggingface_hub` needs to find and fetch a file.

The Hub answers `/REPO/resolve/REVISION/PATH` with the file's hash, size and commit and a redirect to another host, the
CDN, which sends the bytes and knows ranges. Every way in which that goes wrong in practice is a `Fault`.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import folder_paths

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE = 64 * 1024
PAGE = b"<!DOCTYPE html><title>Log in to the network</title>" * 20


@dataclass
class Fault:
    """What the server does wrong with one file."""

    status: int | None = None  # the Hub refuses with this status
    error_code: str | None = None  # and this X-Error-Code
    cdn_status: int | None = None  # the CDN refuses
    cut_after: list[int] = field(default_factory=list)  # bytes after which the next bodies break off
    always_cut: bool = False  # every body breaks off before its first byte
    corrupt: bool = False  # a byte of the body is not what the hash says
    longer: int = 0  # bytes too many, without an announced length
    ignore_range: bool = False  # always the whole body, with 200
    no_hash: bool = False  # an etag that is no SHA-256
    renamed_to: str | None = None  # the repository moved: a relative redirect first
    pause_s: float = 0.0  # before each piece of the body
    drip: int = PIECE  # bytes of a piece
    pages: int = 0  # so many of the next bodies are a web page with status 200
    headers: dict[str, str | None] = field(default_factory=dict)  # of the body, instead of ours; None: absent
    sent_status: int | None = None  # of the body, in place of the right one
    cdn_place: str | None = None  # the CDN redirects there; "" is its own address, again and again
    endless: bool = False  # bodies of errors and redirects never end
    stall: str = ""  # "hub" or "cdn" accepts the connection and says nothing
    revisions: tuple[str, ...] = ("main", COMMIT)  # under which the file is found


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None
    cdn: bool


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub = self.server.hub
        path = self.path.partition("?")[0]
        headers = self.headers
        hub.requests.append(Request(self.command, path, headers["Range"], headers["Authorization"], self.server.cdn))
        with contextlib.suppress(ConnectionError):
            self.send_file(path) if self.server.cdn else self.resolve(path)

    def reply(self, status: int, headers: dict[str, str], fault: Fault | None = None) -> None:
        endless = fault is not None and fault.endless and self.command == "GET"
        self.send_response(status)
        for name, value in {"Content-Length": str(10**12) if endless else "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        while endless:
            self.wfile.write(bytes(PIECE))
            self.server.hub.wasted += PIECE

    def stalled(self, fault: Fault) -> bool:
        """Say nothing until the client gives up or the test ends."""
        if fault.stall != ("cdn" if self.server.cdn else "hub"):
            return False
        self.close_connection = True
        self.connection.settimeout(60)
        with contextlib.suppress(OSError):
            self.server.hub.left.append(self.connection.recv(1))
        return True

    def resolve(self, path: str) -> None:
        hub = self.server.hub
        repo, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        key = f"{repo}/{name}"
        if key not in hub.files:
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content, fault = hub.files[key], hub.faults[key]
        if self.stalled(fault):
            return None
        if revision not in fault.revisions:
            return self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        if fault.status:
            return self.reply(fault.status, {"X-Error-Code": fault.error_code} if fault.error_code else {}, fault)
        if fault.renamed_to and repo != fault.renamed_to:
            hub.files[f"{fault.renamed_to}/{name}"], hub.faults[f"{fault.renamed_to}/{name}"] = content, fault
            return self.reply(307, {"Location": f"/{fault.renamed_to}/resolve/{rest}"})
        etag = 'W/"abc"' if fault.no_hash else f'"{hashlib.sha256(content).hexdigest()}"'
        self.reply(302, {"Location": f"{hub.cdn_url}/{key}?signature=1", "X-Repo-Commit": COMMIT,
                         "X-Linked-Etag": etag, "X-Linked-Size": str(len(content)), "ETag": '"pointer"'})

    def send_file(self, path: str) -> None:
        hub, key = self.server.hub, path.lstrip("/")
        content, fault = hub.files[key], hub.faults[key]
        if self.stalled(fault):
            return None
        if fault.cdn_place is not None:
            return self.reply(302, {"Location": fault.cdn_place or f"{hub.cdn_url}/{key}"}, fault)
        if fault.cdn_status:
            return self.reply(fault.cdn_status, {}, fault)
        if fault.pages:
            fault.pages -= 1
            return self.send_body(200, PAGE, fault, {"Content-Type": "text/html", "Content-Length": str(len(PAGE))})
        start = 0
        if self.headers["Range"] and not fault.ignore_range:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        body = content[start:]
        if fault.corrupt:
            body = body[:-1] + bytes([body[-1] ^ 1])
        length = {} if fault.longer else {"Content-Length": str(len(body))}
        body += bytes(fault.longer)
        partial = self.headers["Range"] and not fault.ignore_range
        ranges = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if partial else {}
        self.send_body(206 if partial else 200, body, fault, {**length, **ranges})

    def send_body(self, status: int, body: bytes, fault: Fault, headers: dict[str, str]) -> None:
        cut = 0 if fault.always_cut else fault.cut_after.pop(0) if fault.cut_after else None
        self.send_response(fault.sent_status or status)
        self.close_connection = True
        for name, value in {"Connection": "close", **headers, **fault.headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        for place in range(0, len(body), fault.drip):
            if cut is not None and place >= cut:
                return
            time.sleep(fault.pause_s)
            self.wfile.write(body[place:place + fault.drip])


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubServer, cdn: bool) -> None:
        self.hub, self.cdn = hub, cdn
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://{'localhost' if self.cdn else '127.0.0.1'}:{self.server_address[1]}"


class HubServer:
    """Hub and CDN, each on a port and under a host name of its own, with the files that were added."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, Fault] = {}
        self.requests: list[Request] = []
        self.wasted = 0  # bytes of endless bodies that were taken from us
        self.left: list[bytes] = []  # b"" for each client that gave up on a stalled answer
        self._hub, self._cdn = _Server(self, cdn=False), _Server(self, cdn=True)
        self.url, self.cdn_url = self._hub.url, self._cdn.url

    def add(self, repo: str, path: str, content: bytes, **fault: Any) -> Fault:
        """Publish a file; the returned Fault may be changed later."""
        self.files[f"{repo}/{path}"] = content
        self.faults[f"{repo}/{path}"] = Fault(**fault)
        return self.faults[f"{repo}/{path}"]

    def bodies(self) -> list[Request]:
        """The requests for bytes, as opposed to information."""
        return [request for request in self.requests if request.cdn and request.method == "GET"]

    @contextlib.contextmanager
    def running(self) -> Iterator[HubServer]:
        for server in (self._hub, self._cdn):
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield self
        finally:
            for server in (self._hub, self._cdn):
                server.shutdown()
                server.server_close()


def publish(hub: HubServer, files: Iterable[Any], size: int, **fault: Any) -> dict[str, bytes]:
    """Put a stand-in of `size` bytes for each of these `WeightFile`s on the hub; returns them by file name."""
    contents = {file.name: file.id.encode().ljust(32, b"-") * (size // 32) for file in files}
    for file in files:
        hub.add(file.repo, file.path, contents[file.name], **fault)
    return contents


def put_pinned(models: Path, files: Iterable[Any], size: int) -> dict[str, bytes]:
    """Stand-ins for those whose hash is pinned, which no stand-in on a hub has, as if fetched by hand; by file name."""
    paths = [models / file.folder / file.name for file in files if file.sha256]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
    return {path.name: bytes(size) for path in paths}


def use_folders(root: Path, monkeypatch: Any) -> None:
    """Make ComfyUI's model folders those below `root`, in the order that core gives them."""
    monkeypatch.setattr(folder_paths, "models_dir", str(root))
    places = {"diffusion_models": ("unet", "diffusion_models"), "text_encoders": ("text_encoders", "clip"),
              "vae": ("vae",)}
    for folder, names in places.items():
        entry = ([str(root / name) for name in names], folder_paths.supported_pt_extensions)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, folder, entry)
