"""Fetch weight files from the Hugging Face Hub into ComfyUI's folders: resumed, checked, and moved into place at once.

`huggingface_hub` finds the addresses, the mirror (HF_ENDPOINT), the token and the proxy. Its own `hf_hub_download`
throws an interrupted download away (seen in 2.4.0), so the bytes are read here (`transfer`), over plain HTTP, which
mirrors and the Hub's Xet storage both serve. The library is imported by the first download: this module costs nothing
at start-up. A file that is there already is never replaced, neither before the first byte nor after the last.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from . import model_folders
from .catalogue import WeightFile
from .disk import human, is_plain, put_in_place, shortages
from .names import printable
from .transfer import Body, Cancelled, Trouble, WrongAnswer, network_errors, trouble_of, unless_cancelled

READ = 1 << 20  # bytes of a file hashed at a time
RETRIES = 5  # in a row, without a byte between them
RETRY_PAUSE_S = 1.0
DOWNLOADING, CHECKING = "downloading", "checking"


class DownloadError(RuntimeError):
    """A download that cannot go on; the text is one sentence for the user."""

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(sentence))  # it names folders, whose names may be anything


@dataclass(frozen=True)
class Remote:
    """A file as the Hub describes it: the address of that exact revision, its size in bytes, its SHA-256."""

    file: WeightFile
    url: str
    size: int
    sha256: str

    @property
    def target(self) -> Path:
        return model_folders.target(self.file)

    @property
    def partial(self) -> Path:
        return model_folders.partial_path(self.target, self.sha256)

    @property
    def kept(self) -> int:
        """Bytes of it that are here already."""
        return min(self.partial.stat().st_size, self.size) if is_plain(self.partial) else 0


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
    for file in files:
        _refuse_taken(model_folders.target(file))
    remotes = [unless_cancelled(partial(look_up, file, endpoint), cancel) for file in files]
    check_disk(remotes)
    before, all_size = 0, sum(remote.size for remote in remotes)
    for remote in remotes:
        def tell(phase: str, done: int, remote: Remote = remote, before: int = before) -> None:
            report(Progress(remote.file, phase, done, remote.size, before + done, all_size))
        _fetch_one(remote, tell, cancel)
        before += remote.size
    return [remote.target for remote in remotes]


def look_up(file: WeightFile, endpoint: str | None = None) -> Remote:
    """Ask the Hub for a file's address, size and SHA-256.

    DownloadError if it cannot be asked, does not say, or has another file than the one whose hash is pinned.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        found = get_hf_file_metadata(hf_hub_url(file.repo, file.path, revision=file.revision, endpoint=endpoint))
    except network_errors() as error:
        trouble = trouble_of(error)
        if trouble.code == "RevisionNotFound" and file.revision:  # history was rewritten, or a mirror has none
            return look_up(replace(file, revision=None), endpoint)
        raise _explained(trouble, file, endpoint) from error
    sha256, by_hand = found.etag or "", f"https://huggingface.co/{file.repo} into {model_folders.target(file).parent}"
    if not found.size or found.size < 0 or not found.commit_hash or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise DownloadError(f"{_host(endpoint)} does not tell the size and SHA-256 of {file.name}, so a download could "
                            f"not be checked: use another endpoint (HF_ENDPOINT), or fetch the file by hand from "
                            f"{by_hand}.")
    if file.sha256 not in (None, sha256):
        raise DownloadError(f"{_host(endpoint)} has another {file.name} than the one that this pack knows: its SHA-256 "
                            f"is {sha256} and {file.sha256} was expected. Nothing was fetched; update Ovi Native, "
                            f"check HF_ENDPOINT, or, if you trust the new file, fetch it by hand from {by_hand}.")
    url = hf_hub_url(file.repo, file.path, revision=found.commit_hash, endpoint=endpoint)
    return Remote(file, url, found.size, sha256)


def check_disk(remotes: Sequence[Remote]) -> None:
    """DownloadError if a disk cannot hold what is still to come."""
    for folder, needed, free in shortages((r.target, r.size - r.kept) for r in remotes):
        raise DownloadError(f"The download needs {human(needed)} in {folder} and the disk has {human(free)} free: free "
                            f"{human(needed - free)}, or give ComfyUI another models folder (extra_model_paths.yaml).")


def _refuse_taken(target: Path) -> None:
    """DownloadError if there is anything under the name that the download would get."""
    if os.path.lexists(target):
        size = human(target.stat().st_size) if target.is_file() else "no file"
        raise DownloadError(f"{target} is there already ({size}) and is not replaced: delete it or give it another "
                            "name, then start the download again.")


