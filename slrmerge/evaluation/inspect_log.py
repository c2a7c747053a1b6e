"""An evaluation as inspect-ai's logs, which `inspect view` opens: one for each model, one sample for each answer."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from slrmerge.evaluation.result import EvaluationResult
from slrmerge.evaluation.tasks.base import ModelResponses, Score
from slrmerge.io.files import create_folder
from slrmerge.io.pieces import translate_os_errors

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalSample

SCORER = "slrmerge"


def write_inspect(folder: Path, result: EvaluationResult, *, sampled_s: float) -> None:
    """Write `inspect/NUMBER-LABEL.eval` for each model. `sampled_s` is the time of its last sample, in Unix seconds."""
    from inspect_ai.log import write_eval_log

    created = datetime.fromtimestamp(sampled_s, UTC).isoformat(timespec="seconds")
    place = folder / "inspect"
    with translate_os_errors(place):
        create_folder(place, durable=False)
        for number, label in enumerate(result.models, 1):
            name = re.sub(r"[^\w.-]", "_", label)  # inspect-ai takes other characters for those of an address
            write_eval_log(inspect_log(result, label, created=created), str(place / f"{number}-{name}.eval"))


def inspect_log(result: EvaluationResult, label: str, *, created: str) -> "EvalLog":
    """The log of one model, with all texts in memory."""
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalMetric, EvalResults, EvalScore, EvalSpec
    from inspect_ai.model import GenerateConfig

    samples = [sample for each, score in result.of(label) for sample in _samples(result, each, score)]
    cells = [cell for cell in result.cells if cell.model == label and not isnan(cell.mean)]
    metrics = {cell.metric: EvalMetric(name=cell.metric, value=cell.mean) for cell in cells}
    settings = result.settings
    number = _id(label, created)
    return EvalLog(
        status="success",
        eval=EvalSpec(
            eval_id=number,
            run_id=_id(created),
            task_id=number,
            created=created,
            task=result.task,
            dataset=EvalDataset(name=str(settings["data"]), samples=result.prompts),
            model=result.models[label],
            model_generate_config=GenerateConfig(
                temperature=settings["temperature"], max_tokens=settings["max_tokens"], seed=settings["seed"]
            ),
            config=EvalConfig(epochs=settings["samples"]),
            metadata={"label": label, **settings, "notes": list(result.notes)},
        ),
        results=EvalResults(
            total_samples=len(samples),
            completed_samples=len(samples),
            scores=[EvalScore(name=SCORER, scorer=SCORER, metrics=metrics)],
        ),
        samples=samples,
    )


def _samples(result: EvaluationResult, each: ModelResponses[Any], score: Score) -> Iterator["EvalSample"]:
    """A sample for each text; one that was refused, or is missing, is empty. The mark is the answer that was read."""
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, ModelOutput
    from inspect_ai.scorer import CORRECT, INCORRECT
    from inspect_ai.scorer import Score as InspectScore

    question, model = each.question, result.models[each.model]
    for epoch, (text, (mark, is_right)) in enumerate(zip(each.texts, score.verdicts(), strict=True), 1):
        number = _id(each.model, question.id, epoch)
        scores = {}
        if is_right is not None:
            scores[SCORER] = InspectScore(value=CORRECT if is_right else INCORRECT, answer=mark)
        elif mark:
            scores[SCORER] = InspectScore(value=float(mark))
        yield EvalSample(
            id=question.id,
            epoch=epoch,
            uuid=number,
            input=question.text,
            target=question.reference,
            messages=[
                ChatMessageUser(id=f"{number}-u", content=question.text),
                ChatMessageAssistant(id=f"{number}-a", content=text or "", model=model),
            ],
            output=ModelOutput.from_content(model, text or ""),
            scores=scores or None,
        )


def _id(*parts: object) -> str:
    """A digest, where inspect-ai would draw an id at random."""
    return xxhash.xxh3_64_hexdigest(repr(parts).encode("utf-8", "surrogatepass"))
