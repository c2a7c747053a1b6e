"""`slrmerge eval` as people meet it: three tasks with models that answer at once, its words, its folder."""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from slrmerge.evaluate import run as evaluation
from tests.cli import run
from tests.cli.test_golden import compare
from tests.evaluate.helpers import Answering, Embeddings

STATES = {"Name a state.": ["Ohio", "Utah", "Iowa", "Maine"], "Name a metal.": [["Iron", "Fe"], "Gold"]}
SAMPLES = 8

Replies = Mapping[str, Callable[[str, int], str]]


class Seeded(Answering):
    """Answers by prompt and seed, as a model does."""

    def __init__(self, reply: Callable[[str, int], str], asked_of: str) -> None:
        super().__init__(lambda prompt: reply(prompt, self.asks[-1].seed), asked_of)


def pick(*choices: str) -> Callable[[str, int], str]:
    """Every choice alike often, by the seed."""
    return lambda prompt, seed: choices[seed % len(choices)]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Seeded]:
    """Models by the names that stand before @http://models; the command finds them there, in a folder of its own."""
    made: dict[str, Seeded] = {}
    monkeypatch.setattr(evaluation, "ServerModel", lambda at, **_: made[at.model])
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


def test_what_a_person_sees_of_open_qa(models: dict[str, Seeded], tmp_path: Path) -> None:
    result = evaluate("open-qa", STATES, post="poor", slr="rich")
    arguments = ["eval open-qa --data data.json --model post=… --model slr=… --out eval --samples 8"]
    compare("eval", arguments, (result.stdout, result.stderr, result.exit_code), tmp_path)


