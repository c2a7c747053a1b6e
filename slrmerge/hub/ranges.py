"""Byte ranges of one file over HTTP: taken only if they are what was asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, get_session
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

import slrmerge
from slrmerge.hub.failures import ExpiredAddressError, UnsoundAnswerError, may_pass


class Ranges:
    """A file of `file_bytes` at `url` on the Hub; safe to share between threads.

    The Hub sends on to where large files are, by an address that is good for a while. Later ranges go there without
    asking the Hub again, unless an address turns out to be good for one range only. The token is for the Hub only.
    """

    def __init__(self, url: str, file_bytes: int) -> None:
        self._url, self._file_bytes = url, file_bytes
        self._lock = Lock()
        self._direct: str | None = None
        self._has_served = False
        self._goes_direct = True

    def chunks(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` to `stop`, as they come. Raises HTTPError for any other answer.

        The last chunk is given when the answer has been read to its end, so that the connection serves again.
        """
        position, last = start, b""
        with self._answer(start, stop) as response:
            for chunk in response.iter_raw():
                position += len(chunk)
                if position > stop:
                    raise UnsoundAnswerError("sent more bytes than were asked for")
                if position < stop:
                    yield chunk
                else:
                    last = chunk
        if position < stop:
            raise UnsoundAnswerError(f"sent {stop - position:,} bytes less than were asked for")
        yield last

    @contextmanager
    def _answer(self, start: int, stop: int) -> Iterator[Any]:
        direct = self._direct
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if direct is None:
            headers |= build_hf_headers(library_name="slrmerge", library_version=slrmerge.__version__)
        timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", direct or self._url, headers=headers, timeout=timeout_s) as response:
            try:
                self._require_range(response, start, stop)
            except UnsoundAnswerError:
                self._forget(direct)
                raise
            self._remember(direct, str(response.url))
            yield response

    def _require_range(self, response: Any, start: int, stop: int) -> None:
        """Raise UnsoundAnswerError unless an answer is the range, or another HTTPError where it says what is wrong."""
        if response.status_code != 206:
            if may_pass(response.status_code) or _is_at_the_hub(str(response.url)):
                hf_raise_for_status(response)
            if response.status_code >= 400:
                raise ExpiredAddressError(f"sends on to a place that answers {response.status_code}")
            raise UnsoundAnswerError(f"answered {response.status_code} when asked for a range of a file")
        wanted, found = f"bytes {start}-{stop - 1}/{self._file_bytes}", response.headers.get("Content-Range", "nothing")
        encoding = response.headers.get("Content-Encoding", "identity")
        if found != wanted or encoding != "identity":
            as_what = "" if encoding == "identity" else f" in {encoding}"
            raise UnsoundAnswerError(f"answered with {found}{as_what} when asked for {wanted}")

    def _remember(self, direct: str | None, address: str) -> None:
        with self._lock:
            if direct is not None:
                self._has_served = self._has_served or direct == self._direct
            elif self._goes_direct and not _is_at_the_hub(address):
                self._direct, self._has_served = address, False

    def _forget(self, direct: str | None) -> None:
        """An address that served is used up: another is as good. One that never did will not do."""
        with self._lock:
            if direct is not None and direct == self._direct:
                self._direct, self._goes_direct = None, self._has_served


def _is_at_the_hub(address: str) -> bool:
    here, hub = urlsplit(address), urlsplit(constants.ENDPOINT)
    return here.hostname == hub.hostname and (here.port == hub.port or None in (here.port, hub.port))
