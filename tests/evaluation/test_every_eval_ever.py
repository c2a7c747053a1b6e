"""Records of Every Eval Ever: their names and fields are those that its schemas, version 0.3.0, know and require."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from slrmerge.evaluation.result import EvaluationResult
from slrmerge.evaluation.run import evaluate
from tests.conftest import TINY
from tests.evaluation.openai_server import OpenAIServer

pytestmark = pytest.mark.usefixtures("sketched")

TEXT, NUMBER, WHOLE, FLAG = ({"type": name} for name in ("string", "number", "integer", "boolean"))
TEXTS = {"type": "array", "items": TEXT}
DETAILS = {"type": "object", "additionalProperties": TEXT}


def closed(required: Mapping[str, Any], **optional: Any) -> dict[str, Any]:
    """The schema of an object that has all `required` fields, and no others than those that are listed."""
    properties = {**required, **optional}
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": [*values]}


UUID4 = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
RECORD_PATH = re.compile(rf"data/[^/]+/[^/]+/[^/]+/{UUID4}\.json")

MODEL = closed(
    {
        "name": TEXT,
        "id": TEXT,
        "additional_details": {
            **DETAILS,
            "required": ["deployment_type", "model_availability"],
            "properties": {
                "deployment_type": one_of("self_deployed", "externally_managed", "unknown"),
                "model_availability": one_of("open_weights", "closed_weights", "unknown"),
            },
        },
    },
    developer=TEXT,
    inference_platform=TEXT,
    inference_engine=closed({}, name=TEXT, version=TEXT),
)
METRIC = closed(
    {
        "lower_is_better": FLAG,
        "score_type": one_of("continuous"),
        "min_score": NUMBER,
        "max_score": {"anyOf": [NUMBER, one_of("Infinity")]},
    },
    evaluation_description=TEXT,
    metric_id=TEXT,
    metric_name=TEXT,
)
UNCERTAINTY = closed(
    {},
    confidence_interval=closed({"lower": NUMBER, "upper": NUMBER}, confidence_level=NUMBER, method=TEXT),
    standard_deviation=NUMBER,
    num_samples=WHOLE,
    num_bootstrap_samples=WHOLE,
)
RESULT = closed(
    {
        "evaluation_name": TEXT,
        "source_data": closed({"dataset_name": TEXT, "source_type": one_of("other")}, additional_details=DETAILS),
        "metric_config": METRIC,
        "score_details": closed({"score": NUMBER}, details=DETAILS, uncertainty=UNCERTAINTY),
    },
    evaluation_result_id=TEXT,
    generation_config=closed(
        {}, generation_args=closed({}, temperature=NUMBER, max_tokens=WHOLE), additional_details=DETAILS
    ),
)
RECORD = closed(
    {
        "schema_version": TEXT,
        "evaluation_id": TEXT,
        "retrieved_timestamp": TEXT,
        "source_metadata": closed(
            {
                "source_type": one_of("documentation", "evaluation_run"),
                "source_organization_name": TEXT,
                "evaluator_relationship": one_of("first_party", "third_party", "collaborative", "other"),
            },
            source_name=TEXT,
        ),
        "model_info": MODEL,
        "eval_library": closed({"name": TEXT, "version": TEXT}),
        "evaluation_results": {"type": "array", "items": RESULT},
    },
    evaluation_timestamp=TEXT,
    detailed_evaluation_results=closed(
        {"format": one_of("jsonl"), "file_path": TEXT}, hash_algorithm=one_of("sha256", "md5"), total_rows=WHOLE
    ),
)
ANSWER = closed(
    {
        "schema_version": TEXT,
        "evaluation_id": TEXT,
        "model_id": TEXT,
        "evaluation_name": TEXT,
        "sample_id": TEXT,
        "interaction_type": one_of("single_turn"),
        "input": closed({"raw": TEXT, "reference": TEXTS}),
        "output": closed({"raw": TEXTS}),
        "answer_attribution": {
            "type": "array",
            "items": closed(
                {
                    "turn_idx": WHOLE,
                    "source": TEXT,
                    "extracted_value": TEXT,
                    "extraction_method": TEXT,
                    "is_terminal": FLAG,
                }
            ),
        },
        "evaluation": closed({"score": NUMBER, "is_correct": FLAG}),
    },
    evaluation_result_id=TEXT,
    sample_hash=TEXT,
    error={"type": ["string", "null"]},
    metadata=DETAILS,
)

Records = dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]


def records(folder: Path) -> Records:
    """The records in a folder and their answers, by the model's name; all are valid, and belong together."""
    found: Records = {}
    root = folder / "every-eval-ever"
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    for path in sorted(files):
        if path.endswith("_samples.jsonl"):
            continue
        assert RECORD_PATH.fullmatch(path)
        record = json.loads((root / path).read_text())
        jsonschema.validate(record, RECORD)
        answers = []
        if detailed := record.get("detailed_evaluation_results"):
            assert detailed["file_path"] == path.replace(".json", "_samples.jsonl")
            answers = list(map(json.loads, (root / detailed["file_path"]).read_text().splitlines()))
            assert len(answers) == detailed["total_rows"] > 0
        results = [each["evaluation_result_id"] for each in record["evaluation_results"]]
        for answer in answers:
            jsonschema.validate(answer, ANSWER)
            assert answer["evaluation_id"] == record["evaluation_id"]
            assert answer["model_id"] == record["model_info"]["id"]
            assert answer["evaluation_result_id"] in results
        found[record["model_info"]["name"]] = record, answers
    assert len(files) == sum(1 + bool(answers) for _, answers in found.values())
    return found


