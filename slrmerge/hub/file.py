"""One file of a repository at one commit: streamed by ranges, or fetched whole into the Hub's cache."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any

from huggingface_hub import HfApi, constants, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status
from tqdm import tqdm

import slrmerge
from slrmerge.errors import HubError, Problem
from slrmerge.hub.failures import Patience, UnsoundAnswerError, in_words, may_pass, patiently
from slrmerge.repository import Repository


def client() -> HfApi:
    """The Hub's client, which says who is asking."""
    return HfApi(library_name="slrmerge", library_version=slrmerge.__version__)


class HubFile:
    """A RemoteFile on the Hub. `repository` is pinned to a commit; safe to share between threads."""

    def __init__(self, repository: Repository, name: str, *, file_bytes: int, digest: str) -> None:
        self.repository, self.name = repository, name
        self.file_bytes, self.digest = file_bytes, digest
        self._direct: str | None = None
        self._goes_direct = True

    def __str__(self) -> str:
        return f"{self.repository.name}@{(self.repository.revision or '')[:7]}/{self.name}"

    def stream(self, start: int, stop: int, *, given_up: Event | None = None) -> Iterator[memoryview]:
        """See `RemoteFile`. An answer counts only if it is the range that was asked for, and all of it."""
        position, patience = start, Patience(given_up)
        with in_words(str(self)):
            while position < stop:
                try:
                    with self._range(position, stop) as chunks:
                        for chunk in chunks:
                            position += len(chunk)
                            patience.progressed()
                            yield memoryview(chunk)
                    if position < stop:
                        raise UnsoundAnswerError(f"sent {stop - position:,} bytes less than it said")
                except HTTPError as error:
                    patience.wait(error)

    def fetch(self, on_bytes: Callable[[int], None] = lambda _: None) -> Path:
        """See `RemoteFile`. What is in the Hub's cache is taken from there."""
        cached = try_to_load_from_cache(self.repository.name, self.name, revision=self.repository.revision)
        if isinstance(cached, str):
            path = Path(cached)
            on_bytes(self.file_bytes)
        else:
            path = patiently(lambda: self._download(on_bytes), where=str(self))
        try:
            self.check(path)
        except HubError:
            for place in (path.resolve(), path):  # or it would be taken from there ever after
                with suppress(OSError):
                    place.unlink()
            raise
        return path

    def check(self, path: Path) -> None:
        """See `RemoteFile`."""
        kind, _, expected = self.digest.partition(":")
        with open(path, "rb") as file:
            if kind == "git-sha1":
                start = f"blob {os.fstat(file.fileno()).st_size}\0".encode()
                found = hashlib.sha1(start + file.read(), usedforsecurity=False).hexdigest()
            else:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            what = f"is not {self}: its {kind} is {found}, the Hub says {expected}"
            raise HubError(Problem(str(path), what, "fetch it again"))

    def _download(self, on_bytes: Callable[[int], None]) -> Path:
        revision, told = self.repository.revision, _told(on_bytes)
        return Path(client().hf_hub_download(self.repository.name, self.name, revision=revision, tqdm_class=told))

    @contextmanager
    def _range(self, start: int, stop: int) -> Iterator[Iterator[bytes]]:
        """The bytes from `start` to `stop`, as they come. Raises HTTPError for any other answer.

        The Hub sends on to where large files are, by an address that is good for a while: later ranges go there
        without asking the Hub again, as long as that works. The token is for the Hub only.
        """
        direct = self._direct
        url = direct or hf_hub_url(self.repository.name, self.name, revision=self.repository.revision)
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if direct is None:
            headers |= build_hf_headers(library_name="slrmerge", library_version=slrmerge.__version__)
        timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout_s) as response:
            try:
                self._require_range(response, start, stop)
            except UnsoundAnswerError:
                if direct is not None:
                    self._direct, self._goes_direct = None, False
                raise
            if self._goes_direct and _origin(str(response.url)) != _origin(constants.ENDPOINT):
                self._direct = str(response.url)
            yield response.iter_raw()

    def _require_range(self, response: Any, start: int, stop: int) -> None:
        """Raise UnsoundAnswerError unless an answer is the range, or another HTTPError where it says what is wrong."""
        if response.status_code != 206:
            if may_pass(response.status_code) or _origin(str(response.url)) == _origin(constants.ENDPOINT):
                hf_raise_for_status(response)
            raise UnsoundAnswerError(f"answered {response.status_code} when asked for a range of a file")
        wanted, found = f"bytes {start}-{stop - 1}/{self.file_bytes}", response.headers.get("Content-Range", "nothing")
        length = response.headers.get("Content-Length", str(stop - start))
        if found != wanted or length != str(stop - start):
            raise UnsoundAnswerError(f"answered with {found} when asked for {wanted}")


def _origin(url: str) -> tuple[str, ...]:
    return tuple(url.split("/")[:3])


def _told(on_bytes: Callable[[int], None]) -> "type[tqdm[Any]]":
    """A progress bar for the Hub's client that shows nothing and hands on what it is told."""

    class Told(tqdm):  # type: ignore[type-arg]
        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(disable=True)

        def update(self, n: float | None = 1) -> None:
            on_bytes(int(n or 0))

    return Told
