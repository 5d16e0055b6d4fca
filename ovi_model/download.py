"""Fetch weight files from the Hugging Face Hub into ComfyUI's folders: resumed, checked, and moved into place at once.

`huggingface_hub` finds the addresses, the mirror (HF_ENDPOINT), the token and the proxy. Its own `hf_hub_download`
throws an interrupted download away (seen in 2.4.0), so the bytes are read here, over plain HTTP, which mirrors and the
Hub's Xet storage both serve. The library is imported by the first download: this module costs nothing at start-up.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from . import weights
from .weights import WeightFile, human

READ = 1 << 20  # bytes of a file hashed at a time
CHUNK = 1 << 16  # bytes taken from the network at a time: what is lost when the connection breaks
RETRIES = 5  # in a row, without a byte between them
RETRY_PAUSE_S = 1.0
DOWNLOADING, CHECKING = "downloading", "checking"


class DownloadError(RuntimeError):
    """A download that cannot go on; the text is one sentence for the user."""


class Cancelled(Exception):
    """The user stopped the download; what has arrived is kept."""


class _Interrupted(Exception):
    """The connection broke; its cause is the library's exception."""


@dataclass(frozen=True)
class Remote:
    """A file as the Hub describes it: the address of that exact revision, its size in bytes, its SHA-256."""

    file: WeightFile
    url: str
    size: int
    sha256: str

    @property
    def target(self) -> Path:
        return weights.target(self.file)

    @property
    def partial(self) -> Path:
        return weights.partial_path(self.target, self.sha256)

    @property
    def kept(self) -> int:
        """Bytes of it that are here already."""
        return min(self.partial.stat().st_size, self.size) if self.partial.exists() else 0


@dataclass(frozen=True)
class Progress:
    """Where a download stands: bytes of the current file and of all of them, those kept from before included."""

    file: WeightFile
    phase: str
    done: int
    size: int
    all_done: int
    all_size: int


Report = Callable[[Progress], None]


def fetch(files: Sequence[WeightFile], report: Report, cancel: threading.Event,
          endpoint: str | None = None) -> list[Path]:
    """Download `files` one after the other and return where they are.

    All of them are looked up, and the disk is checked, before the first byte is fetched. `report` is called for every
    chunk, in this thread. Raises DownloadError with a sentence, or Cancelled; unfinished files are taken up next time.
    endpoint: the Hub's address, where it is not the library's own (HF_ENDPOINT, else huggingface.co).
    """
    remotes = []
    for file in files:
        if cancel.is_set():
            raise Cancelled
        remotes.append(look_up(file, endpoint))
    check_disk(remotes)
    before, all_size = 0, sum(remote.size for remote in remotes)
    for remote in remotes:
        def tell(phase: str, done: int, remote: Remote = remote, before: int = before) -> None:
            report(Progress(remote.file, phase, done, remote.size, before + done, all_size))
        _fetch_one(remote, tell, cancel)
        before += remote.size
    return [remote.target for remote in remotes]


