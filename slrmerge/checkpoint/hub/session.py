"""The HTTP session of the Hub's client, with limits on what a server may answer to slrmerge's requests."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import httpcore2
import httpx2
from huggingface_hub import constants, get_session
from huggingface_hub.utils import build_hf_headers, parse_ratelimit_headers

from slrmerge._version import __version__
from slrmerge.checkpoint.hub.errors import LONGEST_WAIT_S, InvalidResponseError, SlowResponseError
from slrmerge.errors import HubError, Problem, first_line

LEAST_BYTES_PER_S = 1000
"""The least rate of a response, over each period of waiting as long as the client's download timeout."""

MAX_ANSWER_BYTES = 100_000_000
"""The most bytes in a response that is not a file, since the client holds it in memory."""


RESPONSE_TIMEOUT_S = 60.0
"""How long the Hub may take to answer a request, from its last byte to the last of the response's headers."""

_answer_by: ContextVar[float | None] = ContextVar("_answer_by", default=None)
"""When the headers of the response that this thread waits for must be complete."""

MAX_PAGES = 1000
"""The most requests for one list of files. A page has 1,000 of them, and may have none."""

_pages_left: ContextVar[int | None] = ContextVar("_pages_left", default=None)


@contextmanager
def limited_pages() -> Iterator[None]:
    """Raise HubError where the block, which asks for one list, makes more than `MAX_PAGES` requests."""
    token = _pages_left.set(MAX_PAGES)
    try:
        yield
    finally:
        _pages_left.reset(token)


def session() -> httpx2.Client:
    """The session. Raises HubError where the proxy settings cannot be used."""
    try:
        http = get_session()
    except (ImportError, ValueError, httpx2.InvalidURL) as error:
        where = "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY"
        raise HubError(Problem("invalid-proxy", where, f"cannot be used ({first_line(error)})")) from error
    hooks = http.event_hooks
    if _check_request not in hooks["request"]:
        hooks["request"].append(_check_request)
        hooks["response"].append(_check_response)
        for transport in (http._transport, *http._mounts.values()):
            if (pool := getattr(transport, "_pool", None)) is not None:
                pool._network_backend = _BoundedBackend(pool._network_backend)
    return http


def headers(*, with_token: bool) -> dict[str, str]:
    """The headers of a request of slrmerge's; the token is for the Hub only."""
    token = None if with_token else False
    sent: dict[str, str] = build_hf_headers(token=token, library_name="slrmerge", library_version=__version__)
    return sent


def is_at_the_hub(address: str) -> bool:
    """Whether an address has the scheme, host and port of the Hub: nothing else gets the token."""
    here, hub = httpx2.URL(address), httpx2.URL(constants.ENDPOINT)
    return (here.scheme, here.host, here.port) == (hub.scheme, hub.host, hub.port)


def _is_ours(request: httpx2.Request) -> bool:
    """Other users of the client's session are left alone, but for uploads, which do not say whose they are."""
    return "slrmerge/" in request.headers.get("User-Agent", "") or request.method == "PUT"


def _check_request(request: httpx2.Request) -> None:
    _answer_by.set(monotonic() + RESPONSE_TIMEOUT_S if _is_ours(request) else None)
    if _is_ours(request):
        if (left := _pages_left.get()) is not None:
            _pages_left.set(left - 1)
            if not left:
                what, remedy = "sends a list of files without end", "check that this is a Hugging Face Hub"
                raise HubError(Problem("unexpected-response", constants.ENDPOINT, what, remedy))
        _require_web_address(str(request.url), request)
        if not is_at_the_hub(str(request.url)):  # of a list's next page, for instance
            request.headers.pop("Authorization", None)
        request.headers["Accept-Encoding"] = "identity"  # what is compressed can be of any size


def _check_response(response: httpx2.Response) -> None:
    _answer_by.set(None)
    request = response.request
    if not _is_ours(request):
        return
    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.reset_in_seconds > LONGEST_WAIT_S:
        del response.headers["RateLimit"]  # the client would wait as long, whatever it is
    if (wait := response.headers.get("Retry-After", "").strip()).isdecimal():
        response.headers["Retry-After"] = f"{min(float(wait), LONGEST_WAIT_S):.0f}"
    if storage := response.headers.get("X-Xet-Cas-Url"):
        _require_web_address(storage, request)  # Xet also takes folders of this machine
    if response.has_redirect_location:
        _require_web_address(response.headers["Location"], request, relative=True)
    if request.method == "HEAD":
        _require_names(response)
        if not _refreshes_at_the_hub(response):
            response.headers.pop("X-Xet-Hash", None)  # the client then downloads without Xet
        return
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise InvalidResponseError(f"the response is in {encoding}, which was not requested")
    is_file = request.method == "GET" and response.status_code in (200, 206) and "/api/" not in request.url.path
    assert isinstance(response.stream, httpx2.SyncByteStream)
    response.stream = _LimitedStream(response.stream, None if is_file else MAX_ANSWER_BYTES)