def test_what_a_person_sees_of_creative_with_a_judge(
    models: dict[str, Seeded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = '{"request": 9, "language": 7, "craft": 5, "invention": 3, "effect": 1}'
    models["judge"] = Seeded(pick(points, points, "I like it"), "judge")
    vectors = {"Ohio": (1, 0), "It is Utah.": (0, 1), "Texas": (1, 1), "Utah": (0, 1), "Iowa": (-1, 0)}
    vectors |= {"Fe": (1, 2), "gold": (2, 1), "nonsense": (0, -1)}
    monkeypatch.setattr(evaluation, "ServedEmbeddings", lambda model: Embeddings(vectors, reads=6))
    models["vectors"] = models["judge"]
    served = ["--judge", "judge@http://models", "--embeddings", "vectors@http://models"]
    data = [{"prompt": "Tell me a joke."}, {"prompt": "Tell me a story."}]
    result = evaluate("creative", data, *served, post="poor", slr="rich")
    arguments = ["eval creative --data data.json … --judge … --embeddings … --out eval --samples 8"]
    compare("eval-creative", arguments, (result.stdout, result.stderr, result.exit_code), tmp_path)


def test_what_a_person_sees_of_reasoning(models: dict[str, Seeded], tmp_path: Path) -> None:
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


def test_the_folder_holds_table_picture_page_and_every_sample(models: dict[str, Seeded]) -> None:
    assert evaluate("open-qa", STATES, post="poor", slr="rich").exit_code == 0
    assert sorted(path.name for path in Path("eval").iterdir()) == [
        "evaluation.json", "greedy.jsonl", "judge.jsonl", "metrics.png", "metrics.svg", "prompts.csv", "results.csv",
        "results.md", "samples.html", "samples.jsonl",
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


def test_the_same_command_again_asks_nothing_and_writes_the_same_bytes(models: dict[str, Seeded]) -> None:
    first = evaluate("open-qa", STATES, post="poor", slr="rich")
    before = digests(Path("eval"))
    asked = len(models["poor"].asks)
    assert evaluate("open-qa", STATES, post="poor", slr="rich").stdout == first.stdout
    assert len(models["poor"].asks) == asked
    assert digests(Path("eval")) == before


def test_fewer_questions_are_some_of_more(models: dict[str, Seeded]) -> None:
    data = {f"Name state {number}.": ["Ohio"] for number in range(9)}
    for count, asked in ((3, 3), (5, 5), (4, 5)):
        assert evaluate("open-qa", data, "--questions", count, post="poor").exit_code == 0
        assert len({ask.prompt for ask in models["poor"].asks}) == asked
        with open("eval/prompts.csv", newline="") as file:
            prompts = [row["text"] for row in csv.DictReader(file)]
        assert len(prompts) == count
        assert prompts == sorted(prompts)  # in the order of the data


def test_verbalized_sampling_asks_less_often_and_counts_what_is_malformed(models: dict[str, Seeded]) -> None:
    reply = json.dumps({"answers": [{"text": name, "probability": 0.5} for name in ("Ohio", "Utah", "Fe", "Gold")]})
    models["poor"] = Seeded(pick(reply, reply, "I would rather not."), "poor")
    result = evaluate("open-qa", STATES, "--verbalized", 4, post="poor")
    assert len(models["poor"].asks) == len(STATES) * SAMPLES // 4
    assert models["poor"].asks[0].prompt.startswith("Name a state.\n\nDo not give one answer but 4 different ones")
    assert models["poor"].settings[0].max_tokens == 1024
    refused = sum("rather not" in line for line in Path("eval/samples.jsonl").read_text().splitlines())
    assert refused > 0
    assert f"note: post: {4 * refused} of 16 verbalized samples were missing or malformed\n" in result.stdout
    right = 2 * (len(models["poor"].asks) - refused)  # in each reply two fit the question
    precision = rows()["post", "precision"]["mean"]
    assert float(precision) == pytest.approx(right / (len(STATES) * SAMPLES))


def test_json_has_every_cell(models: dict[str, Seeded]) -> None:
    result = evaluate("open-qa", STATES, "--json", post="poor", slr="rich")
    value = json.loads(result.stdout)
    assert result.stderr == ""
    assert [(cell["model"], cell["metric"]) for cell in value["results"]] == [
        (model, metric) for model in ("post", "slr") for metric in ("precision", "entropy", "coverage-8")
    ]
    assert value["results"][0]["change"] is None
    assert value["settings"]["samples"] == SAMPLES


def test_quiet_says_nothing(models: dict[str, Seeded]) -> None:
    result = evaluate("open-qa", STATES, "--quiet", post="poor")
    assert (result.stdout, result.stderr, result.exit_code) == ("", "", 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--verbalized", 3], "--samples is not a multiple of --verbalized 3"),
        (["--model", "post=rich@http://models"], "two models are called post; write LABEL=MODEL"),
        (["--temperature", "nan"], "Invalid value for '--temperature': nan is not a number"),
        (["--min-p", "1.5"], "Invalid value for '--min-p': 1.5 is not in the range 0<=x<=1."),
        (["--timeout", "0"], "Invalid value for '--timeout': 0.0 is not in the range x>0."),
        (["--samples", "0"], "Invalid value for '--samples': 0 is not in the range x>=1."),
    ],
)
def test_a_mistaken_option_is_said_and_nothing_is_written(
    models: dict[str, Seeded], options: list[object], said: str
) -> None:
    result = evaluate("open-qa", STATES, *options, post="poor")
    assert result.exit_code == 2
    assert f"Error: {said}\n" in result.stderr
    assert not Path("eval").exists()


def test_the_problems_of_all_models_come_at_once(models: dict[str, Seeded]) -> None:
    result = run(
        "eval", "open-qa", "--data", _states(), "--model", "post=./nowhere", "--model", "slr=./neither", "--out", "eval"
    )
    assert result.exit_code == 4
    assert len(re.findall(r"^  (nowhere|neither): ", result.stderr, re.MULTILINE)) == 2
    assert not Path("eval").exists()


def _states() -> str:
    Path("data.json").write_text(json.dumps(STATES))
    return "data.json"


def test_a_device_that_is_none_is_said_and_only_where_something_computes_on_it(models: dict[str, Seeded]) -> None:
    result = run("eval", "open-qa", "--data", _states(), "--model", "post=.", "--out", "eval", "--device", "abacus")
    assert result.exit_code == 2
    assert "Error: --device abacus cannot be used: " in result.stderr
    assert evaluate("open-qa", STATES, "--device", "abacus", post="poor").exit_code == 0


def test_a_page_is_said_where_it_is(models: dict[str, Seeded]) -> None:
    result = evaluate("open-qa", STATES, post="poor")
    assert result.stdout.splitlines()[-1] == f"read what they said: {Path('eval/samples.html')}"
