"""`slrmerge eval`: three tasks with models that answer at once, its output, its folder."""

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli import refusal, run, strict_json
from tests.cli.test_golden import compare
from tests.evaluation.helpers import Answering, Embeddings

pytestmark = pytest.mark.usefixtures("sketched")

STATES = {"Name a state.": ["Ohio", "Utah", "Iowa", "Maine"], "Name a metal.": [["Iron", "Fe"], "Gold"]}
SAMPLES = 8


class Seeded(Answering):
    """Answers by prompt and seed, as a model does."""

    def __init__(self, reply: Callable[[str, int], str], model_id: str) -> None:
        super().__init__(lambda prompt: reply(prompt, self.requests[-1].seed), model_id)


def pick(*choices: str) -> Callable[[str, int], str]:
    """Every choice alike often, by the seed."""
    return lambda prompt, seed: choices[seed % len(choices)]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Seeded]:
    """Models by the names that stand before @http://models; the command finds them there, in a folder of its own."""
    made: dict[str, Seeded] = {}
    monkeypatch.setattr("slrmerge.evaluation.run.ServerModel", lambda at, **_: made[at.model])
    monkeypatch.chdir(tmp_path)

    def named(name: str, reply: Callable[[str, int], str]) -> None:
        made[name] = Seeded(reply, name)

    named("poor", pick("Ohio", "Ohio", "Ohio", "It is Utah.", "Texas"))
    named("rich", pick("Ohio", "Utah", "Iowa", "Fe", "gold", "nonsense"))
    return made


def evaluate(task: str, data: object, *options: object, **models: str) -> Any:
    """Run `slrmerge eval` for models by label."""
    Path("data.json").write_text(json.dumps(data))
    named = [f"--model={label}={model}@http://models" for label, model in models.items()]
    return run("eval", task, "--data", "data.json", *named, "--out", "eval", "--samples", SAMPLES, *options)


def rows() -> dict[tuple[str, str], dict[str, str]]:
    with open("eval/results.csv", newline="") as file:
        return {(row["model"], row["metric"]): row for row in csv.DictReader(file)}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_output_of_open_qa(models: dict[str, Seeded], tmp_path: Path) -> None:
    result = evaluate("open-qa", STATES, post="poor", slr="rich")
    arguments = ["eval open-qa --data data.json --model post=… --model slr=… --out eval --samples 8"]
    compare("eval", arguments, (result.stdout, result.stderr, result.exit_code), tmp_path)


def test_output_of_creative_with_a_judge(models: dict[str, Any], tmp_path: Path) -> None:
    points = '{"request": 9, "language": 7, "craft": 5, "invention": 3, "effect": 1}'
    models["judge"] = Seeded(pick(points, points, "I like it"), "judge")
    vectors = {"Ohio": (1, 0), "It is Utah.": (0, 1), "Texas": (1, 1), "Utah": (0, 1), "Iowa": (-1, 0)}
    vectors |= {"Fe": (1, 2), "gold": (2, 1), "nonsense": (0, -1)}
    models["vectors"] = Embeddings(vectors, reads=6)
    served = ["--judge", "judge@http://models", "--embeddings", "vectors@http://models"]
    data = [{"prompt": "Tell me a joke."}, {"prompt": "Tell me a story."}]
    result = evaluate("creative", data, *served, post="poor", slr="rich")
    arguments = ["eval creative --data data.json … --judge … --embeddings … --out eval --samples 8"]
    compare("eval-creative", arguments, (result.stdout, result.stderr, result.exit_code), tmp_path)


def test_output_of_reasoning(models: dict[str, Seeded], tmp_path: Path) -> None:
    models["poor"].reply = lambda prompt: "#### 4" if prompt == "2+2?" else "it is 5"
    models["rich"] = Seeded(pick("it is 6", "7"), "rich")
    data = [
        {"question": "2+2?", "answer": "4"},
        {"question": "3+3?", "answer": "#### 6"},
        {"question": "7?", "answer": 7},
    ]
    result = evaluate("reasoning", data, post="poor", slr="rich")
    arguments = ["eval reasoning --data data.json --model post=… --model slr=… --out eval --samples 8"]
    compare("eval-reasoning", arguments, (result.stdout, result.stderr, result.exit_code), tmp_path)
    greedy = [json.loads(line) for line in Path("eval/greedy.jsonl").read_text().splitlines()]
    assert [line["settings"]["temperature"] for line in greedy] == [0, 0, 0]
    asked = {json.loads(line)["prompt"] for line in Path("eval/samples.jsonl").read_text().splitlines()}
    assert len(asked) == 2  # what the first model gets right without chance is not asked


def test_the_folder_contains_table_chart_page_and_every_sample(models: dict[str, Seeded]) -> None:
    assert evaluate("open-qa", STATES, post="poor", slr="rich").exit_code == 0
    assert sorted(path.name for path in Path("eval").iterdir()) == [
        "evaluation.json", "metrics.png", "metrics.svg", "prompts.csv", "results.csv", "results.md", "samples.html",
        "samples.jsonl",
    ]  # fmt: skip
    assert len(Path("eval/samples.jsonl").read_text().splitlines()) == 2 * len(STATES) * SAMPLES
    said = json.loads(Path("eval/evaluation.json").read_text())
    assert said["models"] == {"post": "poor", "slr": "rich"}
    assert float(rows()["slr", "entropy"]["mean"]) > float(rows()["post", "entropy"]["mean"])


