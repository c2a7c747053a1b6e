"""inspect-ai reads the logs that an evaluation exports."""

import json
from pathlib import Path
from typing import Any

import pytest

from slrmerge.evaluation.run import evaluate

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # inspect-ai's own

DATA: dict[str, Any] = {
    "open-qa": [{"question": "Name a colour.", "answers": ["red", "blue"]}],
    "reasoning": [{"question": "How many?", "answer": 4}],
    "creative": [{"prompt": "Tell me a joke."}],
}
TEXTS = {"open-qa": ["Red", "green"], "reasoning": ["It is 4.", "5"], "creative": ["ha", ""]}
VALUES = {"open-qa": ["C", "I"], "reasoning": ["C", "I"], "creative": [None, None]}


@pytest.mark.parametrize("task", DATA)
def test_inspect_reads_the_samples_scores_and_metrics(task: str, tmp_path: Path) -> None:
    from inspect_ai.log import list_eval_logs, read_eval_log

    (question,) = DATA[task]
    prompt = question.get("question") or question["prompt"]
    (tmp_path / "data.json").write_text(json.dumps(DATA[task]))
    line = {"prompt": prompt, "generations": TEXTS[task]}
    (tmp_path / "answers.jsonl").write_text(json.dumps(line) + "\n")
    models = {"post": tmp_path / "answers.jsonl", "a/b": tmp_path / "answers.jsonl"}
    options = {"samples": 2, "missed": False, "export": "inspect"}
    result = evaluate(task, tmp_path / "data.json", models, tmp_path / "eval", **options)
    logs = {Path(info.name).name: read_eval_log(info) for info in list_eval_logs(str(tmp_path / "eval" / "inspect"))}
    assert set(logs) == {"1-post.eval", "2-a_b.eval"}
    log = logs["1-post.eval"]
    assert (log.status, log.eval.task, log.eval.model) == ("success", task, result.models["post"])
    assert log.eval.config.epochs == 2
    samples = log.samples or []
    assert [(sample.epoch, sample.input, sample.output.completion) for sample in samples] == [
        (epoch, prompt, text) for epoch, text in enumerate(TEXTS[task], 1)
    ]
    found = [sample.scores["slrmerge"].value if sample.scores else None for sample in samples]
    assert found == VALUES[task]
    assert log.results is not None
    (score,) = log.results.scores
    known = {cell.metric: cell.mean for cell in result.cells if cell.model == "post" and cell.mean == cell.mean}
    assert {name: metric.value for name, metric in score.metrics.items()} == pytest.approx(known)
