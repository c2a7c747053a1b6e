"""The credentials of URLs in messages, how many problems an error has, and settings of the Hub's client."""

import subprocess
import sys

import huggingface_hub.constants
import pytest

from slrmerge.errors import (
    MAX_PROBLEMS,
    CheckpointError,
    HubError,
    Problem,
    raise_all,
    require_extra,
    without_credentials,
)
from slrmerge.merging.push import parse_target
from tests.cli import ROOT
from tests.problems import refused


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:sekret@host/v1", "http://***@host/v1"),
        ("http://user:se@kret@host:80/v1", "http://***@host:80/v1"),
        ("http://user:se/kret@host", "http://***@host"),
        ("http://user:se?kret@host", "http://***@host"),
        ("https://sekret@host", "https://***@host"),
        ("https://:sekret@[::1]:80/v1", "https://***@[::1]:80/v1"),
        ("ftp://user:sekret@host", "ftp://***@host"),
        ("http:/user:sekret@host", "http:/***@host"),  # taken for a path
        ("m@http://user:sekret@host/v1?api_key=sekret: failed", "m@http://***@host/v1?***: failed".replace(": ", " ")),
        ("http://host/v1?anything=sekret", "http://host/v1?***"),
        ("https://user:sekret@host/v1?mail=a@b&key=sekret", "https://***"),
        ("https://user:se@kret?sekret@host/v1", "https://***"),
        ("https://host/v1#bearer=sekret", "https://host/v1#***"),
        ("no path /v1/chat?api_key=sekret&n=3", "no path /v1/chat?api_key=***&n=3"),
        ("&Access-Token=sekret", "&Access-Token=***"),
        ("/v1?api_key=sekret: no such folder", "/v1?api_key=***: no such folder"),
        ("user:sekret@host:8000/v1: no such folder", "***@host:8000/v1: no such folder"),
        ("user:se/kret@host", "***@host"),
        ("x=user:se@kret@host/v1?api_key=sekret", "***@host/v1?api_key=***"),
        ("https:user:sekret@host/v1", "***@host/v1"),
    ],
)
def test_credentials_are_hidden(text: str, shown: str) -> None:
    assert without_credentials(text) == without_credentials(shown) == shown
    problem = Problem("x", text, text, text)
    assert "sekret" not in str(problem) + repr(problem)


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:8000/v1",
        "https://huggingface.co/org/model@main",
        "org/model@main",
        "https://h:80/m@x",
        "https://h/m#part",
        "a=b",
        "h:80/m@x",
        "llama3:8b@http://localhost:8000/v1",
        "C:\\Users\\me@work\\model",
        "org/model:8b@main: no",
    ],
)
def test_other_addresses_are_unchanged(text: str) -> None:
    assert without_credentials(text) == text


def test_hiding_takes_linear_time() -> None:
    for text in (
        "://" * 100_000,
        "aa://" + ":@/?" * 100_000,
        "?key" * 100_000,
        "a:" * 100_000 + "@",
        "@:" * 100_000,
        "&k=" + ":" * 100_000,
        "aa://" + "#" * 100_000,
    ):
        without_credentials(text)


def test_a_long_text_is_cut_and_a_url_in_it_is_hidden_first() -> None:
    problem = Problem("x", "/" + "a" * 5000, f"layer {'9' * 4000} of http://me:{'sekret' * 50}@host/", "name another")
    again = Problem("x", problem.where, problem.what, problem.remedy)
    assert again == problem
    assert problem.what.startswith("layer 999")
    assert problem.what.endswith("99 of http://***@host/")
    assert len(str(problem)) < 2500


@pytest.mark.parametrize("count", [MAX_PROBLEMS, MAX_PROBLEMS + 1, 10**9])
def test_an_error_has_a_limited_number_of_problems(count: int) -> None:
    with pytest.raises(CheckpointError) as caught:
        raise_all((Problem("x", str(number), "is wrong") for number in range(count)), CheckpointError)
    codes = [problem.code for problem in caught.value.problems]
    assert codes == ["x"] * MAX_PROBLEMS + ["more-problems"] * (count > MAX_PROBLEMS)
    again = CheckpointError(*caught.value.problems)
    assert again.problems == caught.value.problems


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_ENDPOINT", "http://[::1"),
        ("HF_ENDPOINT", ""),
        ("HF_ENDPOINT", "file:///tmp"),
        ("HF_HUB_ETAG_TIMEOUT", "ten"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "1e9"),
    ],
)
def test_a_setting_that_the_hubs_client_cannot_use_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub, "constants", huggingface_hub.constants)  # which an import replaces
    monkeypatch.delitem(sys.modules, "huggingface_hub.constants")
    with refused(HubError, "invalid-setting"):
        require_extra("search", "transformers")
    with refused(HubError, "invalid-setting"):
        parse_target("me/x")
    command = [sys.executable, "-m", "slrmerge", "inspect", "org/name"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 14
    assert done.stderr.startswith("error: HF_ENDPOINT, ")