def test_the_numbers_follow_from_the_samples_alone(models: dict[str, Seeded]) -> None:
    evaluate("open-qa", STATES, post="rich")
    texts = [json.loads(line)["text"] for line in Path("eval/samples.jsonl").read_text().splitlines()]
    with open("eval/prompts.csv", newline="") as file:
        states, metals = (float(row["precision"]) for row in csv.DictReader(file))
    assert states == sum(text in ("Ohio", "Utah", "Iowa") for text in texts[:SAMPLES]) / SAMPLES
    assert metals == sum(text in ("Fe", "gold") for text in texts[SAMPLES:]) / SAMPLES


def test_the_same_command_again_requests_nothing_and_writes_the_same_bytes(models: dict[str, Seeded]) -> None:
    first = evaluate("open-qa", STATES, post="poor", slr="rich")
    before = digests(Path("eval"))
    asked = len(models["poor"].requests)
    assert evaluate("open-qa", STATES, post="poor", slr="rich").stdout == first.stdout
    assert len(models["poor"].requests) == asked
    assert digests(Path("eval")) == before


def test_fewer_questions_are_a_part_of_more(models: dict[str, Seeded]) -> None:
    data = {f"Name state {number}.": ["Ohio"] for number in range(9)}
    for count, asked in ((3, 3), (5, 5), (4, 5)):
        assert evaluate("open-qa", data, "--questions", count, post="poor").exit_code == 0
        assert len({request.prompt for request in models["poor"].requests}) == asked
        with open("eval/prompts.csv", newline="") as file:
            prompts = [row["text"] for row in csv.DictReader(file)]
        assert len(prompts) == count
        assert prompts == sorted(prompts)  # in the order of the data


def test_verbalized_sampling_makes_fewer_requests_and_counts_malformed_replies(models: dict[str, Seeded]) -> None:
    reply = json.dumps({"answers": [{"text": name, "probability": 0.5} for name in ("Ohio", "Utah", "Fe", "Gold")]})
    models["poor"] = Seeded(pick(reply, reply, "I would rather not."), "poor")
    result = evaluate("open-qa", STATES, "--verbalized", 4, post="poor")
    assert len(models["poor"].requests) == len(STATES) * SAMPLES // 4
    assert models["poor"].requests[0].prompt.startswith("Name a state.\n\n")
    assert models["poor"].settings[0].max_tokens == 1024
    refused = sum("rather not" in line for line in Path("eval/samples.jsonl").read_text().splitlines())
    assert refused > 0
    assert f"post: {4 * refused} of 16 " in result.stdout
    right = 2 * (len(models["poor"].requests) - refused)  # in each reply two fit the question
    precision = rows()["post", "precision"]["mean"]
    assert float(precision) == pytest.approx(right / (len(STATES) * SAMPLES))


def test_json_has_every_cell(models: dict[str, Seeded]) -> None:
    result = evaluate("open-qa", STATES, "--json", post="poor", slr="rich")
    value = json.loads(result.stdout)
    assert result.stderr == ""
    assert [(cell["model"], cell["metric"]) for cell in value["results"]] == [
        (model, metric)
        for model in ("post", "slr")
        for metric in ("precision", "entropy", "coverage-8", "distinct-1", "distinct-2", "compression-ratio")
    ]
    assert value["results"][0]["change"] is None
    assert value["settings"]["samples"] == SAMPLES


def test_quiet_prints_nothing(models: dict[str, Seeded]) -> None:
    result = evaluate("open-qa", STATES, "--quiet", post="poor")
    assert (result.stdout, result.stderr, result.exit_code) == ("", "", 0)


def test_the_problems_of_all_models_are_reported_at_once(models: dict[str, Seeded]) -> None:
    result = run(
        "eval",
        "open-qa",
        "--data",
        _states(),
        "--model",
        "./nowhere",
        "--model",
        "./neither",
        "--out",
        "eval",
        "--json",
    )
    problems = strict_json(result.stdout)["problems"]
    assert [problem["where"] for problem in problems] == ["nowhere", "neither"]
    assert result.exit_code == 4
    assert not Path("eval").exists()


def _states() -> str:
    Path("data.json").write_text(json.dumps(STATES))
    return "data.json"


def test_the_device_matters_only_for_models_in_this_process(models: dict[str, Seeded]) -> None:
    local = ["--model", "post=.", "--out", "eval", "--device", "abacus"]
    assert refusal("eval", "open-qa", "--data", _states(), *local) == (2, ["device-unavailable"])
    batches = ["--batch", "auto", "--dtype", "bf16"]
    assert refusal("eval", "open-qa", "--data", _states(), *local, *batches) == (2, ["device-unavailable"])
    assert evaluate("open-qa", STATES, "--device", "abacus", post="poor").exit_code == 0
