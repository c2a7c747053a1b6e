"""A Hub that answers anything: every outcome is a HubError, soon, and nothing is written outside the cache."""

import gzip
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from slrmerge.checkpoint.hub import errors, session
from slrmerge.checkpoint.hub.file import HubFile
from slrmerge.checkpoint.hub.repository import open_repository, pin
from slrmerge.checkpoint.location import Repository
from slrmerge.errors import HubError
from tests.checkpoint.hub.server import HubServer, use
from tests.checkpoint.hub.test_file import BLOB, DATA, REPO, publish, read
from tests.checkpoint.hub.transport import Answer, Asked
from tests.problems import refused

REPOSITORY = Repository(REPO)
Change = Callable[[Answer], Answer]


def answer_with(monkeypatch: pytest.MonkeyPatch, hub: HubServer, match: str, change: Change) -> None:
    """Let `change` make something else of every answer to a "METHOD /path" with `match` in it."""
    honest = hub.answer

    def answer(host: str, asked: Asked) -> Answer:
        found = honest(host, asked)
        return change(found) if match in f"{asked.method} {asked.path}" else found

    monkeypatch.setattr(hub, "answer", answer)


def fetch(file: HubFile) -> bytes:
    return file.fetch().read_bytes()


@pytest.mark.parametrize("use", [read, fetch])
def test_a_response_of_a_few_bytes_per_second_is_given_up(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, use: Callable[[HubFile], bytes]
) -> None:
    file = publish(hub)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    answer_with(monkeypatch, hub, BLOB, lambda answer: replace(answer, pace_s=0.01))
    with refused(HubError, "hub-timeout"):
        use(file)


