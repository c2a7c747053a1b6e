"""Byte ranges of one file over HTTP, accepted only if they are exactly what was requested."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import hf_raise_for_status

from slrmerge.checkpoint.hub.errors import InvalidResponseError, is_transient_status
from slrmerge.checkpoint.hub.session import headers, is_at_the_hub, session


class Ranges:
    """A file of `file_bytes` at `url` on the Hub; safe to share between threads.

    The Hub redirects requests for large files to a storage host. Later ranges are requested at that address directly,
    until it refuses one. The token is sent to the Hub only.
    """

    def __init__(self, url: str, file_bytes: int) -> None:
        self._url, self._file_bytes = url, file_bytes
        self._storage_url: str | None = None

    def chunks(self, start: int, stop: int) -> Iterator[bytes]:
        """The bytes from `start` to `stop`, as they arrive. Raises HTTPError for any other response.

        The last chunk follows when the response has been read to its end, so that the connection can be reused.
        """
        position, last = start, b""
        with self._response(start, stop) as response:
            for chunk in response.iter_raw():
                position += len(chunk)
                if position > stop:
                    raise InvalidResponseError("the response has more bytes than requested")
                if position < stop:
                    yield chunk
                else:
                    last += chunk
        if position < stop:
            raise InvalidResponseError(f"the response has {stop - position:,} bytes less than requested")
        yield last

    @contextmanager
    def _response(self, start: int, stop: int) -> Iterator[Any]:
        """A response that is the range, from the storage host where its address is known and still valid."""
        wanted = {"Range": f"bytes={start}-{stop - 1}"}
        timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
        storage_url = self._storage_url  # read once: other threads change it
        if storage_url:
            anonymous = headers(with_token=False) | wanted
            with session().stream("GET", storage_url, headers=anonymous, timeout=timeout_s) as response:
                if response.status_code == 206 or is_transient_status(response.status_code):
                    self._require_range(response, start, stop)
                    yield response
                    return
            self._storage_url = None
        identified = headers(with_token=True) | wanted
        with session().stream("GET", self._url, headers=identified, timeout=timeout_s) as response:
            self._require_range(response, start, stop)
            address = str(response.url)
            self._storage_url = None if is_at_the_hub(address) else address
            yield response

    def _require_range(self, response: Any, start: int, stop: int) -> None:
        """Raise HTTPError unless a response is the range."""
        status = response.status_code
        if status != 206:
            if is_transient_status(status) or (status != 416 and is_at_the_hub(str(response.url))):
                hf_raise_for_status(response)
            raise InvalidResponseError(f"a range of the file was requested, the response is {status}", status)
        wanted = f"bytes {start}-{stop - 1}/{self._file_bytes}"
        found = response.headers.get("Content-Range", "no range")
        if found != wanted:
            raise InvalidResponseError(f"{wanted} was requested, the response is {found}")