def _require_web_address(address: str, request: httpx2.Request, *, relative: bool = False) -> None:
    try:
        parts = urlsplit(address)
        parts.port  # noqa: B018 (raises ValueError where it is not a number)
        httpx2.URL(address)
        is_valid = (parts.scheme in ("http", "https") and bool(parts.hostname)) or (relative and not parts.scheme)
    except (ValueError, httpx2.InvalidURL):
        is_valid = False
    if not is_valid:
        what = f"{request.url.host} refers to an address that is not on the web"
        raise HubError(Problem("invalid-redirect", constants.ENDPOINT, what, "check that this is a Hugging Face Hub"))


def _require_names(response: httpx2.Response) -> None:
    """Raise HubError unless what the client makes names of files in its cache from are names, and the commit's own."""
    asked = re.search("/resolve/([0-9a-f]{40})/", response.request.url.path)
    for name in ("ETag", "X-Linked-ETag", "X-Repo-Commit"):
        value = response.headers.get(name, "")
        is_other = name == "X-Repo-Commit" and asked and value not in ("", asked[1])
        if is_other or not re.fullmatch(r'(W/)?"?[\w-]*"?', value, re.ASCII):
            what, remedy = f"the response has an invalid {name}", "check that this is a Hugging Face Hub"
            raise HubError(Problem("unexpected-response", constants.ENDPOINT, what, remedy))


def _refreshes_at_the_hub(response: httpx2.Response) -> bool:
    """Whether it is the Hub that the client, with the token, would ask for access to Xet."""
    route = response.links.get("xet-auth", {}).get("url") or response.headers.get("X-Xet-Refresh-Route") or ""
    is_renamed = route.startswith(constants.HUGGINGFACE_CO_URL_HOME)  # to the address of a mirror, by the client
    return is_renamed or is_at_the_hub(route)


class _BoundedBackend(httpcore2.NetworkBackend):
    """Makes connections whose reads end when a response's headers are due: the client limits each read alone."""

    def __init__(self, backend: httpcore2.NetworkBackend) -> None:
        self._backend = backend

    def connect_tcp(self, *arguments: Any, **more: Any) -> httpcore2.NetworkStream:
        return _BoundedStream(self._backend.connect_tcp(*arguments, **more))

    def connect_unix_socket(self, *arguments: Any, **more: Any) -> httpcore2.NetworkStream:
        return _BoundedStream(self._backend.connect_unix_socket(*arguments, **more))

    def sleep(self, seconds: float) -> None:
        self._backend.sleep(seconds)


class _BoundedStream(httpcore2.NetworkStream):
    def __init__(self, stream: httpcore2.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if (due := _answer_by.get()) is not None:
            left = due - monotonic()
            if left <= 0:
                raise httpcore2.ReadTimeout(f"no complete headers after {RESPONSE_TIMEOUT_S:g} s")
            timeout = left if timeout is None else min(left, timeout)
        return self._stream.read(max_bytes, timeout)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if _answer_by.get() is None:
            self._stream.write(buffer, timeout)
        else:
            self._stream.write(buffer, RESPONSE_TIMEOUT_S if timeout is None else timeout)
            _answer_by.set(monotonic() + RESPONSE_TIMEOUT_S)

    def close(self) -> None:
        self._stream.close()

    def start_tls(self, *arguments: Any, **more: Any) -> httpcore2.NetworkStream:
        return _BoundedStream(self._stream.start_tls(*arguments, **more))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _LimitedStream(httpx2.SyncByteStream):
    """The body of a response; raises HTTPError where it is too long or too slow."""

    def __init__(self, stream: httpx2.SyncByteStream, max_bytes: int | None) -> None:
        self._stream, self._max_bytes = stream, max_bytes

    def __iter__(self) -> Iterator[bytes]:
        chunks = iter(self._stream)
        total = arrived = 0
        waited_s = 0.0  # without what the reader of the chunks takes
        while True:
            begin = monotonic()
            chunk = next(chunks, None)
            if chunk is None:
                return
            waited_s += monotonic() - begin
            arrived += len(chunk)
            total += len(chunk)
            if self._max_bytes is not None and total > self._max_bytes:
                raise InvalidResponseError(f"the response has more than {self._max_bytes:,} bytes")
            if waited_s > constants.HF_HUB_DOWNLOAD_TIMEOUT:
                if arrived < LEAST_BYTES_PER_S * waited_s:
                    raise SlowResponseError(f"{arrived:,} bytes in {waited_s:.0f} s")
                waited_s, arrived = 0.0, 0
            yield chunk

    def close(self) -> None:
        self._stream.close()
