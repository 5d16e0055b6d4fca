"""HTTP routes behind the buttons of 'Ovi Weights': list the files, start a download, stop it.

A client names files by their ids in this pack's own table, never by address or path. ComfyUI's origin check stands
before every route; the POST routes take JSON only, which no form on another page can send, and little of it. What
happens to a download goes to every open page as `ovi-native.weights` events.
"""

from __future__ import annotations

import asyncio
import json
import logging
import reprlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from aiohttp import web

from ..ovi_model.files import download
from ..ovi_model.files.catalogue import WeightFile, bytes_to_fetch, missing, pick, unpinned
from ..ovi_model.files.disk import free_bytes
from ..ovi_model.files.model_folders import target
from ..ovi_model.files.names import printable
from ..ovi_model.ovi.catalogue import DEFAULT_PRECISION, FILES, restricted
from ..ovi_model.ovi.needs import needs
from ..ovi_model.ovi.variants import DEFAULT_VARIANT

PREFIX = "/ovi-native/weights"
EVENT = "ovi-native.weights"
EVENT_EVERY_S = 0.25
LARGEST_BODY = 1 << 16  # bytes of a request; all ids of the table take less than one thousand
LONGEST_CHOICE = 100  # letters of a name that are looked at
RUNNING, DONE, FAILED, CANCELLED = "running", "done", "failed", "cancelled"

Send = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """What a page shows of a download. Sizes in bytes; `name` is the current file, `error` a sentence."""

    state: str
    files: tuple[str, ...]
    name: str = ""
    phase: str = ""
    done: int = 0
    size: int = 0
    all_done: int = 0
    all_size: int = 0
    error: str = ""


class Downloads:
    """The one download that may run at a time, in a thread of its own; `send` gets its events."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.job: Job | None = None
        self._cancel = threading.Event()
        self._lock = threading.Lock()
        self._sent = 0.0

    def start(self, files: Sequence[WeightFile]) -> bool:
        """Begin to download; False while another download is running."""
        with self._lock:
            if self.job and self.job.state == RUNNING:
                return False
            self._cancel = threading.Event()
            self.job = Job(RUNNING, tuple(file.id for file in files), all_size=sum(file.size for file in files))
        threading.Thread(target=self._run, args=(files, self._cancel), name="ovi-weights", daemon=True).start()
        return True

    def cancel(self) -> None:
        """Ask the running download to stop."""
        self._cancel.set()

    def _run(self, files: Sequence[WeightFile], cancel: threading.Event) -> None:
        state, error = FAILED, "The download stopped unexpectedly; ComfyUI's log says why."
        self._tell(force=True)
        try:
            paths = download.fetch(files, self._progress, cancel)
            state, error = DONE, ""
            logging.info("Ovi Native downloaded %s", ", ".join(map(printable, paths)))
        except download.Cancelled:
            state, error = CANCELLED, ""
        except download.DownloadError as failure:
            error = str(failure)
            logging.warning("Ovi Native: %s", error)
        finally:
            self._tell(force=True, state=state, error=error)

    def _progress(self, progress: download.Progress) -> None:
        self._tell(name=progress.file.name, phase=progress.phase, done=progress.done, size=progress.size,
                   all_done=progress.all_done, all_size=progress.all_size)

    def _tell(self, force: bool = False, **changes: Any) -> None:
        assert self.job is not None
        self.job = replace(self.job, **changes)
        now = time.monotonic()
        if force or now - self._sent >= EVENT_EVERY_S:
            self._sent = now
            self.send(EVENT, asdict(self.job))


def listing(variant: str, precision: str) -> dict[str, Any]:
    """What a page shows: each needed file and whether it is here; ValueError for an unknown variant or precision."""
    listed = needs(variant, precision)
    absent = missing(listed)
    targets = [target(file) for file in absent]
    folders = {printable(path.parent): free_bytes(path) for path in targets}
    return {
        "variant": variant,
        "precision": precision,
        "files": [{
            "id": need.file.id, "what": need.what, "name": need.file.name, "repo": need.file.repo,
            "folder": printable(target(need.file).parent), "size": need.file.size, "partial": need.partial,
            "present": need.present, "found": list(map(printable, need.found)), "pinned": bool(need.file.sha256),
            "licence": need.file.licence,
        } for need in listed],
        "missing": [file.id for file in absent],
        "unpinned": unpinned(absent),
        "restricted": restricted(need.file for need in listed),
        "missing_size": sum(file.size for file in absent),
        "bytes_to_fetch": bytes_to_fetch(listed),
        "free": folders,
    }


def register(routes: web.RouteTableDef, send: Send) -> Downloads:
    """Add the routes to the server's table; `send(event, data)` reaches every open page. Starts nothing."""
    downloads = Downloads(send)

    def shown() -> dict[str, Any] | None:
        return asdict(downloads.job) if downloads.job else None

    @routes.get(PREFIX)
    async def list_files(request: web.Request) -> web.Response:
        query = request.query
        variant, precision = query.get("variant", DEFAULT_VARIANT), query.get("precision", DEFAULT_PRECISION)
        try:
            found = await asyncio.to_thread(listing, variant[:LONGEST_CHOICE], precision[:LONGEST_CHOICE])
        except ValueError as error:
            return refuse(400, str(error))
        return web.json_response({**found, "job": shown()})

    @routes.post(f"{PREFIX}/download")
    async def start(request: web.Request) -> web.Response:
        try:
            files = wanted_files(await read_json(request))
        except Refusal as refusal:
            return refuse(refusal.status, str(refusal))
        except ValueError as error:
            return refuse(400, str(error))
        if not downloads.start(files):
            return refuse(409, "A download is running already: wait for it, or cancel it.")
        return web.json_response({"job": shown()}, status=202)

    @routes.post(f"{PREFIX}/cancel")
    async def cancel(request: web.Request) -> web.Response:
        if request.content_type != "application/json":
            return refuse(415, "Send JSON, with the content type application/json.")
        downloads.cancel()  # whatever the body says
        return web.json_response({"job": shown()})

    return downloads


