"""One file of a repository at one commit: streamed by ranges, or fetched whole into the Hub's cache."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

from huggingface_hub import HfApi, constants, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name
from tqdm import tqdm

import slrmerge
from slrmerge.errors import HubError, Problem
from slrmerge.hub.failures import FAILURES, ExpiredAddressError, Patience, UnsoundAnswerError, in_words, patiently
from slrmerge.hub.ranges import Ranges
from slrmerge.repository import Repository

ANSWER_S = 60.0
"""How long the Hub may take over an answer that is not a download."""


def client() -> HfApi:
    """The Hub's client, which says who is asking, and does not wait for ever."""
    session = get_session()
    if session.timeout.read is None:
        session.timeout = ANSWER_S
    return HfApi(library_name="slrmerge", library_version=slrmerge.__version__)


def cache_of(repository: Repository) -> Path:
    """Where the Hub's cache has, or would have, a repository: `blobs` by digest, `snapshots` by commit, `refs`."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository.name, repo_type="model")


class HubFile:
    """A RemoteFile on the Hub. `repository` is pinned to a commit; safe to share between threads."""

    def __init__(self, repository: Repository, name: str, *, file_bytes: int, digest: str) -> None:
        self.repository, self.name = repository, name
        self.file_bytes, self.digest = file_bytes, digest
        self._ranges = Ranges(hf_hub_url(repository.name, name, revision=repository.revision), file_bytes)

    def __str__(self) -> str:
        return f"{self.repository.name}@{(self.repository.revision or '')[:7]}/{self.name}"

    def stream(self, start: int, stop: int, *, given_up: Event | None = None) -> Iterator[memoryview]:
        """See `RemoteFile`."""
        position, patience = start, Patience(given_up)
        with in_words(str(self)):
            while position < stop:
                try:
                    for chunk in self._ranges.chunks(position, stop):
                        position += len(chunk)
                        patience.progressed()
                        yield memoryview(chunk)
                except FAILURES as error:
                    patience.wait(error, seconds=0 if isinstance(error, ExpiredAddressError) else None)

    def here(self) -> Path | None:
        """See `RemoteFile`: in the Hub's cache, fetched for this commit or for another that has the same file."""
        blob = cache_of(self.repository) / "blobs" / self.digest.rpartition(":")[2]
        if cached := self._cached():
            return cached
        return blob if blob.is_file() and blob.stat().st_size == self.file_bytes else None

    def fetch(self, on_bytes: Callable[[int], None] = lambda _: None, *, given_up: Event | None = None) -> Path:
        """See `RemoteFile`. What is in the Hub's cache for this commit, and sound, is taken from there."""
        cached = self._cached()
        if cached and self._digest_of(cached) == self.digest:
            on_bytes(self.file_bytes)
            return cached
        if cached:
            cached.unlink()  # a link, mostly: what it leads to is not ours
        for force in (cached is not None, True):
            path = self._download(on_bytes, given_up or Event(), force=force)
            if (found := self._digest_of(path)) == self.digest:
                return path
        what = f"is not {self}: it is {found}, the Hub says {self.digest}"
        raise HubError(Problem(str(path), what, "run again, and tell the repository's owner if that does not help"))

    def _cached(self) -> Path | None:
        """The file where the Hub's cache has it for this commit."""
        found = try_to_load_from_cache(self.repository.name, self.name, revision=self.repository.revision)
        return Path(found) if isinstance(found, str) else None

    def _digest_of(self, path: Path) -> str:
        with open(path, "rb") as file:
            if self.digest.startswith("git-sha1:"):
                start = f"blob {os.fstat(file.fileno()).st_size}\0".encode()
                return f"git-sha1:{hashlib.sha1(start + file.read(), usedforsecurity=False).hexdigest()}"
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"

    def _download(self, on_bytes: Callable[[int], None], given_up: Event, *, force: bool) -> Path:
        class Told(tqdm):  # type: ignore[type-arg]  # generic to mypy, not when it runs
            """A progress bar that shows nothing and hands on what the Hub's client tells it."""

            monitor_interval = 0

            def __init__(self, *_: object, **__: object) -> None:
                super().__init__(disable=True)

            def update(self, n: float | None = 1) -> None:
                if given_up.is_set():
                    raise UnsoundAnswerError("was given up")
                on_bytes(int(n or 0))

            def update_transfer(self, n: float | None = 1) -> None:
                pass  # the same bytes once more, as they travel

            def set_transfer_postfix_str(self, *_: object, **__: object) -> None:
                pass

        def download() -> str:
            return client().hf_hub_download(
                self.repository.name,
                self.name,
                revision=self.repository.revision,
                force_download=force,
                tqdm_class=Told,
            )

        return Path(patiently(download, where=str(self), given_up=given_up, tries=2))  # it tries again by itself
