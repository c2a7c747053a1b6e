"""One file of a repository at one commit: read by ranges, or downloaded into the Hub's cache."""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from huggingface_hub import HfApi, constants, get_token, hf_hub_url, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name
from tqdm import tqdm

from slrmerge._version import __version__
from slrmerge.checkpoint.hub.errors import (
    CONNECTION_ERRORS,
    LOG_IN,
    Backoff,
    translate_hub_errors,
    translate_parse_errors,
    with_retries,
)
from slrmerge.checkpoint.hub.ranges import Ranges
from slrmerge.checkpoint.hub.session import RESPONSE_TIMEOUT_S, session
from slrmerge.checkpoint.location import Repository
from slrmerge.errors import HubError, Problem, first_line
from slrmerge.io.pieces import git_digest

_SPARE_BYTES = 50_000_000


def client() -> HfApi:
    """The Hub's client, with slrmerge's user agent and a timeout. Raises HubError for a malformed token or proxy."""
    http = session()
    if http.timeout.read is None:
        http.timeout = RESPONSE_TIMEOUT_S
    if not (get_token() or "").isascii():
        what, remedy = "contains characters that no token has", LOG_IN
        raise HubError(Problem("invalid-token", "the Hugging Face token", what, remedy))
    return HfApi(library_name="slrmerge", library_version=__version__)


def cache_folder(repository: Repository, *, repo_type: str = "model") -> Path:
    """Where the Hub's cache has, or would have, a repository: `blobs` by digest, `snapshots` by commit, `refs`."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository.name, repo_type=repo_type)


def commit_of(commit: object, *, where: str) -> str:
    """The commit that the Hub names for a repository. Raises HubError where it is none."""
    if not re.fullmatch("[0-9a-f]{40}", str(commit)):
        raise HubError(Problem("empty-repository", where, "has no commits yet", "push to it, or name another"))
    return str(commit)


@dataclass(frozen=True, slots=True)
class HubFile:
    """A SourceFile on the Hub; `repository` is pinned to a commit.

    `digest` is the Hub's own: `sha256:…`, or `git-sha1:…` as git names blobs. `is_cached` says whether the Hub's cache
    had the file when it was listed.
    """

    repository: Repository
    name: str
    file_bytes: int
    digest: str
    is_cached: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.repository.name}@{(self.repository.revision or '')[:7]}/{self.name}"

    @property
    def download_bytes(self) -> int:
        return 0 if self.is_cached else self.file_bytes

    @property
    def identity(self) -> tuple[object, ...]:
        return (self.file_bytes, self.digest)

    def open(self, cancelled: Event | None = None) -> "OpenHubFile":
        """See `SourceFile`. No request is made before the first read."""
        return OpenHubFile(self, cancelled or Event())

    def cached_path(self) -> Path | None:
        """A copy in the Hub's cache, unchecked: downloaded for this commit or for another that has the same file."""
        blob = cache_folder(self.repository) / "blobs" / self.digest.rpartition(":")[2]
        if cached := self._cached_for_commit():
            return cached
        return blob if blob.is_file() and blob.stat().st_size == self.file_bytes else None

    def fetch(self, on_bytes: Callable[[int], None] = lambda _: None, cancelled: Event | None = None) -> Path:
        """See `SourceFile`. A cached copy is used if its digest is right, and replaced if not."""
        cached = self._cached_for_commit()
        if cached and self._digest_of(cached) == self.digest:
            on_bytes(self.file_bytes)
            return cached
        if cached:
            cached.unlink()  # usually a link: what it points to may be shared
        for force in (cached is not None, True):
            path = self._download(on_bytes, cancelled or Event(), force=force)
            if (found := self._digest_of(path)) == self.digest:
                return path
        what = f"does not match {self}: it is {found}, the Hub says {self.digest}"
        remedy = "run again; if it happens again, tell the repository's owner"
        raise HubError(Problem("digest-mismatch", str(path), what, remedy))

    def _cached_for_commit(self) -> Path | None:
        found = try_to_load_from_cache(self.repository.name, self.name, revision=self.repository.revision)
        return Path(found) if isinstance(found, str) else None

    def _digest_of(self, path: Path) -> str:
        with open(path, "rb") as file:
            if self.digest.startswith("git-sha1:"):
                return git_digest(file)
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"

    def _download(self, on_bytes: Callable[[int], None], cancelled: Event, *, force: bool) -> Path:
        where, most = str(self), 2 * self.file_bytes + _SPARE_BYTES

        class Reporter(tqdm):  # type: ignore[type-arg]  # generic for mypy only
            """Shows nothing; passes on what the Hub's client reports."""

            monitor_interval = 0

            def __init__(self, *_: object, **__: object) -> None:
                super().__init__(disable=True)
                self.received = 0

            def update(self, n: float | None = 1) -> None:
                if cancelled.is_set():
                    raise HubError(Problem("cancelled", where, "the download was cancelled"))
                self.received += int(n or 0)
                if self.received > most:  # once more than the file, since the client may start over
                    raise HubError(Problem("invalid-response", where, "the response does not end", "try again later"))
                on_bytes(int(n or 0))

            def update_transfer(self, n: float | None = 1) -> None:
                pass  # the same bytes once more, as they travel

            def set_transfer_postfix_str(self, *_: object, **__: object) -> None:
                pass

        def download() -> str:
            try:
                return client().hf_hub_download(
                    self.repository.name,
                    self.name,
                    revision=self.repository.revision,
                    force_download=force,
                    tqdm_class=Reporter,
                )
            except ValueError as error:
                if isinstance(error.__cause__, Exception):  # with `force_download` the client wraps its errors
                    raise error.__cause__ from error
                raise HubError(Problem("download-failed", where, first_line(error))) from error

        # The client retries too, but not after every failure.
        return Path(with_retries(download, where=where, cancelled=cancelled, attempts=2))


class OpenHubFile:
    """An OpenFile on the Hub, read by ranges."""

    def __init__(self, file: HubFile, cancelled: Event) -> None:
        self._file, self._cancelled = file, cancelled
        url = hf_hub_url(file.repository.name, file.name, revision=file.repository.revision)
        self._ranges = Ranges(url, file.file_bytes)

    def stream(self, start: int, stop: int) -> "_HubStream":
        return _HubStream(self._chunks(start, stop))

    def clone_to(self, target: int, start: int, stop: int) -> bool:  # noqa: ARG002
        """See `OpenFile`: what is not on this disk cannot be cloned."""
        return False

    def check_unchanged(self) -> None:
        """A commit does not change."""

    def close(self) -> None:
        """Nothing is held open between reads."""

    def _chunks(self, position: int, stop: int) -> Iterator[bytes]:
        """The bytes from `position` to `stop`, requested again from where a response broke off."""
        backoff = Backoff(self._cancelled)
        where = str(self._file)
        with translate_hub_errors(where), translate_parse_errors(where):
            while position < stop:
                try:
                    for chunk in self._ranges.chunks(position, stop):
                        position += len(chunk)
                        backoff.progress(len(chunk))
                        yield chunk
                except CONNECTION_ERRORS as error:
                    backoff.wait(error)


class _HubStream:
    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._left = memoryview(b"")

    def readinto(self, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            self._left = self._left or memoryview(next(self._chunks, b""))
            if not self._left:
                raise ValueError("read past the end of the stream")
            part = self._left[: len(buffer) - done]
            buffer[done : done + len(part)] = part
            done, self._left = done + len(part), self._left[len(part) :]
