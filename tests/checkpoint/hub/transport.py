"""A port of loopback that keeps connections alive, serves ranges, and fails on demand.

What a client makes of a bad answer shows only when it is given one; here each kind of them is one call away.
"""

import gzip
import json
import re
import socketserver
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal, Protocol, Self
from urllib.parse import parse_qs, urlsplit

Kind = Literal["ignore_range", "wrong_range", "cut", "overlong", "gzip", "status", "corrupt", "hang", "reset"]
INSTEAD: tuple[Kind, ...] = ("status", "hang", "reset")
DAMAGE: tuple[Kind, ...] = ("cut", "corrupt", "overlong", "gzip", "ignore_range", "wrong_range")


@dataclass
class Request:
    """One request as the server saw it."""

    host: str
    method: str
    path: str
    headers: dict[str, str]
    status: int = 0  # none was answered
    served_bytes: int = 0


@dataclass
class Fault:
    """What to do to requests whose "METHOD /path" `match` is found in, `times` times (None: always).

    `status`, `hang` and `reset` strike before the server does anything. `cut`, `corrupt`, `overlong` and `gzip` strike
    answers that have a body (the last two do not say how long it is), `ignore_range` and `wrong_range` answers that are
    a range; others don't use them up.
    """

    kind: Kind
    match: str
    times: int | None = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    skip: int = 0


@dataclass
class Asked:
    """A request, read to its end."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None

    def json(self) -> Any:
        return json.loads(self.body)

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass
class Answer:
    """A response; `whole` is the file that `body` is a range of, from `start` on.

    `pace_s` is the wait after a byte of the body, `header_pace_s` after one of the headers.
    """

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    whole: bytes = b""
    start: int = 0
    pace_s: float = 0.0
    header_pace_s: float = 0.0

    @classmethod
    def of(cls, value: object, status: int = 200) -> Self:
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    @classmethod
    def range(cls, whole: bytes, start: int, stop: int, headers: Mapping[str, str]) -> Self:
        span = {"Content-Range": f"bytes {start}-{stop - 1}/{len(whole)}"}
        return cls(whole[start:stop], 206, {**headers, **span}, whole, start)


class Refusal(Exception):  # noqa: N818
    """An error the server answers with, under the code the client tells its exceptions by."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.answer = Answer.of({"error": message}, status)
        self.answer.headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


def ranged(asked: Asked, whole: bytes, headers: Mapping[str, str]) -> Answer:
    """`whole`, or the one range of it that was asked for."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", asked.headers.get("range", ""))
    if not found or found[0] == "bytes=-":
        return Answer(whole, 200, headers)
    if found[1]:
        start, stop = int(found[1]), min(int(found[2] or len(whole)) + 1, len(whole))
    else:
        start, stop = max(len(whole) - int(found[2]), 0), len(whole)
    if start >= stop:
        return Answer(b"", 416, {"Content-Range": f"bytes */{len(whole)}"})
    return Answer.range(whole, start, stop, headers)


class Site(Protocol):
    """What a listener asks for its answers."""

    requests: list[Request]
    connections: list[str]
    closing: threading.Event

    def take_fault(self, line: str, kinds: tuple[Kind, ...]) -> Fault | None: ...

    def answer(self, host: str, asked: Asked) -> Answer: ...


class Listener(socketserver.ThreadingTCPServer):
    """One port; stopping it ends its connections, and whatever still answers on them."""

    daemon_threads = False
    request_queue_size = 64

    def __init__(self, site: Site, host: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.site, self.host = site, host
        self._open: set[Any] = set()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        for connection in list(self._open):
            try:
                connection.shutdown(2)
            except OSError:
                continue
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        self.site.connections.append(self.host)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection, kept alive: reads requests, lets the site answer, and damages the answers that are to be."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Listener

    def handle_request(self) -> None:
        site, url = self.server.site, urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(self.command, url.path, parse_qs(url.query), headers, self._read_body())
        line, record = f"{self.command} {url.path}", Request(self.server.host, self.command, url.path, headers)
        fault = site.take_fault(line, INSTEAD)
        if fault and fault.kind == "status":
            answer = Answer.of({"error": "told to"}, fault.status)
        elif fault:
            site.requests.append(record)
            self.close_connection = True
            if fault.kind == "hang":
                site.closing.wait()
            return
        else:
            answer = site.answer(self.server.host, asked)
            if answer.body and self.command != "HEAD":
                fault = site.take_fault(line, DAMAGE if answer.status == 206 else DAMAGE[:4])
        self._send(record, *damaged(answer, fault))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, record: Request, answer: Answer, length: int | None) -> None:
        """Send an answer that says it is `length` bytes long, or nothing of it; what is sent is counted before."""
        record.status = answer.status
        self.server.site.requests.append(record)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        if answer.header_pace_s:
            headers: list[bytes] = vars(self)["_headers_buffer"]
            for byte in b"".join((*headers, b"\r\n")):
                self.server.site.closing.wait(answer.header_pace_s)
                self.wfile.write(bytes([byte]))
            headers.clear()
        else:
            self.end_headers()
        body = memoryview(b"" if self.command == "HEAD" else answer.body)
        self.close_connection |= self.command != "HEAD" and len(body) != length
        while body:
            size = 1 if answer.pace_s else 65536
            sent, body = body[:size], body[size:]
            self.server.site.closing.wait(answer.pace_s)
            record.served_bytes += len(sent)
            try:
                self.wfile.write(sent)
            except OSError:
                record.served_bytes -= len(sent)
                raise

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing."""


def damaged(answer: Answer, fault: Fault | None) -> tuple[Answer, int | None]:
    """An answer after a fault, and the length it is announced with, if any."""
    body, length = answer.body, len(answer.body)
    if fault is None:
        return answer, length
    headers = {**answer.headers, **fault.headers}
    if fault.kind == "ignore_range":
        headers.pop("Content-Range")
        return Answer(answer.whole, 200, headers), len(answer.whole)
    if fault.kind == "wrong_range":
        shift = 1 if answer.start + length < len(answer.whole) else -1
        start, stop = max(answer.start + shift, 0), answer.start + length + shift
        return Answer.range(answer.whole, start, stop, headers), stop - start
    if fault.kind == "overlong":
        return Answer(body + b"and more", answer.status, headers), None
    if fault.kind == "gzip":
        return Answer(gzip.compress(body), answer.status, {**headers, "Content-Encoding": "gzip"}), None
    if fault.kind == "cut":
        body = body[: length // 2]
    if fault.kind == "corrupt":
        body = body[: length // 2] + bytes([body[length // 2] ^ 1]) + body[length // 2 + 1 :]
    return Answer(body, answer.status, headers), length