def look_up(file: WeightFile, endpoint: str | None = None) -> Remote:
    """Ask the Hub for a file's address, size and SHA-256; DownloadError if it cannot or does not say."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        found = get_hf_file_metadata(hf_hub_url(file.repo, file.path, endpoint=endpoint))
    except _network_errors() as error:
        raise _explained(error, file, endpoint) from error
    sha256 = found.etag or ""
    if not found.size or not found.commit_hash or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise DownloadError(f"{_host(endpoint)} does not tell the size and SHA-256 of {file.name}, so a download could "
                            f"not be checked: use another endpoint (HF_ENDPOINT), or fetch the file by hand from "
                            f"https://huggingface.co/{file.repo} into {weights.target(file).parent}.")
    url = hf_hub_url(file.repo, file.path, revision=found.commit_hash, endpoint=endpoint)
    return Remote(file, url, found.size, sha256)


def check_disk(remotes: Sequence[Remote]) -> None:
    """DownloadError if a disk cannot hold what is still to come."""
    for folder, needed, free in weights.disk_shortages((r.target, r.size - r.kept) for r in remotes):
        raise DownloadError(f"The download needs {human(needed)} in {folder} and the disk has {human(free)} free: free "
                            f"{human(needed - free)}, or give ComfyUI another models folder (extra_model_paths.yaml).")


def _fetch_one(remote: Remote, tell: Callable[[str, int], None], cancel: threading.Event) -> None:
    target, partial = remote.target, remote.partial
    with _file_errors(remote), _alone(target):
        for stale in weights.partials(target):
            if stale != partial:  # of a release that the Hub no longer has
                stale.unlink()
        digest = hashlib.sha256()
        with partial.open("a+b") as file:
            _take_up(file, remote, digest, tell, cancel)
            _receive(file, remote, digest, tell, cancel)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != remote.sha256:
            partial.unlink()
            raise DownloadError(f"{target.name} arrived damaged: its SHA-256 is {digest.hexdigest()} and "
                                f"{remote.sha256} was expected. The copy was deleted; start the download again, and "
                                "check HF_ENDPOINT or the proxy if this repeats.")
        os.replace(partial, target)


def _take_up(file: BinaryIO, remote: Remote, digest: Any, tell: Callable[[str, int], None],
             cancel: threading.Event) -> None:
    """Hash what an earlier download left; the file then stands at its end."""
    file.seek(0, os.SEEK_END)
    if file.tell() > remote.size:
        file.truncate(0)
    file.seek(0)
    while chunk := file.read(READ):
        digest.update(chunk)
        tell(CHECKING, file.tell())
        _stop_if(cancel)


def _receive(file: BinaryIO, remote: Remote, digest: Any, tell: Callable[[str, int], None],
             cancel: threading.Event) -> None:
    """Append the rest of the body to the file and the digest, connecting again where the network breaks."""
    failures = 0
    while file.tell() < remote.size:
        start = file.tell()
        try:
            with _body(remote, start) as (resumed, chunks):
                if not resumed and start:  # the server sends everything again: keep what is here, drop it from there
                    chunks = _skip(chunks, start)
                for chunk in chunks:
                    _stop_if(cancel)
                    if file.tell() + len(chunk) > remote.size:
                        raise _Interrupted(f"more than the announced {human(remote.size)} came")
                    file.write(chunk)
                    digest.update(chunk)
                    tell(DOWNLOADING, file.tell())
            if file.tell() < remote.size:
                raise _Interrupted(f"it ended after {human(file.tell())} of {human(remote.size)}")
        except _Interrupted as broken:
            failures = failures + 1 if file.tell() == start else 1
            if failures > RETRIES:
                raise _explained(broken.__cause__ or broken, remote.file, remote.url, file.tell()) from broken
            _stop_if(cancel, RETRY_PAUSE_S)


def _stop_if(cancel: threading.Event, seconds: float = 0.0) -> None:
    """Raise Cancelled once the user wants to stop; looks for that many seconds."""
    if cancel.wait(seconds) if seconds else cancel.is_set():
        raise Cancelled


def _skip(chunks: Iterator[bytes], count: int) -> Iterator[bytes]:
    for chunk in chunks:
        if count < len(chunk):
            yield chunk[count:]
        count = max(0, count - len(chunk))


@contextmanager
def _body(remote: Remote, start: int) -> Iterator[tuple[bool, Iterator[bytes]]]:
    """The file's bytes from `start`: (whether the server began there, chunks). Network trouble raises _Interrupted.

    The library's session is httpx's from huggingface_hub 1.0 on and requests' before; both drop the token when they
    follow a redirect to another host.
    """
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    session: Any = get_session()
    with _interruptions(remote):
        if callable(getattr(session, "stream", None)):
            opened = session.stream("GET", remote.url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT)
        else:
            opened = session.get(remote.url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT, stream=True)
        response = opened.__enter__()
    try:
        with _interruptions(remote):
            hf_raise_for_status(response)
        pieces = response.iter_bytes if hasattr(response, "iter_bytes") else response.iter_content
        yield response.status_code == 206, _guarded(pieces(CHUNK), remote)
    finally:
        opened.__exit__(None, None, None)


def _guarded(chunks: Iterator[bytes], remote: Remote) -> Iterator[bytes]:
    with _interruptions(remote):
        yield from chunks


@contextmanager
def _interruptions(remote: Remote) -> Iterator[None]:
    """Turn network trouble into _Interrupted, and a refusal that a new attempt would meet again into a sentence."""
    try:
        yield
    except _network_errors() as error:
        status = _status(error)
        if status is not None and status < 500 and status not in (408, 429):
            raise _explained(error, remote.file, remote.url) from error
        raise _Interrupted from error


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Keep other processes (a second ComfyUI, the command line) from writing the same file."""
    from filelock import FileLock, Timeout

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f".{target.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise DownloadError(f"{target.name} is being downloaded by another program: wait for it, or stop it.") from None
    try:
        yield
    finally:
        with suppress(OSError):  # on Windows releasing it deletes it, and not before
            Path(lock.lock_file).unlink()
        lock.release()


@contextmanager
def _file_errors(remote: Remote) -> Iterator[None]:
    """Turn what can go wrong with files and disks into a sentence."""
    try:
        yield
    except OSError as error:
        folder = remote.target.parent
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(f"The disk that holds {folder} is full: free {human(remote.size - remote.kept)} and "
                                f"start the download again; {human(remote.kept)} of {remote.file.name} are kept."
                                ) from error
        raise DownloadError(f"{remote.file.name} cannot be written in {folder} ({error.strerror or error}): check the "
                            "folder's permissions.") from error


def _network_errors() -> tuple[type[Exception], ...]:
    """What the library's calls raise: OSError, and the base of its HTTP client's errors, whichever client that is."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _host(endpoint: str | None) -> str:
    from huggingface_hub.constants import ENDPOINT

    return re.sub(r"^https?://", "", endpoint or ENDPOINT).partition("/")[0]


def _explained(error: BaseException, file: WeightFile, endpoint: str | None, kept: int = 0) -> DownloadError:
    """One sentence for a failed request: what happened, and what to do about it."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled

    status, host = _status(error), _host(endpoint)
    page = f"https://huggingface.co/{file.repo}"
    if isinstance(error, OfflineModeIsEnabled):
        return DownloadError("huggingface_hub is in offline mode: unset HF_HUB_OFFLINE, restart, and try again.")
    if isinstance(error, GatedRepoError):
        return DownloadError(f"{file.repo} is open only to those who accepted its terms: accept them on {page}, log in "
                             "with `hf auth login` (or set HF_TOKEN), and try again.")
    if status in (401, 403):
        return DownloadError(f"{host} refuses access to {file.repo} ({status}): log in with `hf auth login` or check "
                             f"HF_TOKEN, then try again.")
    if status == 404:
        return DownloadError(f"{host} has no {file.path} in {file.repo} (404): it may have moved; look for it on "
                             f"{page} and put it into {weights.target(file).parent}.")
    if status is not None:
        return DownloadError(f"{host} answers with an error ({status}) for {file.name}: try again later.")
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    here = f"; {human(kept)} of {file.name} are kept" if kept else ""
    return DownloadError(f"{host} cannot be reached, or the connection broke ({reason}): check the network, the proxy "
                         f"or HF_ENDPOINT, and try again{here}.")
