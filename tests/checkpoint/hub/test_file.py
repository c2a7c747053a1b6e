"""Ranges and whole files are accepted only if they are what was requested, whatever the Hub does."""

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest
from huggingface_hub import close_session, constants, try_to_load_from_cache

from slrmerge.checkpoint.hub import errors
from slrmerge.checkpoint.hub.file import HubFile, client
from slrmerge.checkpoint.location import Repository
from slrmerge.errors import HubError, NoSpaceError
from tests.checkpoint.hub.server import HubServer, git_oid, is_lfs, sha256, use
from tests.problems import refused

REPO, NAME = "org/model", "weights.bin"
DATA = bytes(range(256)) * 80
BLOB = "GET /blobs/"


def publish(hub: HubServer, name: str = NAME, data: bytes = DATA) -> HubFile:
    commit = hub.commit(REPO, {name: data})
    digest = f"sha256:{sha256(data)}" if is_lfs(name, len(data)) else f"git-sha1:{git_oid(data)}"
    return HubFile(Repository(REPO, commit), name, file_bytes=len(data), digest=digest)


def read(file: HubFile, start: int = 0, stop: int = len(DATA), *, cancelled: Event | None = None) -> bytes:
    opened = file.open(cancelled)
    buffer = bytearray(stop - start)
    opened.stream(start, stop).readinto(memoryview(buffer))
    opened.check_unchanged()
    opened.close()
    return bytes(buffer)


def read_in_pieces(file: HubFile, piece_bytes: int) -> bytes:
    """The whole file through one open file, each piece as a range of its own."""
    opened, buffer = file.open(), bytearray(len(DATA))
    for start in range(0, len(DATA), piece_bytes):
        part = memoryview(buffer)[start : start + piece_bytes]
        opened.stream(start, start + len(part)).readinto(part)
    return bytes(buffer)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, len(DATA)), (7, 7), (4095, 12289), (len(DATA) - 1, len(DATA))])
@pytest.mark.parametrize("name", ["weights.bin", "notes.txt"])
def test_a_range_is_exactly_the_bytes_requested(hub: HubServer, name: str, start: int, stop: int) -> None:
    file = publish(hub, name)
    hub.requests.clear()
    assert read(file, start, stop) == DATA[start:stop]
    assert hub.served() == stop - start


@pytest.mark.parametrize("lengths", [[1, 0, 2], [20_479, 1], [3] * 500, [10_000, 10_480]])
def test_reads_across_chunks_of_a_response_are_consecutive(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, lengths: list[int]
) -> None:
    file = publish(hub)
    opened = file.open()
    chunks = opened._ranges.chunks

    def small_chunks(start: int, stop: int) -> Iterator[bytes]:
        for chunk in chunks(start, stop):
            for begin in range(0, len(chunk), 7):
                yield chunk[begin : begin + 7]

    monkeypatch.setattr(opened._ranges, "chunks", small_chunks)
    stream, found = opened.stream(0, len(DATA)), b""
    for length in lengths:
        buffer = bytearray(b"-" * (length + 1))
        stream.readinto(memoryview(buffer)[:length])
        assert buffer.endswith(b"-")
        found += buffer[:-1]
    assert found == DATA[: sum(lengths)]


def test_reading_past_the_end_of_a_stream_is_a_value_error(hub: HubServer) -> None:
    stream = publish(hub).open().stream(0, 4)
    with pytest.raises(ValueError):
        stream.readinto(memoryview(bytearray(5)))


def test_a_hub_file_is_a_value(hub: HubServer) -> None:
    file = publish(hub)
    copy = pickle.loads(pickle.dumps(file))
    assert (copy, hash(copy), str(copy)) == (file, hash(file), f"{REPO}@{hub.head(REPO)[:7]}/{NAME}")
    assert read(copy) == DATA
    assert (file.download_bytes, replace(file, is_cached=True).download_bytes) == (len(DATA), 0)
    assert replace(file, is_cached=True) == file
    assert replace(file, digest="sha256:0").identity != file.identity


