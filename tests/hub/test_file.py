"""A range is taken only if it is the range that was asked for, whatever the other side does meanwhile."""

from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest
from huggingface_hub import constants, try_to_load_from_cache

from slrmerge.errors import HubError, NoSpaceError
from slrmerge.hub import failures
from slrmerge.hub.file import HubFile
from slrmerge.repository import Repository
from tests.hub.server import HubServer, git_oid, is_lfs, sha256, use

REPO, NAME = "org/model", "weights.bin"
DATA = bytes(range(256)) * 80
BLOB = "GET /blobs/"


def publish(hub: HubServer, name: str = NAME, data: bytes = DATA) -> HubFile:
    commit = hub.commit(REPO, {name: data})
    digest = f"sha256:{sha256(data)}" if is_lfs(name, len(data)) else f"git-sha1:{git_oid(data)}"
    return HubFile(Repository(REPO, commit), name, file_bytes=len(data), digest=digest)


def streamed(file: HubFile, start: int = 0, stop: int = len(DATA), **options: Any) -> bytes:
    return b"".join(bytes(chunk) for chunk in file.stream(start, stop, **options))


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, len(DATA)), (7, 7), (4095, 12289), (len(DATA) - 1, len(DATA))])
@pytest.mark.parametrize("name", ["weights.bin", "notes.txt"])
def test_a_stretch_is_exactly_the_bytes_asked_for(hub: HubServer, name: str, start: int, stop: int) -> None:
    file = publish(hub, name)
    hub.requests.clear()
    assert streamed(file, start, stop) == DATA[start:stop]
    assert hub.served() == stop - start


@pytest.mark.parametrize("kind", ["ignore_range", "wrong_range", "cut", "overlong", "gzip", "reset"])
@pytest.mark.parametrize("times", [1, failures.TRIES - 1])
def test_an_answer_that_is_not_what_was_asked_for_is_asked_again(hub: HubServer, kind: Any, times: int) -> None:
    file = publish(hub)
    hub.misbehave(kind, BLOB, times=times)
    assert streamed(file) == DATA


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize("where", [BLOB, "GET /org/model/resolve"])
def test_a_server_in_trouble_is_asked_again(hub: HubServer, status: int, where: str) -> None:
    file = publish(hub)
    hub.misbehave("status", where, status=status, times=failures.TRIES - 1, headers={"Retry-After": "0"})
    assert streamed(file) == DATA


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            {"kind": "ignore_range"},
            "answered 200 when asked for a range of a file; try again later, or fetch whole files: --download full",
        ),
        (
            {"kind": "wrong_range"},
            (
                "answered with bytes 0-20478/20480 when asked for bytes 0-20479/20480; "
                "try again later, or fetch whole files: --download full"
            ),
        ),
        (
            {"kind": "overlong"},
            "sent more bytes than were asked for; try again later, or fetch whole files: --download full",
        ),
        (
            {"kind": "gzip"},
            (
                "answered with bytes 0-20479/20480 in gzip when asked for bytes 0-20479/20480; "
                "try again later, or fetch whole files: --download full"
            ),
        ),
        (
            {"kind": "status", "status": 503},
            "got the answer 503 from the Hub: told to; try again later; the same command goes on where it was",
        ),
        (
            {"kind": "status", "status": 429},
            (
                "is asked too often from here (429); wait some minutes, or log in with `hf auth login`, "
                "or set HF_TOKEN for a higher limit"
            ),
        ),
        (
            {"kind": "reset"},
            (
                "cannot be reached at {url} (RemoteProtocolError: Server disconnected without sending a response.); "
                "check the network; HF_HUB_OFFLINE=1 takes what is in the Hub's cache"
            ),
        ),
    ],
)
def test_one_that_never_gets_better_ends_in_words(hub: HubServer, fault: dict[str, Any], said: str) -> None:
    file = publish(hub)
    hub.requests.clear()
    hub.misbehave(match="GET /(blobs|org)", times=None, **fault)
    with pytest.raises(HubError) as caught:
        streamed(file)
    assert str(caught.value) == f"{file}: {said.format(url=hub.url)}"
    assert (
        len([request for request in hub.requests if request.host == "cdn" or request.status != 302]) == failures.TRIES
    )


