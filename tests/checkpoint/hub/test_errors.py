"""Errors of the Hub's client become problems with codes; requests that may succeed later are retried."""

import errno
from contextlib import suppress
from threading import Event

import httpx2
import pytest
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from slrmerge.checkpoint.hub.errors import MAX_ATTEMPTS, InvalidResponseError, translate_hub_errors, with_retries
from slrmerge.errors import HubError, NoSpaceError
from tests.checkpoint.hub.server import HubServer
from tests.problems import refused

WHERE = "org/model"


def http(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError, **headers: str) -> HfHubHTTPError:
    request = httpx2.Request("GET", "https://hub.invalid/org/model")
    return kind("an error", response=httpx2.Response(status, headers=headers, request=request))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (http(403, GatedRepoError), "gated-repository"),
        (http(403, DisabledRepoError), "disabled-repository"),
        (http(404, RepositoryNotFoundError), "repository-not-found"),
        (http(404, RevisionNotFoundError), "revision-not-found"),
        (http(404, RemoteEntryNotFoundError), "file-not-found"),
        (http(401), "not-logged-in"),
        (http(403), "forbidden"),
        (http(412), "changed-meanwhile"),
        (http(429), "rate-limited"),
        (http(400), "hub-error"),
        (http(500), "hub-error"),
        (InvalidResponseError("x"), "invalid-response"),
        (LocalTokenNotFoundError("x"), "not-logged-in"),
        (HFValidationError("x"), "invalid-repository"),
        (OfflineModeIsEnabled("x"), "offline"),
        (httpx2.ReadTimeout("x"), "hub-timeout"),
        (httpx2.ConnectError("x"), "hub-unreachable"),
        (ConnectionResetError("x"), "hub-unreachable"),
        (RuntimeError("from Xet"), "transfer-failed"),
        (caused(RuntimeError("from Xet"), http(429)), "rate-limited"),
        (caused(LocalEntryNotFoundError("x"), http(503)), "hub-error"),
        (caused(LocalEntryNotFoundError("x"), httpx2.ConnectError("x")), "hub-unreachable"),
        (OSError(errno.EACCES, "x", "/cache/file"), "cache-unusable"),
    ],
    ids=lambda value: f"{type(value).__name__}-{value}" if isinstance(value, Exception) else value,
)
def test_each_error_of_the_client_has_a_code(hub: HubServer, error: Exception, code: str) -> None:
    with refused(HubError, code) as caught, translate_hub_errors(WHERE):
        raise error
    (problem,) = caught.value.problems
    assert problem.where == ("/cache/file" if code == "cache-unusable" else WHERE)
    assert problem.remedy


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_error_of_the_hub(number: int) -> None:
    with refused(NoSpaceError, "no-space"), translate_hub_errors(WHERE):
        raise OSError(number, "x")


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), TypeError("x"), NotImplementedError("x")])
def test_a_bug_is_not_turned_into_a_problem(error: Exception) -> None:
    with pytest.raises(type(error)), translate_hub_errors(WHERE):
        raise error


class Failing:
    """A call that raises `error` a number of times."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.calls = error, times, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return "result"


@pytest.mark.parametrize(
    "error", [http(408), http(429), http(500), http(503), httpx2.ReadError("x"), TimeoutError("x")]
)
def test_transient_failures_are_retried(hub: HubServer, error: Exception) -> None:
    call = Failing(error, MAX_ATTEMPTS - 1)
    assert (with_retries(call, where=WHERE), call.calls) == ("result", MAX_ATTEMPTS)
    call = Failing(error, MAX_ATTEMPTS)
    with pytest.raises(HubError):
        with_retries(call, where=WHERE)
    assert call.calls == MAX_ATTEMPTS


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (http(400), "hub-error"),
        (http(404, RepositoryNotFoundError), "repository-not-found"),
        (OfflineModeIsEnabled("x"), "offline"),
        (HFValidationError("x"), "invalid-repository"),
        (KeyError("id"), "unexpected-response"),
        (ValueError("not JSON"), "unexpected-response"),
        (TypeError("no object"), "unexpected-response"),
    ],
)
def test_permanent_failures_are_not_retried(hub: HubServer, error: Exception, code: str) -> None:
    call = Failing(error, 1)
    with refused(HubError, code):
        with_retries(call, where=WHERE)
    assert call.calls == 1


@pytest.mark.parametrize(("error", "calls"), [(httpx2.ConnectError("refused"), 2), (httpx2.ConnectTimeout("x"), 1)])
def test_a_hub_that_cannot_be_reached_is_reported_soon(hub: HubServer, error: Exception, calls: int) -> None:
    call = Failing(error, MAX_ATTEMPTS)
    with pytest.raises(HubError):
        with_retries(call, where=WHERE)
    assert call.calls == calls


def test_a_connection_that_fails_once_is_retried(hub: HubServer) -> None:
    assert with_retries(Failing(httpx2.ConnectError("x"), 1), where=WHERE) == "result"


@pytest.mark.parametrize(("error", "calls"), [(http(429), 2), (http(500), 1), (httpx2.ReadError("x"), 1)])
def test_only_the_given_statuses_are_retried(hub: HubServer, error: Exception, calls: int) -> None:
    call = Failing(error, 1)
    with suppress(HubError):
        with_retries(call, where=WHERE, statuses=(429, 503))
    assert call.calls == calls


def test_the_number_of_attempts_can_be_given(hub: HubServer) -> None:
    call = Failing(http(500), 2)
    with refused(HubError, "hub-error"):
        with_retries(call, where=WHERE, attempts=2)
    assert call.calls == 2


@pytest.mark.parametrize(("error", "replaced"), [(http(500), True), (httpx2.ReadError("x"), True), (http(403), False)])
def test_a_given_remedy_replaces_that_of_transient_failures(hub: HubServer, error: Exception, replaced: bool) -> None:
    with pytest.raises(HubError) as caught:
        with_retries(Failing(error, MAX_ATTEMPTS), where=WHERE, remedy="push again")
    assert (caught.value.problems[0].remedy == "push again") == replaced


def test_cancelling_ends_the_retries(hub: HubServer) -> None:
    cancelled, call = Event(), Failing(http(503), 1)
    cancelled.set()
    with refused(HubError, "hub-error"):
        with_retries(call, where=WHERE, cancelled=cancelled)
    assert call.calls == 1