class Refusal(Exception):
    """A request that is not taken: the status of the answer, and a sentence for whoever sent it."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


async def read_json(request: web.Request) -> Any:
    """The JSON of a request's body, read no further than a body of ours can be long; Refusal if it is none."""
    if request.content_type != "application/json":
        raise Refusal(415, "Send JSON, with the content type application/json.")
    if (request.charset or "utf-8").lower() not in ("utf-8", "utf8", "us-ascii"):
        raise Refusal(415, f"Send JSON in UTF-8, not in {request.charset!r:.40}.")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Refusal(415, "Send the JSON as it is, not compressed.")
    body = bytearray()
    async for piece in request.content.iter_any():
        body += piece
        if len(body) > LARGEST_BODY:
            raise Refusal(413, f"The request is too long: at most {LARGEST_BODY} bytes are read.")
    try:
        return json.loads(body.decode("utf-8"))
    except RecursionError:
        raise Refusal(400, "The JSON is nested too deeply.") from None
    except ValueError as error:  # of the decoder too
        raise Refusal(400, f"The request is no JSON in UTF-8 ({str(error)[:100]}).") from None


def wanted_files(body: Any) -> list[WeightFile]:
    """The files that a request names, as {"files": [id, ...]}; ValueError for anything else."""
    ids = body.get("files") if isinstance(body, dict) else None
    if not isinstance(ids, list) or not ids or not all(isinstance(id, str) for id in ids):
        raise ValueError(f'Expected {{"files": [ids of files]}}, got {reprlib.repr(body)[:100]}.')
    return pick(FILES, (id[:LONGEST_CHOICE] for id in ids))


def refuse(status: int, reason: str) -> web.Response:
    """An answer that says why not."""
    return web.json_response({"error": reason}, status=status)