def _fetch_one(remote: Remote, tell: Callable[[str, int], None], cancel: threading.Event) -> None:
    target, unfinished = remote.target, remote.partial
    with _file_errors(remote), _alone(target):
        _refuse_taken(target)
        for stale in model_folders.partials(target):
            if stale != unfinished:  # of a release that the Hub no longer has
                stale.unlink()
        digest = hashlib.sha256()
        with _open_partial(unfinished) as file:
            _take_up(file, remote, digest, tell, cancel)
            _receive(file, remote, digest, tell, cancel)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != remote.sha256:
            unfinished.unlink()
            raise DownloadError(f"{target.name} arrived damaged: its SHA-256 is {digest.hexdigest()} and "
                                f"{remote.sha256} was expected. The copy was deleted; start the download again, and "
                                "check HF_ENDPOINT or the proxy if this repeats.")
        try:
            put_in_place(unfinished, target)
        except FileExistsError:
            _refuse_taken(target)
            raise


def _open_partial(path: Path) -> BinaryIO:
    """Open an unfinished download, or a new one; DownloadError for a link, which would be written through."""
    if not os.path.lexists(path) or is_plain(path):
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        file = os.fdopen(os.open(path, flags, 0o666), "r+b")
        if is_plain(path) and os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
            return file
        file.close()
    raise DownloadError(f"{path} stands where the unfinished download goes, and is a link or no plain file: delete it, "
                        "then start the download again.")


def _take_up(file: BinaryIO, remote: Remote, digest: Any, tell: Callable[[str, int], None],
             cancel: threading.Event) -> None:
    """Hash what an earlier download left; the file then stands at its end."""
    file.seek(0, os.SEEK_END)
    if file.tell() > remote.size:
        file.truncate(0)  # cannot be the beginning of it
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
            with Body(remote.url, start, remote.size, cancel) as body:
                for piece in body:
                    if file.tell() + len(piece) > remote.size:
                        raise Trouble(f"more than the announced {human(remote.size)} came")
                    file.write(piece)
                    digest.update(piece)
                    tell(DOWNLOADING, file.tell())
            if file.tell() < remote.size:
                raise Trouble(f"it ended after {human(file.tell())} of {human(remote.size)}")
        except Trouble as trouble:
            failures = failures + 1 if file.tell() == start else 1
            if trouble.lasting or failures > RETRIES:
                raise _explained(trouble, remote.file, remote.url, file.tell()) from trouble
            _stop_if(cancel, RETRY_PAUSE_S)


def _stop_if(cancel: threading.Event, seconds: float = 0.0) -> None:
    """Raise Cancelled once the user wants to stop; looks for that many seconds."""
    if cancel.wait(seconds) if seconds else cancel.is_set():
        raise Cancelled


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


def _host(endpoint: str | None) -> str:
    from huggingface_hub.constants import ENDPOINT

    return re.sub(r"^https?://", "", endpoint or ENDPOINT).partition("/")[0]


def _explained(trouble: Trouble, file: WeightFile, endpoint: str | None, kept: int = 0) -> DownloadError:
    """One sentence for a failed request: what happened, and what to do about it."""
    status, code, host = trouble.status, trouble.code, _host(endpoint)
    page = f"https://huggingface.co/{file.repo}"
    if code == "Offline":
        return DownloadError("huggingface_hub is in offline mode: unset HF_HUB_OFFLINE, restart, and try again.")
    if code == "GatedRepo":
        return DownloadError(f"{file.repo} is open only to those who accepted its terms: accept them on {page}, log in "
                             "with `hf auth login` (or set HF_TOKEN), and try again.")
    if status in (401, 403):
        return DownloadError(f"{host} refuses access to {file.repo} ({status}): log in with `hf auth login` or check "
                             f"HF_TOKEN, then try again.")
    if status == 404:
        return DownloadError(f"{host} has no {file.path} in {file.repo} (404): it may have moved; look for it on "
                             f"{page} and put it into {model_folders.target(file).parent}.")
    if status is not None:
        return DownloadError(f"{host} answers with an error ({status}) for {file.name}: try again later.")
    here = f"; {human(kept)} of {file.name} are kept" if kept else ""
    if isinstance(trouble, WrongAnswer):
        return DownloadError(f"{host} does not give {file.name} ({trouble.reason}): check whether the network wants a "
                             f"login, the proxy and HF_ENDPOINT, and try again{here}.")
    return DownloadError(f"{host} cannot be reached, or the connection broke ({trouble.reason}): check the network, "
                         f"the proxy or HF_ENDPOINT, and try again{here}.")