def test_a_stream_breaks_off_in_the_middle_and_continues_there(hub: HubServer) -> None:
    file = publish(hub)
    hub.misbehave("cut", BLOB)
    stream, found = file.open().stream(0, len(DATA)), b""
    for _ in range(0, len(DATA), 512):
        buffer = bytearray(512)
        stream.readinto(memoryview(buffer))
        found += buffer
    assert found == DATA


@pytest.mark.parametrize("kind", ["ignore_range", "wrong_range", "cut", "overlong", "gzip", "reset"])
@pytest.mark.parametrize("times", [1, errors.MAX_ATTEMPTS - 1])
def test_a_wrong_response_is_requested_again(hub: HubServer, kind: Any, times: int) -> None:
    file = publish(hub)
    hub.misbehave(kind, BLOB, times=times)
    assert read(file) == DATA


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize("where", [BLOB, "GET /org/model/resolve"])
def test_an_overloaded_server_is_retried(hub: HubServer, status: int, where: str) -> None:
    file = publish(hub)
    hub.misbehave("status", where, status=status, times=errors.MAX_ATTEMPTS - 1, headers={"Retry-After": "0"})
    assert read(file) == DATA


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"kind": "ignore_range"}, "invalid-response"),
        ({"kind": "wrong_range"}, "invalid-response"),
        ({"kind": "overlong"}, "invalid-response"),
        ({"kind": "gzip"}, "invalid-response"),
        ({"kind": "status", "status": 503}, "hub-error"),
        ({"kind": "status", "status": 429}, "rate-limited"),
        ({"kind": "reset"}, "hub-unreachable"),
    ],
)
def test_a_failure_that_does_not_pass_ends_in_an_error(hub: HubServer, fault: dict[str, Any], code: str) -> None:
    file = publish(hub)
    hub.requests.clear()
    hub.misbehave(match="GET /(blobs|org)", times=None, **fault)
    with refused(HubError, code) as caught:
        read(file)
    assert caught.value.problems[0].where == str(file)
    requests = [request for request in hub.requests if request.host == "cdn" or request.status != 302]
    assert len(requests) == errors.MAX_ATTEMPTS