DATA: dict[str, list[dict[str, Any]]] = {
    "open-qa": [
        {"question": "Name a colour.", "answers": [["red", "crimson"], "blue"]},
        {"question": "Name a metal.", "answers": ["iron"]},
    ],
    "reasoning": [{"question": "How many?", "answer": 4}],
    "creative": [{"prompt": "Tell me a joke."}],
}
TEXTS_OF = {"open-qa": ["Crimson", "green"], "reasoning": ["It is 4.", "five"], "creative": ["ha", ""]}


def exported(task: str, folder: Path, **models: Path) -> EvaluationResult:
    """An evaluation of generations in a file, as models `post` and `a/b`, and of other models."""
    (folder / "data.json").write_text(json.dumps(DATA[task]))
    lines = ({"prompt": next(iter(each.values())), "generations": TEXTS_OF[task]} for each in DATA[task])
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    every = {"post": folder / "answers.jsonl", "a/b": folder / "answers.jsonl", **models}
    options = {"samples": 2, "max_tokens": 2, "missed": False, "export": "every-eval-ever"}
    return evaluate(task, folder / "data.json", every, folder / "eval", **options)


@pytest.mark.parametrize("task", DATA)
def test_records_are_valid_and_have_every_defined_metric(task: str, tmp_path: Path) -> None:
    result = exported(task, tmp_path)
    found = records(tmp_path / "eval")
    assert set(found) == {"post", "a/b"}
    for label, (record, _) in found.items():
        scores = {each["evaluation_result_id"]: each["score_details"]["score"] for each in record["evaluation_results"]}
        known = {cell.metric: cell.mean for cell in result.cells if cell.model == label and cell.mean == cell.mean}
        assert scores == pytest.approx(known)
        for each in record["evaluation_results"]:
            highest = float(each["metric_config"]["max_score"])
            assert each["metric_config"]["min_score"] <= each["score_details"]["score"] <= highest
        lower = [name for name, each in zip(scores, record["evaluation_results"], strict=True)
                 if each["metric_config"]["lower_is_better"]]  # fmt: skip
        assert lower == ["compression-ratio"]


@pytest.mark.parametrize(("task", "reference"), [("open-qa", ["red", "blue"]), ("reasoning", ["4"])])
def test_answers_have_their_reference_and_whether_they_are_right(
    task: str, reference: list[str], tmp_path: Path
) -> None:
    result = exported(task, tmp_path)
    _, answers = records(tmp_path / "eval")["post"]
    first = answers[0]
    assert [answer["output"]["raw"] for answer in answers[:2]] == [[text] for text in TEXTS_OF[task]]
    assert first["input"] == {"raw": DATA[task][0]["question"], "reference": reference}
    assert [answer["evaluation"] for answer in answers[:2]] == [
        {"score": 1.0, "is_correct": True},
        {"score": 0.0, "is_correct": False},
    ]
    assert first["answer_attribution"][0]["extracted_value"] == reference[0]
    assert [answer["metadata"]["epoch"] for answer in answers[:2]] == ["1", "2"]
    mean = sum(answer["evaluation"]["score"] for answer in answers) / len(answers)
    assert mean == pytest.approx(result.cell("post", first["evaluation_result_id"]).mean)


def test_creative_texts_are_neither_right_nor_wrong(tmp_path: Path) -> None:
    exported("creative", tmp_path)
    assert not list((tmp_path / "eval").rglob("*_samples.jsonl"))


def test_a_later_export_replaces_the_records(tmp_path: Path) -> None:
    exported("open-qa", tmp_path)
    before = sorted((tmp_path / "eval" / "every-eval-ever").rglob("*"))
    exported("open-qa", tmp_path)
    assert sorted((tmp_path / "eval" / "every-eval-ever").rglob("*")) == before


def test_a_model_in_this_process_has_its_engine_and_dtype(tmp_path: Path) -> None:
    exported("open-qa", tmp_path, tiny=TINY / "posttrained")
    found = records(tmp_path / "eval")
    model = found["tiny"][0]["model_info"]
    assert model["id"] == "local/tiny"
    assert model["inference_engine"]["name"] == "transformers"
    assert model["additional_details"]["deployment_type"] == "self_deployed"
    assert model["additional_details"]["dtype"] == "float32"
    assert found["tiny"][0]["evaluation_results"][0]["generation_config"]["generation_args"] == {
        "temperature": 1.0,
        "max_tokens": 2,
    }
    assert "generation_config" not in found["post"][0]["evaluation_results"][0]  # of a file, it is not known


@pytest.fixture
def named() -> Iterator[OpenAIServer]:
    with OpenAIServer("org/chat") as made:
        yield made


def test_a_served_model_has_the_name_that_its_server_gives_it(alone: None, named: OpenAIServer, tmp_path: Path) -> None:
    named.say = lambda prompt, seed, body: "red"
    (tmp_path / "data.json").write_text(json.dumps(DATA["open-qa"]))
    models = {"..": named.url}
    evaluate("open-qa", tmp_path / "data.json", models, tmp_path / "eval", samples=2, export="every-eval-ever")
    record, _ = records(tmp_path / "eval")[".."]
    assert record["model_info"]["id"] == "org/chat"
    assert record["model_info"]["additional_details"]["deployment_type"] == "unknown"
