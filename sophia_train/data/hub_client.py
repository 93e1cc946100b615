"""The Hugging Face Hub over HTTP: commits, listings, and byte ranges that come whole or not at all.

Everything is asked for again, after a wait, when the network or the server fails: no answer, 429, 5xx, a
reset, a body that is short, long or of other bytes than asked for. What a person has to mend is not.
"""

import functools
import itertools
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

import requests
from huggingface_hub import constants, get_token

from sophia_train.errors import MissingInputError, RunError, UnavailableError

Result = TypeVar("Result")


class Unreachable(UnavailableError):
    """The Hub did not answer, or not as it should, however often it was asked."""


class RevisionMissing(MissingInputError):
    """The dataset has no such branch, tag or commit."""


class EntryMissing(MissingInputError):
    """The dataset has no such file or folder."""


class _Fault(Exception):
    """Something that may be better next time."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Patience:
    """How long to bear with a network.

    Args:
        tries: of one request.
        silent_tries: of a request for a commit or a listing, with which all begins, when there is no answer:
            a machine without network is told soon.
        wait_seconds: after the first failure, doubled after each other one.
        longest_wait: what a server may ask for at most (Retry-After).
        connect_seconds: until a connection is there.
        read_seconds: between bytes.
    """

    tries: int = 6
    silent_tries: int = 3
    wait_seconds: float = 1.0
    longest_wait: float = 300.0
    connect_seconds: float = 10.0
    read_seconds: float = 30.0


@dataclass(frozen=True)
class Entry:
    """A file or folder of a listing."""

    path: str
    size: int
    is_file: bool


@dataclass(frozen=True)
class Repository:
    """A dataset on the Hub at `endpoint`. It holds no token: that is read where a request is made."""

    endpoint: str
    name: str
    patience: Patience

    def commit_of(self, ref: str) -> str:
        """Find the commit that a branch or tag is at.

        Raises:
            Unreachable: no answer.
            RevisionMissing: there is none.
            MissingInputError: there is no such dataset, or it is private.
            UnavailableError: the dataset is gated.
        """
        url = f"{self.endpoint}/api/datasets/{quote(self.name)}/revision/{quote(ref, safe='')}"
        answer, _ = self._json(url, ref)
        if not isinstance(answer, dict) or not isinstance(answer.get("sha"), str):
            raise Unreachable(f"{self.endpoint} names no commit of {self.name}; is HF_ENDPOINT a Hub?")
        return answer["sha"]

    def list(self, commit: str, folder: str = "", recursive: bool = True) -> Sequence[Entry]:
        """List a folder sorted by path; raises as `commit_of`, and `EntryMissing`."""
        path = f"/{quote(folder)}" if folder else ""
        url: str | None = (
            f"{self.endpoint}/api/datasets/{quote(self.name)}/tree/{commit}{path}"
            f"?recursive={str(recursive).lower()}"
        )
        found: dict[str, Entry] = {}
        while url:
            answer, url = self._json(url, commit)
            try:
                page = [Entry(each["path"], each.get("size", 0), each["type"] == "file") for each in answer]
            except (TypeError, KeyError):
                raise Unreachable(f"{self.endpoint} lists no files of {self.name}; is it a Hub?") from None
            if not found.keys().isdisjoint(entry.path for entry in page):  # it would go on for ever
                raise Unreachable(f"{self.endpoint} lists files of {self.name} twice; try again later")
            found.update({entry.path: entry for entry in page})
        return sorted(found.values(), key=lambda entry: entry.path)

    def read(self, commit: str, path: str, size: int, start: int, stop: int) -> bytearray:
        """Read bytes of a file of `size` bytes, all of them; raises as `list`."""
        url = f"{self.endpoint}/datasets/{quote(self.name)}/resolve/{commit}/{quote(path)}"
        received = bytearray()  # what came before a failure is kept: a commit's bytes do not change

        def attempt() -> bytearray:
            first = start + len(received)
            with self._open(url, {"Range": f"bytes={first}-{stop - 1}"}, commit) as response:
                content_range = response.headers.get("Content-Range")
                if response.status_code != 206:
                    if (first, stop) != (0, size):
                        raise _Fault("the range asked for was ignored")
                elif content_range not in [f"bytes {first}-{stop - 1}/{total}" for total in (size, "*")]:
                    raise _Fault(f"bytes {first}-{stop - 1}/{size} asked for, {content_range} sent")
                for chunk in response.iter_content(1 << 20):
                    received.extend(chunk)
                    if len(received) > stop - start:
                        received.clear()
                        raise _Fault("more bytes were sent than announced")
            if len(received) < stop - start:
                raise _Fault(f"the body ended {stop - start - len(received):,} bytes early")
            return received

        return self._persist(path, attempt, self.patience.tries) if stop > start else received

    def wait(self, failures: int, asked: float = 0.0) -> None:
        """Wait after the given number of failures, or as long as the server asked."""
        seconds = max(self.patience.wait_seconds * 2 ** (failures - 1), asked)
        _sleep(min(seconds, self.patience.longest_wait))

    def _json(self, url: str, revision: str) -> tuple[Any, str | None]:
        """Read an answer, and the address of its next page."""

        def attempt() -> tuple[Any, str | None]:
            with self._open(url, {}, revision) as response:
                try:
                    answer = response.json()
                except requests.JSONDecodeError:
                    raise _Fault("the answer is not JSON") from None
                return answer, response.links.get("next", {}).get("url")

        answer, following = self._persist("the list of files", attempt, self.patience.silent_tries)
        if following:  # at the endpoint, whatever host it names: the token goes nowhere else
            following = urlunsplit((*urlsplit(self.endpoint)[:2], *urlsplit(following)[2:]))
        return answer, following

    def _persist(self, what: str, attempt: Callable[[], Result], silent_tries: int) -> Result:
        if constants.HF_HUB_OFFLINE:
            raise Unreachable(f"{self.name} is not prepared, and HF_HUB_OFFLINE is set; unset it")
        for failures in itertools.count(1):
            try:
                return attempt()
            except _Fault as fault:
                reason, asked, tries = str(fault), fault.wait, self.patience.tries
            except OSError as error:  # those of requests are some
                reason, asked, tries = _innermost(error), 0.0, silent_tries
            if failures >= tries:
                break
            self.wait(failures, asked)
        host = urlsplit(self.endpoint).netloc
        raise Unreachable(f"{host}: {what} of {self.name} could not be read in {failures} tries ({reason})")

    def _open(self, url: str, headers: Mapping[str, str], revision: str) -> requests.Response:
        times = (self.patience.connect_seconds, self.patience.read_seconds)
        response = _session().get(
            url,
            headers={"Accept-Encoding": "identity", **headers},
            auth=_authorize,
            timeout=times,
            stream=True,
        )
        try:
            self._check(response, revision)
        except BaseException:
            response.close()
            raise
        return response

    def _check(self, response: requests.Response, revision: str) -> None:
        status = response.status_code
        if status in (200, 206):
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise _Fault("the answer is packed, which was not asked for")
            return
        elsewhere = urlsplit(response.url).netloc != urlsplit(self.endpoint).netloc
        if status in (408, 416, 429) or status >= 500 or elsewhere:  # elsewhere: a signed link gone stale
            raise _Fault(f"HTTP {status}", _seconds_asked_for(response.headers))
        raise self._refusal(status, response.headers.get("X-Error-Code", ""), revision)

    def _refusal(self, status: int, code: str, revision: str) -> RunError:
        page = f"{self.endpoint}/datasets/{self.name}"
        if code == "GatedRepo" or (status == 403 and not code):
            return UnavailableError(
                f"data.repo={self.name} is gated; accept its conditions at {page}, then set HF_TOKEN"
            )
        if code == "RevisionNotFound":
            return RevisionMissing(f"data.repo={self.name} has no data.ref={revision}; see {page}/tree/main")
        if code == "EntryNotFound":
            return EntryMissing(
                f"data.repo={self.name} lacks a file at {revision}; see {page}/tree/{revision}"
            )
        if status in (401, 403, 404):
            return MissingInputError(
                f"data.repo={self.name} is not to be seen at {self.endpoint}; check the name, "
                "or if it is private set HF_TOKEN to a token that may read it"
            )
        return UnavailableError(f"{self.endpoint} refuses to serve {self.name} (HTTP {status}); see {page}")


def endpoint() -> str:
    """Where the Hub is: HF_ENDPOINT, or huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


_sleep = time.sleep


@functools.cache
def _session() -> requests.Session:
    return requests.Session()


def _authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Add the user's token; requests drops it where a redirect leaves the host."""
    if token := get_token():
        request.headers["Authorization"] = f"Bearer {token}"
    return request


def _seconds_asked_for(headers: Mapping[str, str]) -> float:
    """Read Retry-After, in seconds or a date, or the Hub's own RateLimit: "resolvers";r=0;t=55."""
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        found = re.search(r";\s*t=(\d+)", headers.get("RateLimit", ""))
        return float(found[1]) if found else 0.0


def _innermost(error: BaseException) -> str:
    """Name the cause; the text around it may hold signed links."""
    causes = [getattr(error, "reason", None), *reversed(error.args)]
    for cause in causes:
        if isinstance(cause, BaseException):
            return _innermost(cause)
    return type(error).__name__
