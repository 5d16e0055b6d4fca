"""The network side of a download: one body over HTTP, checked before a byte of it is taken, left at any moment.

Every request runs in a thread of its own. Whoever waits for it looks at the user's wish to stop several times a second,
also while a name is looked up, a connection is made or a redirect followed, and leaves the thread behind: it ends with
its connection, which is shut down then, or with its time limit.

The session is `huggingface_hub`'s, which knows the proxy and the certificates: httpx's from version 1.0 on, requests'
before. Redirects are followed here, as both libraries read the bodies of redirects, and the Hub's library those of
errors, however long they are.
"""

from __future__ import annotations

import queue
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit

POLL_S = 0.2  # how often the wish to stop is looked at
PIECES_AHEAD = 16  # arrived and not yet written; 64 kB each at most
PIECE = 1 << 14  # bytes taken at a time where the library collects them
MOST_REDIRECTS = 10
TEMPORARY = (408, 425, 429)  # and every status from 500 on
NO_FILE = ("text/html", "application/xhtml+xml", "application/json", "application/xml", "text/xml", "multipart/")

T = TypeVar("T")


class Cancelled(Exception):
    """The user stopped the download; what has arrived is kept."""


class Trouble(Exception):
    """Why a request gave nothing: a reason in a few words, or the server's status (and its X-Error-Code).

    lasting: a new attempt would meet the same.
    """

    def __init__(self, reason: str = "", status: int | None = None, code: str = "", lasting: bool = False) -> None:
        super().__init__(reason or f"status {status}")
        self.reason, self.status, self.code, self.lasting = reason, status, code, lasting


class WrongAnswer(Trouble):
    """The server was reached and sent, or led to, something else than the file."""


def network_errors() -> tuple[type[Exception], ...]:
    """What the library's calls raise: OSError, and the base of its HTTP client's errors, whichever client that is."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)


def trouble_of(error: BaseException) -> Trouble:
    """The Trouble behind an error of the library or of its HTTP client."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    response = getattr(error, "response", None)
    if response is not None:
        return refusal(response)
    if isinstance(error, OfflineModeIsEnabled):
        return Trouble(code="Offline", reason="offline mode", lasting=True)
    return Trouble(" ".join(str(error).split())[:160] or type(error).__name__)


def refusal(response: Any) -> Trouble:
    """The Trouble that a response with an error status stands for; its body is not looked at."""
    status = response.status_code
    return Trouble(status=status, code=response.headers.get("X-Error-Code") or "",
                   lasting=status < 500 and status not in TEMPORARY)


