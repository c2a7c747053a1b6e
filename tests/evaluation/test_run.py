"""Evaluations from Python: what is refused before anything is opened, and what a run returns."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from slrmerge.errors import CheckpointError, DataError, OptionError, OutputError, SlrmergeError
from slrmerge.evaluation.options import EvaluationOptions
from slrmerge.evaluation.run import Evaluation, evaluate
from slrmerge.io.options import options_of
from tests.conftest import TINY
from tests.evaluation.openai_server import OpenAIServer
from tests.problems import refused

pytestmark = pytest.mark.usefixtures("sketched")

MODELS = {"post": "m@http://localhost:1/v1"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"Name a state.": ["Ohio", "Utah"], "Name a metal.": [["Iron", "Fe"], "Gold"]}))
    return path


@pytest.mark.parametrize(
    ("arguments", "where", "code"),
    [
        ({"task": "open_qa"}, "task", "invalid-choice"),
        ({"models": []}, "models", "empty"),
        ({"models": ["./a", "b/a"]}, "models", "duplicate-label"),
        ({"models": "m@http://localhost:abc"}, "http://localhost:abc", "invalid-url"),
        ({"judge": "m@http://:80"}, "http://:80", "invalid-url"),
        ({"verbalized": 3, "samples": 8}, "samples", "not-a-multiple"),
        ({"verbalized": 3}, "samples", "not-a-multiple"),  # of the paper's 128
        ({"models": ["."], "device": "abacus"}, "device", "device-unavailable"),
        ({"embeddings": ".", "device": "abacus"}, "device", "device-unavailable"),
        ({"temperature": float("nan")}, "temperature", "out-of-range"),
        ({"min_p": 1.5}, "min_p", "out-of-range"),
        ({"timeout_s": 0}, "timeout_s", "out-of-range"),
        ({"samples": 0}, "samples", "out-of-range"),
        ({"batch": 0}, "batch", "out-of-range"),
        ({"batch": "automatic"}, "batch", "out-of-range"),
        ({"dtype": "int8"}, "dtype", "invalid-choice"),
        ({"concurrency": 1001}, "concurrency", "out-of-range"),
        ({"max_token": 5}, "max_token", "unknown-option"),
    ],
)
def test_an_invalid_option_is_refused_before_anything_is_opened(
    tmp_path: Path, arguments: dict[str, Any], where: str, code: str
) -> None:
    usual = {"task": "open-qa", "data": "missing.json", "models": MODELS, "out": tmp_path / "out"}
    with refused(OptionError, code) as caught:
        evaluate(**(usual | arguments))
    assert caught.value.problems[0].where == where
    assert not (tmp_path / "out").exists()


def test_a_device_does_not_matter_where_all_models_are_served(data: Path) -> None:
    Evaluation("open-qa", data, MODELS, EvaluationOptions(device="abacus"))


def test_the_constructor_opens_nothing() -> None:
    evaluation = Evaluation("open-qa", "org/no-such-dataset", {"post": "org/no-such-model"})
    assert repr(evaluation) == "<Evaluation open-qa of post>"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"data": "missing.json"}, DataError),
        ({"models": ["./nowhere"]}, CheckpointError),
        ({"out": "/"}, OutputError),
    ],
)
def test_nothing_is_written_where_something_cannot_be_opened(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], error: type[SlrmergeError]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        evaluate(**({"task": "open-qa", "data": data, "models": MODELS, "out": "out"} | arguments))
    assert [path.name for path in tmp_path.iterdir()] == [data.name]


def test_the_problems_of_all_models_are_reported_at_once(data: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        evaluate("open-qa", data, [tmp_path / "nowhere", tmp_path / "neither"], tmp_path / "out")
    assert [Path(problem.where).name for problem in caught.value.problems] == ["nowhere", "neither"]


def test_an_evaluation_returns_its_result_and_writes_it(data: Path, tmp_path: Path, server: OpenAIServer) -> None:
    server.say = lambda prompt, seed, body: "Ohio" if body["model"] == "m" else ("Utah", "Ohio", "Texas")[seed % 3]
    models = {"post": f"m@{server.url}", "slr": f"n@{server.url}"}
    result = evaluate("open-qa", str(data), models, str(tmp_path / "out"), samples=12, temperature=0.5)
    assert result.models == {"post": "m", "slr": "n"}
    assert (result.settings["samples"], result.settings["temperature"]) == (12, 0.5)
    assert result.cell("post", "precision").mean == 0.5
    assert result.cell("slr", "entropy").change > 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["prompts"] == 2


@pytest.mark.parametrize("link", ["noveltybench", "noveltybench/post"])
def test_an_export_follows_no_links(data: Path, tmp_path: Path, server: OpenAIServer, link: str) -> None:
    models = {"post": f"m@{server.url}"}
    evaluate("open-qa", data, models, tmp_path / "out", samples=2)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / link).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / link).symlink_to(tmp_path / "elsewhere")
    with refused(OutputError, "not-a-folder"):
        evaluate("open-qa", data, models, tmp_path / "out", samples=2, export="noveltybench")
    assert not any((tmp_path / "elsewhere").iterdir())


def test_the_dtype_is_recorded_and_samples_of_two_dtypes_are_not_mixed(data: Path, tmp_path: Path) -> None:
    def dtype(samples: int, **options: Any) -> object:
        models = {"post": TINY / "posttrained"}
        result = evaluate("open-qa", data, models, tmp_path / "out", samples=samples, max_tokens=2, **options)
        assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["settings"] == result.settings
        return result.settings["dtype"]

    assert dtype(1, dtype="bfloat16", batch="auto") == "bfloat16"
    with refused(OutputError, "settings-changed"):
        dtype(1)
    (tmp_path / "out" / "samples.jsonl").unlink()
    assert dtype(1) == "float32"
    assert dtype(2, dtype="float32", batch=1) == "float32"


def test_the_signature_shows_every_option_and_every_option_has_help() -> None:
    parameters = inspect.signature(evaluate).parameters
    assert list(parameters)[:5] == ["task", "data", "models", "out", "progress"]
    for name, option in options_of(EvaluationOptions).items():
        assert parameters[name].default == getattr(EvaluationOptions(), name)
        assert option.help