def test_a_server_that_hangs_is_given_up(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    file = publish(hub)
    hub.misbehave("hang", BLOB, times=None)
    with refused(HubError, "hub-timeout"):
        read(file)


@pytest.mark.parametrize(
    ("status", "code"),
    [(401, "not-logged-in"), (403, "forbidden"), (404, "file-not-found"), (412, "changed-meanwhile")],
)
def test_a_failure_that_retries_cannot_help_is_not_retried(hub: HubServer, status: int, code: str) -> None:
    file = publish(hub)
    hub.misbehave("status", "GET /org/model/resolve", times=None, status=status)
    hub.requests.clear()
    with refused(HubError, code):
        read(file)
    assert len(hub.requests) == 1


def test_failures_are_counted_from_the_last_progress(hub: HubServer) -> None:
    file = publish(hub)
    hub.misbehave("cut", BLOB, times=errors.MAX_ATTEMPTS + 3)
    assert read(file) == DATA


def test_bytes_that_arrived_before_a_cut_are_not_requested_again(hub: HubServer) -> None:
    file = publish(hub)
    hub.requests.clear()
    hub.misbehave("cut", BLOB)
    read(file)
    assert hub.served() == len(DATA)


def test_retries_wait_as_long_as_the_server_asks(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(errors, "FIRST_WAIT_S", 1.0)
    monkeypatch.setattr(errors, "LONGEST_WAIT_S", 300.0)
    file = publish(hub)
    waits: list[float] = []
    clock = cast(Event, SimpleNamespace(wait=lambda seconds: waits.append(seconds)))
    window = '"resolvers";r={};t=55'
    hub.misbehave("status", BLOB, status=429, headers={"Retry-After": "42"})
    hub.misbehave("status", BLOB, status=429, headers={"RateLimit": window.format(0)})
    hub.misbehave("status", BLOB, status=429, headers={"Retry-After": "86400"})
    hub.misbehave("status", BLOB, status=503, headers={"RateLimit": window.format(0)})
    hub.misbehave("status", BLOB, status=429, headers={"RateLimit": window.format(4999)})
    assert read(file, cancelled=clock) == DATA
    assert waits == [42, 55, 300, 8, 16]
    reported = [record.args for record in caplog.records if record.name == "slrmerge"]
    statuses = [429, 429, 429, 503, 429]
    assert reported == [
        (f"HTTP {status}", wait, f"attempt {attempt} of 6")
        for attempt, (status, wait) in enumerate(zip(statuses, waits, strict=True), 2)
    ]


def test_a_cancelled_read_does_not_wait(hub: HubServer) -> None:
    file, cancelled = publish(hub), Event()
    cancelled.set()
    hub.misbehave("status", BLOB, times=None)
    hub.requests.clear()
    with refused(HubError, "hub-error"):
        read(file, cancelled=cancelled)
    assert len([request for request in hub.requests if request.host == "cdn"]) == 1


@pytest.mark.parametrize("status", [503, 429])
def test_a_storage_address_survives_transient_failures(hub: HubServer, status: int) -> None:
    file = publish(hub)
    hub.requests.clear()
    hub.misbehave("status", BLOB, status=status, skip=2)
    assert read_in_pieces(file, 4096) == DATA
    assert sum(request.host == "hub" for request in hub.requests) == 1


def test_the_redirect_is_followed_once_and_the_token_goes_to_the_hub_only(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.private.add(REPO)
    use(monkeypatch, hub, tmp_path / "cache", "hf_secret")
    hub.tokens["hf_secret"] = "org"
    file = publish(hub)
    hub.requests.clear()
    assert read_in_pieces(file, 4096) == DATA
    requests = [(request.host, request.headers.get("authorization")) for request in hub.requests]
    assert requests == [("hub", "Bearer hf_secret"), *[("cdn", None)] * 5]


@pytest.mark.parametrize("threads", [1, 8])
def test_storage_addresses_that_are_valid_for_one_range_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    with HubServer(signs_ranges=True) as hub, ThreadPoolExecutor(threads) as pool:
        use(monkeypatch, hub, tmp_path / "cache")
        monkeypatch.setattr(errors, "MAX_ATTEMPTS", 1)  # a refused address is no failure
        opened = publish(hub).open()

        def piece(start: int) -> bytes:
            buffer = bytearray(512)
            opened.stream(start, start + 512).readinto(memoryview(buffer))
            return bytes(buffer)

        assert b"".join(pool.map(piece, range(0, len(DATA), 512))) == DATA
        assert sum(request.host == "hub" for request in hub.requests) <= len(DATA) // 512


def test_an_expired_storage_address_is_replaced_at_once(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "MAX_ATTEMPTS", 1)
    file = publish(hub)
    hub.misbehave("status", BLOB, status=403, skip=8)
    assert read_in_pieces(file, 1024) == DATA
    assert sum(request.host == "hub" and request.method == "GET" for request in hub.requests) == 2


def test_a_connection_serves_many_ranges(hub: HubServer) -> None:
    file = publish(hub)
    hub.connections.clear()
    assert read_in_pieces(file, 1024) == DATA
    assert hub.connections == ["hub", "cdn"]


def test_a_whole_file_is_downloaded_once_and_checked(hub: HubServer) -> None:
    file, told = publish(hub), list[int]()
    path = file.fetch(told.append)
    assert (path.read_bytes(), sum(told)) == (DATA, len(DATA))
    hub.requests.clear()
    assert file.fetch() == path
    assert hub.requests == []


@pytest.mark.parametrize("name", ["weights.bin", "notes.txt"])
def test_a_damaged_download_is_repeated_once(hub: HubServer, name: str) -> None:
    file = publish(hub, name)
    hub.misbehave("corrupt", f"GET /(blobs|{REPO}/resolve)")
    assert file.fetch().read_bytes() == DATA


@pytest.mark.parametrize("name", ["weights.bin", "notes.txt"])
def test_a_download_that_stays_damaged_is_refused_each_time(hub: HubServer, name: str) -> None:
    file = publish(hub, name)
    hub.misbehave("corrupt", f"GET /(blobs|{REPO}/resolve)", times=4)
    for _ in range(2):
        with refused(HubError, "digest-mismatch") as caught:
            file.fetch()
        assert file.digest in caught.value.problems[0].what
    assert file.fetch().read_bytes() == DATA


def test_a_damaged_file_in_the_cache_is_downloaded_again(hub: HubServer) -> None:
    file = publish(hub)
    path = file.fetch()
    path.write_bytes(DATA[:-1] + b"x")
    assert file.fetch().read_bytes() == DATA
    hub.requests.clear()
    assert file.fetch() == path
    assert hub.requests == []


def test_the_target_of_a_link_in_the_cache_is_not_touched(hub: HubServer, tmp_path: Path) -> None:
    file = publish(hub)
    path = file.fetch()
    (tmp_path / "mine").write_bytes(b"mine")
    path.unlink()
    path.symlink_to(tmp_path / "mine")
    assert file.fetch().read_bytes() == DATA
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_a_damaged_file_in_the_cache_is_refused_where_it_cannot_be_replaced(hub: HubServer) -> None:
    file = publish(hub)
    file.fetch().write_bytes(DATA[:-1] + b"x")
    hub.misbehave("status", f"HEAD /{REPO}", status=503, times=None)
    with refused(HubError, "hub-error"):
        file.fetch()


def test_a_cancelled_download_ends(hub: HubServer) -> None:
    file, cancelled = publish(hub), Event()
    cancelled.set()
    with refused(HubError, "cancelled"):
        file.fetch(cancelled=cancelled)


@pytest.mark.parametrize(
    ("kind", "match", "times"),
    [("status", f"HEAD /{REPO}", 2), ("reset", f"HEAD /{REPO}", 1), ("cut", BLOB, 3), ("reset", BLOB, 1)],
)
def test_a_download_is_retried(hub: HubServer, kind: Any, match: str, times: int) -> None:
    file = publish(hub)
    hub.misbehave(kind, match, status=503, times=times)
    assert file.fetch().read_bytes() == DATA


@pytest.mark.parametrize(
    ("status", "code"), [(404, "file-not-found"), (503, "hub-error"), (429, "rate-limited"), (403, "forbidden")]
)
def test_a_download_that_keeps_failing_ends_in_an_error(hub: HubServer, status: int, code: str) -> None:
    file = publish(hub)
    hub.misbehave("status", BLOB, status=status, times=None)
    with refused(HubError, code) as caught:
        file.fetch()
    assert caught.value.problems[0].where == str(file)


def test_a_file_that_the_commit_does_not_have_is_refused(hub: HubServer) -> None:
    file = replace(publish(hub), name="other.bin")
    with refused(HubError, "file-not-found"):
        file.fetch()
    with refused(HubError, "file-not-found"):
        read(replace(file, name="../other.bin"))


def test_a_cache_without_write_permission_is_reported(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    file = publish(hub)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/no-such-place")
    with refused(HubError, "cache-unusable") as caught:
        file.fetch()
    assert caught.value.problems[0].where.startswith("/proc/no-such-place")


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_disk_that_fills_up_during_a_download_is_reported(
    hub: HubServer, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(small_disk))
    file = publish(hub, data=DATA * 16)
    with refused(NoSpaceError, "no-space"):
        file.fetch()
    assert try_to_load_from_cache(REPO, NAME, revision=file.repository.revision) is None


def test_a_malformed_token_is_refused(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, hub, tmp_path / "cache", "hf_é")
    with refused(HubError, "invalid-token"):
        client()


@pytest.mark.parametrize("proxy", ["nonsense://127.0.0.1", "http://[::1"])
def test_a_malformed_proxy_is_refused(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    close_session()
    monkeypatch.setenv("ALL_PROXY", proxy)
    with refused(HubError, "invalid-proxy"):
        client()