def test_a_listing_of_a_few_bytes_per_second_is_given_up(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    answer_with(monkeypatch, hub, "/api/", lambda answer: replace(answer, pace_s=0.01))
    with refused(HubError, "hub-timeout"):
        pin(REPOSITORY)


@pytest.mark.parametrize("match", ["/api/", BLOB])
def test_headers_that_come_a_byte_at_a_time_are_given_up(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, match: str
) -> None:
    file = publish(hub)
    monkeypatch.setattr(session, "RESPONSE_TIMEOUT_S", 0.1)
    answer_with(monkeypatch, hub, match, lambda answer: replace(answer, header_pace_s=0.02))
    with refused(HubError, "hub-timeout"):
        pin(REPOSITORY) if match == "/api/" else read(file)


def test_a_limit_on_headers_does_not_end_a_body_that_takes_longer(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = publish(hub)
    monkeypatch.setattr(session, "RESPONSE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(session, "LEAST_BYTES_PER_S", 1)
    answer_with(monkeypatch, hub, BLOB, lambda answer: replace(answer, pace_s=0.01))
    assert read(file, 0, 100) == DATA[:100]
    assert len(hub.requests) == len({request.path for request in hub.requests})  # nothing was requested again


def test_a_body_that_takes_long_to_send_leaves_as_much_time_for_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    now, timeouts = [0.0], []

    class Slow:
        def write(self, _: bytes, timeout: float) -> None:
            timeouts.append(timeout)
            now[0] += 50

        def read(self, _: int, timeout: float) -> None:
            timeouts.append(timeout)

    monkeypatch.setattr(session, "monotonic", lambda: now[0])
    stream: Any = session._BoundedStream(Slow())  # type: ignore[arg-type]
    token = session._answer_by.set(session.RESPONSE_TIMEOUT_S)
    for _ in range(2):
        stream.write(b"")
    stream.read(1)
    session._answer_by.reset(token)
    assert timeouts == [session.RESPONSE_TIMEOUT_S] * 3


def test_a_listing_of_empty_pages_without_end_is_given_up(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub)
    monkeypatch.setattr(session, "MAX_PAGES", 20)
    again = {"Link": f'<{constants.ENDPOINT}/api/models/{REPO}/tree/main?page=2>; rel="next"'}
    answer_with(monkeypatch, hub, "/tree/", lambda answer: Answer(b"[]", 200, {**answer.headers, **again}))
    with refused(HubError, "unexpected-response"):
        pin(REPOSITORY)
    assert sum("/tree/" in request.path for request in hub.requests) == 20


@pytest.mark.parametrize("times", [1, errors.MAX_ATTEMPTS - 1])
@pytest.mark.parametrize("where", [BLOB, "GET /org/model/resolve"])
def test_a_valid_range_that_is_refused_is_requested_again(hub: HubServer, where: str, times: int) -> None:
    file = publish(hub)
    hub.misbehave("status", where, status=416, times=times)
    assert read(file) == DATA


def test_a_range_that_is_always_refused_is_an_error(hub: HubServer) -> None:
    file = publish(hub)
    hub.misbehave("status", BLOB, status=416, times=None)
    with refused(HubError, "invalid-response"):
        read(file)


@pytest.mark.parametrize("status", [404, 410])
@pytest.mark.parametrize("where", [BLOB, "GET /org/model/resolve"])
def test_a_file_that_is_gone_is_reported_as_gone(hub: HubServer, where: str, status: int) -> None:
    file = publish(hub)
    hub.misbehave("status", where, status=status, times=None)
    with refused(HubError, "file-not-found"):
        read(file)


@pytest.mark.parametrize(
    "location", ["ftp://127.0.0.1/x", "file:///etc/passwd", "http://[::1", "http://a:b/", "http:///x", "data:,x", "x:"]
)
@pytest.mark.parametrize("use", [read, fetch])
def test_a_redirect_to_another_scheme_or_nowhere_is_an_error_at_once(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, location: str, use: Callable[[HubFile], bytes]
) -> None:
    file = publish(hub)
    answer_with(
        monkeypatch, hub, "/resolve/", lambda answer: Answer(b"", 302, {**answer.headers, "Location": location})
    )
    hub.requests.clear()
    with refused(HubError, "invalid-redirect"):
        use(file)
    assert len(hub.requests) == 1


@pytest.mark.parametrize("address", ["http://[::1", "ftp://hub.invalid", "nonsense"])
def test_an_endpoint_that_is_no_address_is_an_error_at_once(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    from huggingface_hub import hf_api

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(hf_api.constants, "ENDPOINT", address)
    with pytest.raises(HubError):
        pin(REPOSITORY)


ENTRY = {"type": "file", "path": "x.json", "size": 1, "oid": "0" * 40}


@pytest.mark.parametrize(
    "changed",
    [
        {"size": None},
        {"size": "abc"},
        {"size": -1},
        {"size": 1.5},
        {"size": True},
        {"size": 2**63},
        {"oid": "../../x"},
        {"oid": None},
        {"oid": "A" * 40},
        {"lfs": {"oid": "../../x", "size": 1, "pointerSize": 1}},
        {"lfs": {"oid": "0" * 63, "size": 1, "pointerSize": 1}},
        {"lfs": {"oid": ["0" * 64], "size": 1, "pointerSize": 1}},
        {"lfs": {"size": 1}},
        {"lfs": 5},
    ],
    ids=str,
)
def test_an_entry_without_a_valid_size_and_digest_is_refused(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    publish(hub)
    answer_with(monkeypatch, hub, "/tree/", lambda _: Answer.of([{**ENTRY, **changed}]))
    with refused(HubError, "unexpected-response"):
        pin(REPOSITORY)


@pytest.mark.parametrize(
    "path",
    [
        "../x.json",
        "/etc/x.json",
        "a/../x.json",
        "a\nb.json",
        "\x1b[31m.json",
        "a\\b.json",
        "c:x.json",
        "\u202e.json",
        "é" * 128,
    ],
)
def test_files_with_names_that_lead_elsewhere_are_ignored(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    publish(hub)
    answer_with(monkeypatch, hub, "/tree/", lambda _: Answer.of([ENTRY, {**ENTRY, "path": path}]))
    assert list(pin(REPOSITORY).files) == ["x.json"]


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 200_000,
        b"[" * 200_000 + b"]" * 200_000,
        b"5",
        b"[5]",
        b"[[]]",
        b'[{"type": "file"}]',
        b'[{"type": "file", "path": "x", "size": 1, "oid": 1e400}]',
        b"not json",
        b"\xff",
    ],
    ids=lambda body: repr(body[:20]),
)
@pytest.mark.parametrize("match", ["/tree/", "/api/models/org/model"])
def test_a_listing_that_is_not_the_hubs_is_refused(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, match: str, body: bytes
) -> None:
    publish(hub)
    answer_with(monkeypatch, hub, match, lambda _: Answer(body))
    with pytest.raises(HubError) as caught:
        pin(REPOSITORY)
    assert caught.value.problems[0].code in ("unexpected-response", "empty-repository")


@pytest.mark.parametrize("match", ["/tree/", "/api/models/org/model"])
def test_compressed_listings_are_refused_unread(hub: HubServer, monkeypatch: pytest.MonkeyPatch, match: str) -> None:
    publish(hub)
    bomb = gzip.compress(b"[" + b" " * 10_000_000 + b"]")
    answer_with(monkeypatch, hub, match, lambda _: Answer(bomb, headers={"Content-Encoding": "gzip"}))
    with refused(HubError, "invalid-response"):
        pin(REPOSITORY)


def test_listings_are_read_up_to_a_limit(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub)
    monkeypatch.setattr(session, "MAX_ANSWER_BYTES", 1000)
    answer_with(monkeypatch, hub, "/tree/", lambda _: Answer(b"[" + b" " * 1000 + b"]"))
    with refused(HubError, "invalid-response"):
        pin(REPOSITORY)


@pytest.mark.parametrize("name", ["ETag", "X-Linked-Etag", "X-Repo-Commit"])
def test_a_header_that_leads_out_of_the_cache_is_refused(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = publish(hub)
    value = '"../../../../x"' if name != "X-Repo-Commit" else "../../../../x"
    answer_with(monkeypatch, hub, "HEAD ", lambda answer: replace(answer, headers={**answer.headers, name: value}))
    with refused(HubError, "unexpected-response"):
        file.fetch()


def test_a_file_of_another_commit_than_was_requested_is_refused(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = publish(hub)
    other = {"X-Repo-Commit": "f" * 40}
    answer_with(monkeypatch, hub, "HEAD ", lambda answer: replace(answer, headers={**answer.headers, **other}))
    with refused(HubError, "unexpected-response"):
        file.fetch()
    assert not [*tmp_path.rglob("f" * 40)]


@pytest.fixture
def elsewhere(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server that is not the Hub, while a token is used."""
    use(monkeypatch, hub, tmp_path / "cache", "hf_ann")
    hub.tokens["hf_ann"] = "ann"
    with HubServer() as other:
        yield other


def test_the_token_is_not_sent_where_a_list_continues_elsewhere(
    hub: HubServer, elsewhere: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub)
    elsewhere.commit(REPO, {"x.json": b"{}"})
    link = {"Link": f'<{elsewhere.url}/api/models/{REPO}/tree/main>; rel="next"'}
    answer_with(monkeypatch, hub, "/tree/", lambda answer: replace(answer, headers={**answer.headers, **link}))
    pin(REPOSITORY)
    assert [request.headers.get("authorization") for request in elsewhere.requests] == [None]
    assert all(request.headers["authorization"] == "Bearer hf_ann" for request in hub.requests)


def test_the_token_is_not_sent_to_another_host_for_xet(
    hub: HubServer, elsewhere: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    file = publish(hub)
    xet = {"X-Xet-Hash": "a" * 64, "Link": f'<{elsewhere.url}/x>; rel="xet-auth"'}
    answer_with(monkeypatch, hub, "HEAD ", lambda answer: replace(answer, headers={**answer.headers, **xet}))
    assert fetch(file) == DATA
    assert elsewhere.requests == []


def test_a_folder_of_this_machine_is_no_storage(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    file, folder = publish(hub), tmp_path / "storage"
    xet = {"X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": f"{hub.url}/api/xet"}
    connection = {"X-Xet-Access-Token": "x", "X-Xet-Token-Expiration": f"{2**32}", "X-Xet-Cas-Url": f"local://{folder}"}
    answer_with(monkeypatch, hub, "/api/xet", lambda _: Answer(b"{}", 200, connection))
    answer_with(monkeypatch, hub, "HEAD ", lambda answer: replace(answer, headers={**answer.headers, **xet}))
    with refused(HubError, "invalid-redirect"):
        file.fetch()
    assert not folder.exists()


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("match", ["/tree/", "HEAD "])
def test_no_wait_that_a_server_asks_for_is_longer_than_the_longest(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, match: str, status: int
) -> None:
    file, waits = publish(hub), list[float]()
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=waits.append))
    answer_with(monkeypatch, hub, match, lambda _: Answer(b"{}", status, {"Retry-After": "9" * 6000}))
    with pytest.raises(HubError):
        pin(REPOSITORY) if match == "/tree/" else file.fetch()
    assert waits
    assert max(waits) <= session.LONGEST_WAIT_S + 1


def test_a_file_of_another_size_than_the_hub_says_is_a_failed_transfer(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = publish(hub)
    answer_with(
        monkeypatch, hub, "HEAD ", lambda answer: replace(answer, headers={**answer.headers, "X-Linked-Size": "5"})
    )
    with refused(HubError, "transfer-failed"):
        file.fetch()


def test_a_commit_that_is_not_one_is_refused(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub)
    for sha in (5, "../../x", None, ["0" * 40]):
        answer_with(monkeypatch, hub, "/api/models/org/model", lambda _, sha=sha: Answer.of({"id": REPO, "sha": sha}))
        with refused(HubError, "empty-repository"):
            open_repository(REPOSITORY)
