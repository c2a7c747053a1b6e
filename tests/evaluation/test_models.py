"""Labels and locations of models."""

from pathlib import Path
from typing import Any

import pytest

from slrmerge.checkpoint.location import Repository
from slrmerge.errors import OptionError
from slrmerge.evaluation.models import ModelNames, NamedModel, ServerAddress, parse_model, parse_models
from tests.problems import refused

URL = "http://localhost:8000/v1"


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("slr=./hybrid", NamedModel("slr", Path("./hybrid"))),
        ("slr=/models/a=b", NamedModel("slr", Path("/models/a=b"))),
        ("./models/hybrid/", NamedModel("hybrid", Path("./models/hybrid"))),
        ("..", NamedModel(Path.cwd().parent.name, Path())),
        ("org/name@main", NamedModel("name", Repository("org/name", "main"))),
        ("post=org/name", NamedModel("post", Repository("org/name"))),
        (f"post=org/name@{URL}", NamedModel("post", ServerAddress("org/name", URL))),
        (f"org/name@{URL}", NamedModel("name", ServerAddress("org/name", URL))),
        (f"post={URL}", NamedModel("post", ServerAddress(None, URL))),
        (URL, NamedModel("v1", ServerAddress(None, URL))),
        ("https://example.org", NamedModel("example.org", ServerAddress(None, "https://example.org"))),
        ("post=a@b@https://user.example/v1", NamedModel("post", ServerAddress("a@b", "https://user.example/v1"))),
    ],
)
def test_a_model_is_a_label_and_a_place(written: str, named: NamedModel) -> None:
    found = parse_model(written)
    assert found.label == named.label
    assert written == ".." or found.at == named.at


def test_a_path_is_a_folder_whatever_its_name() -> None:
    assert parse_model(Path("org/name")) == NamedModel("name", Path("org/name"))


@pytest.mark.parametrize(
    "models",
    [
        {"post": "./a", "slr": Path("b")},
        ["post=./a", "slr=b"],
        [NamedModel("post", Path("a")), NamedModel("slr", Path("b"))],
    ],
)
def test_models_are_a_mapping_or_a_sequence(models: ModelNames) -> None:
    assert parse_models(models) == [NamedModel("post", Path("a")), NamedModel("slr", Path("b"))]


def test_one_model_needs_no_list() -> None:
    assert parse_models("post=./a") == [NamedModel("post", Path("a"))]
    assert parse_models(Path("a")) == [NamedModel("a", Path("a"))]


@pytest.mark.parametrize("models", [["./a", "b/a"], ["post=./a", "post=./b"]])
def test_two_models_with_one_label_are_refused(models: list[str]) -> None:
    with refused(OptionError, "duplicate-label"):
        parse_models(models)


@pytest.mark.parametrize("models", [[], {}])
def test_no_models_are_refused(models: ModelNames) -> None:
    with refused(OptionError, "empty"):
        parse_models(models)


@pytest.mark.parametrize("models", ["", "post=", ["post=./a", "slr="], {"post": ""}])
def test_an_empty_name_is_not_the_current_folder(models: ModelNames) -> None:
    with refused(OptionError, "empty"):
        parse_models(models)


@pytest.mark.parametrize("model", [None, 3, b"a"])
def test_a_model_is_text_or_a_path(model: Any) -> None:
    for models in ([model], {"post": model}):
        with refused(OptionError, "wrong-type"):
            parse_models(models)


@pytest.mark.parametrize(
    "url", ["http://localhost:abc/v1", "http://[::1/v1", "http://localhost:99999/v1", "http://:80"]
)
def test_an_invalid_url_is_refused(url: str) -> None:
    with refused(OptionError, "invalid-url") as caught:
        parse_model(f"post=m@{url}")
    assert caught.value.problems[0].where == url


@pytest.mark.parametrize("model", ["localhost:8000", "m@localhost:8000/v1", "org/m@10.0.0.1:80", "host.org:8000/v1/"])
def test_an_address_without_its_scheme_is_refused(model: str) -> None:
    with refused(OptionError, "invalid-url"):
        parse_model(model)


def test_a_folder_may_be_named_like_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a@b:1").mkdir()
    assert parse_model("post=a@b:1").at == Path("a@b:1")


@pytest.mark.parametrize(
    ("written", "label", "shown"),
    [
        ("http://user:sekret@host/v1", "v1", "http://***@host/v1"),
        ("http://user:sekret@host", "host", "http://***@host"),
        ("http://host?api_key=sekret", "host", "http://host?***"),
        ("m@http://user:sekret@host/v1?api_key=sekret", "m", "m@http://***@host/v1?***"),
        ("post=http://user:sekret@host/v1", "post", "http://***@host/v1"),
    ],
)
def test_the_credentials_of_an_address_are_used_and_not_shown(written: str, label: str, shown: str) -> None:
    found = parse_model(written)
    assert isinstance(found.at, ServerAddress)
    assert (found.label, str(found.at)) == (label, shown)
    assert "sekret" in found.at.url
    assert found.at.secrets == {"sekret"}
    assert "sekret" not in repr(found)


def test_labels_are_printable() -> None:
    assert [model.label for model in parse_models([Path("a\n\x1b")])] == [r"a\n\x1b"]
    assert [model.label for model in parse_models({"a\n": "org/name"})] == [r"a\n"]
