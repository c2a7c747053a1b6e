"""The HTTP client of model servers: limits what a response may hold and take, and reports long outages."""

import asyncio
from collections.abc import Callable
from typing import Any

import openai
from httpx2 import ReadTimeout

from slrmerge.evaluation.server_errors import InvalidResponseError
from slrmerge.io.sizes import format_bytes

MAX_RESPONSE_BYTES = 1 << 25
"""More than 64 embeddings, or the longest answer, take."""

MAX_REDIRECTS = 5

RETRIES_UNREPORTED = 3
"""Retries within a few seconds are not worth a message."""

_ENCODING_HEADERS = ("content-encoding", "content-length", "transfer-encoding")


class LimitedClient(openai.DefaultAsyncHttpxClient):
    """The client's own HTTP client, but a response is at most `MAX_RESPONSE_BYTES` long after decompression.

    It must be complete within the timeout of a read. Calls `on_retries` with the latest failure at every request that
    was retried several times. Raises InvalidResponseError for a longer response.
    """

    def __init__(self, on_retries: Callable[[str], None], **options: Any) -> None:
        super().__init__(**options)
        self._on_retries = on_retries
        self._failure = ""

    async def send(self, request: Any, **options: Any) -> Any:  # noqa: ARG002 (always read, redirects followed)
        if int(request.headers.get("x-stainless-retry-count", 0)) >= RETRIES_UNREPORTED:
            self._on_retries(self._failure)
        try:
            response, content = await self._answer(request)
        except Exception as error:
            self._failure = type(error).__name__
            raise
        if response.status_code >= 400:
            self._failure = str(response.status_code)
        headers = [pair for pair in response.headers.multi_items() if pair[0].lower() not in _ENCODING_HEADERS]
        return type(response)(response.status_code, headers=headers, content=content, request=response.request)

    async def _answer(self, request: Any) -> tuple[Any, bytes]:
        """The response and its content, all within the time that httpx allows for each read."""
        try:
            async with asyncio.timeout(self.timeout.read):
                response = await self._follow(request)
                return response, await _read(response)
        except TimeoutError as error:
            raise ReadTimeout("the response is not complete in time", request=request) from error

    async def _follow(self, request: Any) -> Any:
        """The response after redirects, whose own contents are not read."""
        for _ in range(MAX_REDIRECTS + 1):
            response = await super().send(request, stream=True, follow_redirects=False)
            if response.next_request is None:
                if "," in response.headers.get("content-encoding", ""):  # a small one may decompress for hours
                    await response.aclose()
                    raise InvalidResponseError("a response that is compressed several times")
                return response
            await response.aclose()
            request = response.next_request
        raise InvalidResponseError(f"more than {MAX_REDIRECTS} redirects")


async def _read(response: Any) -> bytes:
    content = bytearray()
    try:
        async for part in response.aiter_bytes():
            content += part
            if len(content) > MAX_RESPONSE_BYTES:
                raise InvalidResponseError(f"more than {format_bytes(MAX_RESPONSE_BYTES)}")
    finally:
        await response.aclose()
    return bytes(content)
