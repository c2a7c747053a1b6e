"""How models are written on the command line, and asking one for what is missing."""

from pathlib import Path

import pytest

from slrmerge.errors import ServerError
from slrmerge.evaluate.models import NamedModel, Served, ask_missing, parse_model
from slrmerge.evaluate.samples import SampleFile, Settings, seed_of
from slrmerge.progress import Silent
from slrmerge.repository import Repository
from tests.evaluate.helpers import Answering

URL = "http://localhost:8000/v1"
SETTINGS = Settings("a-model", 1.0, 0.1, 64, seed=3)


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("slr=./hybrid", NamedModel("slr", Path("./hybrid"))),
        ("slr=/models/a=b", NamedModel("slr", Path("/models/a=b"))),
        ("./models/hybrid/", NamedModel("hybrid", Path("./models/hybrid"))),
        ("..", NamedModel(Path.cwd().parent.name, Path())),
        ("org/name@main", NamedModel("name", Repository("org/name", "main"))),
        ("post=org/name", NamedModel("post", Repository("org/name"))),
        (f"post=org/name@{URL}", NamedModel("post", Served("org/name", URL))),
        (f"org/name@{URL}", NamedModel("name", Served("org/name", URL))),
        (f"post={URL}", NamedModel("post", Served(None, URL))),
        (URL, NamedModel("v1", Served(None, URL))),
        ("https://example.org", NamedModel("example.org", Served(None, "https://example.org"))),
        ("post=a@b@https://user.example/v1", NamedModel("post", Served("a@b", "https://user.example/v1"))),
    ],
)
def test_a_model_is_a_label_and_a_place(written: str, named: NamedModel) -> None:
    found = parse_model(written)
    assert found.label == named.label
    assert written == ".." or found.at == named.at


def ask(model: Answering, file: SampleFile, prompts: dict[str, str], samples: int) -> None:
    ask_missing(model, "post", prompts, file, SETTINGS, samples=samples, progress=Silent())


def test_only_what_is_missing_is_asked_for_each_with_its_own_seed(tmp_path: Path) -> None:
    model = Answering(str.upper)
    with SampleFile(tmp_path / "samples.jsonl") as file:
        ask(model, file, {"p1": "one"}, 2)
        ask(model, file, {"p1": "one", "p2": "two"}, 3)
        ask(model, file, {"p2": "two"}, 1)
        assert [(*ask.key[1:], ask.prompt) for ask in model.asks] == [
            ("p1", 0, "one"), ("p1", 1, "one"), ("p1", 2, "one"), ("p2", 0, "two"), ("p2", 1, "two"), ("p2", 2, "two"),
        ]  # fmt: skip
        assert [ask.seed for ask in model.asks] == [seed_of(3, ask.key.prompt, ask.key.sample) for ask in model.asks]
        assert {answer.text for ask in model.asks if (answer := file.answer(ask.key))} == {"ONE", "TWO"}


@pytest.mark.parametrize(
    "url", ["http://localhost:abc/v1", "http://[::1/v1", "http://localhost:99999/v1", "http://:80"]
)
def test_an_address_that_is_none_is_said(url: str) -> None:
    with pytest.raises(ServerError) as caught:
        parse_model(f"post=m@{url}")
    assert str(caught.value) == f"{url}: is no address; write it as http://localhost:8000/v1"