def unless_cancelled(work: Callable[[], T], cancel: threading.Event) -> T:
    """The result of `work`, which a thread does that is left behind when the user cancels first."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # goes to whoever waits
            future.set_exception(error)

    threading.Thread(target=run, name="ovi-look-up", daemon=True).start()
    while True:
        if cancel.is_set():
            raise Cancelled
        if wait([future], POLL_S).done:
            return future.result()


class Body:
    """The bytes of a file of `size` bytes from `start` to its end, as they arrive; a context manager to iterate over.

    Iterating raises Trouble, or Cancelled within POLL_S of the wish.
    """

    def __init__(self, url: str, start: int, size: int, cancel: threading.Event) -> None:
        self.url, self.start, self.size = url, start, size
        self._cancel, self._left = cancel, threading.Event()
        self._arrived: queue.Queue[bytes | Exception | None] = queue.Queue(PIECES_AHEAD)
        self._shut_down: Callable[[], None] = lambda: None

    def __enter__(self) -> Body:
        threading.Thread(target=self._run, name="ovi-body", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._shut_down()

    def __iter__(self) -> Iterator[bytes]:
        while True:
            if self._cancel.is_set():
                raise Cancelled
            try:
                arrived = self._arrived.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if isinstance(arrived, Exception):
                raise arrived
            if arrived is None:
                return
            yield arrived

    def _run(self) -> None:
        end: Exception | None = None
        try:
            self._read()
        except network_errors() as error:
            end = trouble_of(error)
        except Exception as error:  # goes to whoever iterates
            end = error
        self._hand_over(end)

    def _read(self) -> None:
        from huggingface_hub.utils import build_hf_headers

        headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={self.start}-"}
        with opened(self.url, headers) as response:
            self._shut_down = shut_down(response)
            skip = self.start - first_byte(response, self.start, self.size)
            for piece in pieces(response):
                if skip < len(piece) and not self._hand_over(piece[skip:]):
                    return
                skip = max(0, skip - len(piece))

    def _hand_over(self, piece: bytes | Exception | None) -> bool:
        """False once nobody waits any more."""
        while not self._left.is_set():
            with suppress(queue.Full):
                self._arrived.put(piece, timeout=POLL_S)
                return True
        return False


def first_byte(response: Any, start: int, size: int) -> int:
    """Where in a file of `size` bytes a response begins: at `start`, as asked, or at 0.

    WrongAnswer, or the Trouble of its status, if it cannot be that file.
    """
    status, headers = response.status_code, response.headers
    if status >= 400:
        raise refusal(response)
    kind = (headers.get("Content-Type") or "").strip().lower()
    if kind.startswith(NO_FILE):
        raise WrongAnswer(f"a page ({kind.partition(';')[0]}) came in place of the file")
    encoding = (headers.get("Content-Encoding") or "identity").strip().lower()
    if encoding != "identity":
        raise WrongAnswer(f"the file came encoded ({encoding[:20]}), which was not asked for")
    length = headers.get("Content-Length") or ""
    if status == 206:
        found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", (headers.get("Content-Range") or "").strip())
        first, last, total = map(int, found.groups()) if found else (-1, -1, -1)
        if first != start or total != size or not start <= last < size or length not in ("", str(last - first + 1)):
            raise WrongAnswer(f"bytes from {start} of {size} were asked for and the server sends "
                          f"{(headers.get('Content-Range') or 'others')[:60]!r}")
        return start
    if status != 200:
        raise Trouble(status=status, lasting=True)
    if length != str(size):
        raise WrongAnswer(f"{size} bytes were expected and the server sends {length[:20] or 'an untold number'}")
    return 0


@contextmanager
def opened(url: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """The response that a chain of redirects ends with, its body unread."""
    for _ in range(MOST_REDIRECTS + 1):
        with request(url, headers) as response:
            place = response.headers.get("Location") if response.status_code in (301, 302, 303, 307, 308) else None
            if place is None:
                yield response
                return
        url, headers = redirected(url, headers, place)
    raise WrongAnswer(f"more than {MOST_REDIRECTS} redirects", lasting=True)


def request(url: str, headers: Mapping[str, str]) -> Any:
    """A GET whose body is not read and whose redirects are not followed, as a context manager."""
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT as timeout
    from huggingface_hub.utils import get_session

    session: Any = get_session()
    if callable(getattr(session, "stream", None)):
        return session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=False)
    import requests

    prepared = session.prepare_request(requests.Request("GET", url, headers=dict(headers)))
    settings = session.merge_environment_settings(url, {}, True, None, None)
    return session.get_adapter(url).send(prepared, timeout=timeout, **settings)


def redirected(url: str, headers: Mapping[str, str], place: str) -> tuple[str, Mapping[str, str]]:
    """Address and headers after a redirect; the token stays with its host. WrongAnswer if no download leads there."""
    try:
        target = quote(urljoin(url, place), safe="!#$%&'()*+,/:;=?@[]~")
        old, new = urlsplit(url), urlsplit(target)
        known = re.fullmatch(r"[\w.-]+|[\da-f:.]+", new.hostname or "", re.A) and new.scheme in ("https", "http")
        lost = not known or new.port == 0
    except ValueError:
        lost = True
    if lost:
        raise WrongAnswer(f"a redirect leads to {place[:80]!r}, which is no place on the web", lasting=True)
    if old.scheme == "https" and new.scheme == "http":
        raise WrongAnswer(f"a redirect leads from https to http ({new.netloc[:80]}), where anyone could change it",
                          lasting=True)
    if new.netloc != old.netloc:
        headers = {name: value for name, value in headers.items() if name.lower() not in ("authorization", "cookie")}
    return target, headers


def pieces(response: Any) -> Iterator[bytes]:
    """The body as it arrives."""
    if hasattr(response, "iter_raw"):
        return response.iter_raw()
    return response.iter_content(PIECE)


def shut_down(response: Any) -> Callable[[], None]:
    """A function that ends the connection under whoever reads from it, as closing alone does not."""
    stream = getattr(response, "extensions", {}).get("network_stream")

    def end() -> None:
        with suppress(OSError, ValueError, RuntimeError):  # it may have ended by itself
            if stream is None:  # requests; its urllib3 can do it from 2.3 on
                response.raw.shutdown()
            else:  # around TLS, whose own farewell would wait for the other side
                socket.socket.shutdown(stream.get_extra_info("socket"), socket.SHUT_RDWR)

    return end if stream is not None or hasattr(response.raw, "shutdown") else lambda: None