def test_one_that_hangs_is_given_up_on(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    file = publish(hub)
    hub.misbehave("hang", BLOB, times=None)
    with pytest.raises(HubError) as caught:
        streamed(file)
    assert str(caught.value) == (
        f"{file}: does not answer in time at {hub.url} (ReadTimeout: timed out); "
        "check the network; HF_HUB_OFFLINE=1 takes what is in the Hub's cache"
    )


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_waiting_does_not_mend_is_not_waited_for(hub: HubServer, status: int) -> None:
    file = publish(hub)
    hub.misbehave("status", "GET /org/model/resolve", times=None, status=status)
    hub.requests.clear()
    with pytest.raises(HubError):
        streamed(file)
    assert len(hub.requests) == 1


def test_whoever_makes_progress_is_put_up_with_for_longer(hub: HubServer) -> None:
    file = publish(hub)
    hub.misbehave("cut", BLOB, times=failures.TRIES + 3)
    assert streamed(file) == DATA


def test_what_came_before_a_cut_is_not_asked_for_again(hub: HubServer) -> None:
    file = publish(hub)
    hub.requests.clear()
    hub.misbehave("cut", BLOB)
    streamed(file)
    assert hub.served() == len(DATA)


def test_the_server_says_how_long_to_wait_and_that_is_heeded(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(failures, "FIRST_WAIT_S", 1.0)
    monkeypatch.setattr(failures, "LONGEST_WAIT_S", 300.0)
    file = publish(hub)
    waits: list[float] = []
    clock = cast(Event, SimpleNamespace(wait=lambda seconds: waits.append(seconds)))
    window = '"resolvers";r={};t=55'
    hub.misbehave("status", BLOB, status=429, headers={"Retry-After": "42"})
    hub.misbehave("status", BLOB, status=429, headers={"RateLimit": window.format(0)})
    hub.misbehave("status", BLOB, status=429, headers={"Retry-After": "86400"})
    hub.misbehave("status", BLOB, status=503, headers={"RateLimit": window.format(0)})
    hub.misbehave("status", BLOB, status=429, headers={"RateLimit": window.format(4999)})
    assert streamed(file, given_up=clock) == DATA
    assert waits == [42, 55, 300, 8, 16]
    assert [record.message for record in caplog.records if record.name == "slrmerge"] == [
        f"the Hub is asked again in {seconds} s" for seconds in (42, 55, 300, 16)
    ]


def test_nobody_waits_for_what_was_given_up(hub: HubServer) -> None:
    file, given_up = publish(hub), Event()
    given_up.set()
    hub.misbehave("status", BLOB, times=None)
    hub.requests.clear()
    with pytest.raises(HubError):
        streamed(file, given_up=given_up)
    assert len([request for request in hub.requests if request.host == "cdn"]) == 1


def test_large_files_are_looked_up_once_and_the_token_stays_with_the_hub(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.tokens["hf_secret"] = "ann"
    hub.private.add(REPO)
    use(monkeypatch, hub, tmp_path / "cache", "hf_secret")
    hub.tokens["hf_secret"] = "org"
    file = publish(hub)
    hub.requests.clear()
    assert b"".join(streamed(file, start, start + 4096) for start in range(0, len(DATA), 4096)) == DATA
    asked = [(request.host, request.headers.get("authorization")) for request in hub.requests]
    assert asked == [("hub", "Bearer hf_secret"), *[("cdn", None)] * 5]


def test_an_address_that_is_good_for_one_range_only_is_asked_for_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "FIRST_WAIT_S", 0.001)
    with HubServer(signs_ranges=True) as hub:
        use(monkeypatch, hub, tmp_path / "cache")
        file = publish(hub)
        assert b"".join(streamed(file, start, start + 4096) for start in range(0, len(DATA), 4096)) == DATA
        refused = [request for request in hub.requests if request.host == "cdn" and request.status == 403]
        assert len(refused) == 1


def test_an_address_that_was_good_for_a_while_is_replaced_at_once(hub: HubServer) -> None:
    file = publish(hub)
    starts = range(0, len(DATA), 1024)
    hub.misbehave("status", BLOB, status=403, skip=8)
    assert b"".join(streamed(file, start, start + 1024) for start in starts) == DATA
    assert sum(request.host == "hub" and request.method == "GET" for request in hub.requests) == 2


def test_a_connection_serves_many_ranges(hub: HubServer) -> None:
    file = publish(hub)
    hub.connections.clear()
    for start in range(0, len(DATA), 1024):
        streamed(file, start, start + 1024)
    assert hub.connections == ["hub", "cdn"]


def test_a_whole_file_is_fetched_once_and_checked(hub: HubServer) -> None:
    file, told = publish(hub), list[int]()
    path = file.fetch(told.append)
    assert (path.read_bytes(), sum(told)) == (DATA, len(DATA))
    hub.requests.clear()
    assert file.fetch() == path
    assert hub.requests == []


@pytest.mark.parametrize("name", ["weights.bin", "notes.txt"])
def test_a_whole_file_that_came_damaged_is_fetched_once_more(hub: HubServer, name: str) -> None:
    file = publish(hub, name)
    hub.misbehave("corrupt", f"GET /(blobs|{REPO}/resolve)")
    assert file.fetch().read_bytes() == DATA


@pytest.mark.parametrize("name", ["weights.bin", "notes.txt"])
def test_a_whole_file_that_keeps_coming_damaged_is_refused_each_time(hub: HubServer, name: str) -> None:
    file = publish(hub, name)
    hub.misbehave("corrupt", f"GET /(blobs|{REPO}/resolve)", times=4)
    for _ in range(2):
        with pytest.raises(HubError) as caught:
            file.fetch()
        (problem,) = caught.value.problems
        assert problem.what.startswith(f"is not {file}: it is {file.digest.partition(':')[0]}:")
        assert problem.what.endswith(f", the Hub says {file.digest}")
    assert file.fetch().read_bytes() == DATA


def test_a_damaged_file_in_the_cache_is_fetched_again(hub: HubServer) -> None:
    file = publish(hub)
    path = file.fetch()
    path.write_bytes(DATA[:-1] + b"x")
    assert file.fetch().read_bytes() == DATA
    hub.requests.clear()
    assert file.fetch() == path
    assert hub.requests == []


def test_what_a_link_in_the_cache_points_to_is_left_alone(hub: HubServer, tmp_path: Path) -> None:
    file = publish(hub)
    path = file.fetch()
    (tmp_path / "mine").write_bytes(b"mine")
    path.unlink()
    path.symlink_to(tmp_path / "mine")
    assert file.fetch().read_bytes() == DATA
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_fetching_ends_when_it_is_given_up(hub: HubServer) -> None:
    file, given_up = publish(hub), Event()
    given_up.set()
    with pytest.raises(HubError, match="was given up"):
        file.fetch(given_up=given_up)


def test_an_answer_is_waited_for_while_a_whole_file_is_fetched(hub: HubServer) -> None:
    file = publish(hub)
    hub.misbehave("status", f"HEAD /{REPO}", status=503, times=2)
    assert file.fetch().read_bytes() == DATA


def test_a_cache_that_cannot_be_written_is_said(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    file = publish(hub)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/no-such-place")
    with pytest.raises(HubError) as caught:
        file.fetch()
    assert str(caught.value).endswith(f"needed for {file}; HF_HUB_CACHE may name a folder of yours")


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_disk_that_fills_up_while_a_file_is_fetched_is_said(
    hub: HubServer, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(small_disk))
    file = publish(hub, data=DATA * 16)
    with pytest.raises(NoSpaceError) as caught:
        file.fetch()
    assert caught.value.problems[0].what == "the disk is full"
    assert caught.value.problems[0].remedy == "free some space, or set HF_HUB_CACHE to a folder on another disk"
    assert try_to_load_from_cache(REPO, NAME, revision=file.repository.revision) is None
