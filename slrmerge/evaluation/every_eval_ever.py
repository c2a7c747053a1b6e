"""An evaluation as records of Every Eval Ever: one for each model, with its answers where a task has right and wrong.

The form is that of its schemas, version 0.3.0 (https://github.com/evaleval/every_eval_ever).
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from math import inf, isnan
from pathlib import Path
from typing import Any
from uuid import UUID

import xxhash

from slrmerge._version import __version__
from slrmerge.evaluation.generations import GenerationsFile
from slrmerge.evaluation.metrics import Metric
from slrmerge.evaluation.models import ChatModel
from slrmerge.evaluation.result import CONFIDENCE, RESAMPLES, Cell, EvaluationResult
from slrmerge.io.files import create_folder, replace_file
from slrmerge.io.pieces import translate_os_errors
from slrmerge.io.text import to_json

SCHEMA_VERSION = "0.3.0"

ANSWERS_OF = {"open-qa": "precision", "reasoning": "pass@1"}
"""The metric that is the mean over answers of whether they are right."""


def write_every_eval_ever(
    folder: Path, result: EvaluationResult, models: Mapping[str, ChatModel], *, sampled_s: float
) -> None:
    """Write `every-eval-ever/data/slrmerge-TASK/DEVELOPER/MODEL/UUID.json` for each model, and its `_samples.jsonl`.

    `models` are those of the result; `sampled_s` is the time of the last sample, in Unix seconds. A record of the same
    task and model is replaced.
    """
    root = folder / "every-eval-ever"
    with translate_os_errors(root):
        for label, answering in models.items():
            model = _model(label, answering)
            record_id = f"{result.task}/{model['id']}/{sampled_s}"
            uuid = UUID(bytes=xxhash.xxh3_128_digest(to_json([result.task, model]).encode()), version=4)
            parts = [f"slrmerge-{result.task}", *(_portable(part) for part in model["id"].split("/", 1))]
            path = Path("data", *parts, f"{uuid}.json")
            samples = path.with_name(f"{uuid}_samples.jsonl")
            create_folder(root / path.parent, durable=False)
            generation = None if isinstance(answering, GenerationsFile) else _generation(result)
            record = _record(result, label, model, generation, record_id, sampled_s)
            if result.task in ANSWERS_OF:
                answers = _answers(result, label, model["id"], record_id)
                replace_file(root / samples, (_json(answer) for answer in answers))
                record["detailed_evaluation_results"] = {
                    "format": "jsonl",
                    "file_path": samples.as_posix(),
                    "hash_algorithm": "sha256",
                    "total_rows": sum(len(each.texts) for each, _ in result.of(label)),
                }
            replace_file(root / path, _json(record, indent=2))


def _generation(result: EvaluationResult) -> dict[str, Any]:
    arguments = {name: result.settings[name] for name in ("temperature", "max_tokens")}
    others = {name: value for name, value in result.settings.items() if name not in arguments and value is not None}
    details = {name: str(value) for name, value in others.items()}  # which the schema wants as strings
    return {"generation_args": arguments, "additional_details": details}


def _record(
    result: EvaluationResult,
    label: str,
    model: Mapping[str, Any],
    generation: Mapping[str, Any] | None,
    record_id: str,
    sampled_s: float,
) -> dict[str, Any]:
    """What the schema calls an evaluation log: a model, and the metrics that are defined for it."""
    metrics = {metric.name: metric for metric in result.metrics}
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation_id": record_id,
        "evaluation_timestamp": str(sampled_s),
        "retrieved_timestamp": str(sampled_s),
        "source_metadata": {
            "source_name": "slrmerge",
            "source_type": "evaluation_run",
            "source_organization_name": "unknown",
            "evaluator_relationship": "other",
        },
        "eval_library": {"name": "slrmerge", "version": __version__},
        "model_info": model,
        "evaluation_results": [
            {
                "evaluation_result_id": cell.metric,
                "evaluation_name": result.task,
                "source_data": {"dataset_name": str(result.settings["data"]), "source_type": "other"},
                "metric_config": _metric(metrics[cell.metric]),
                "score_details": _score(cell, metrics[cell.metric]),
                **({"generation_config": generation} if generation else {}),
            }
            for cell in result.cells
            if cell.model == label and not isnan(cell.mean)
        ],
    }


def _model(label: str, answering: ChatModel) -> dict[str, Any]:
    """A model by its name on the Hub or its server, where that has two parts; otherwise `local/LABEL`."""
    name, dtype = answering.model_id.partition("@")[0], answering.dtype
    model: dict[str, Any] = {
        "name": label,
        "id": name if re.fullmatch(r"\w[\w.-]*/[\w./-]*[\w-]", name) else f"local/{label}",
        "additional_details": {
            "model_id": answering.model_id,
            "deployment_type": "self_deployed" if dtype else "unknown",
            "model_availability": "unknown",
        },
    }
    if dtype:
        model["inference_engine"] = {"name": "transformers", "version": version("transformers")}
        model["additional_details"]["dtype"] = dtype
    return model


def _metric(metric: Metric) -> dict[str, Any]:
    return {
        "evaluation_description": metric.meaning,
        "metric_id": f"slrmerge.{metric.name}",
        "metric_name": metric.name,
        "lower_is_better": metric.less_is_better,
        "score_type": "continuous",
        "min_score": 0,
        "max_score": "Infinity" if metric.most == inf else metric.most,
    }


def _score(cell: Cell, metric: Metric) -> dict[str, Any]:
    uncertainty: dict[str, Any] = {"num_samples": cell.prompts}
    if not isnan(cell.sd):
        uncertainty["standard_deviation"] = cell.sd
    if not isnan(cell.low):
        interval = {"lower": cell.low, "upper": cell.high, "confidence_level": CONFIDENCE, "method": "bootstrap"}
        uncertainty |= {"confidence_interval": interval, "num_bootstrap_samples": RESAMPLES}
    return {"score": min(max(cell.mean, 0.0), metric.most), "uncertainty": uncertainty}  # by rounding, it is outside


def _answers(result: EvaluationResult, label: str, model_id: str, record_id: str) -> Iterator[dict[str, Any]]:
    """What the schema calls instance-level logs: every answer, and whether it is right."""
    for each, score in result.of(label):
        question, reference = each.question.text, each.question.reference
        digest = hashlib.sha256("".join([question, *reference]).encode("utf-8", "replace")).hexdigest()
        for number, (text, (mark, is_right)) in enumerate(zip(each.texts, score.verdicts(), strict=True), 1):
            extracted = {
                "turn_idx": 0,
                "source": "output.raw",
                "extracted_value": mark,
                "extraction_method": "custom",
                "is_terminal": True,
            }
            yield {
                "schema_version": SCHEMA_VERSION,
                "evaluation_id": record_id,
                "model_id": model_id,
                "evaluation_name": result.task,
                "evaluation_result_id": ANSWERS_OF[result.task],
                "sample_id": each.question.id,
                "sample_hash": digest,
                "interaction_type": "single_turn",
                "input": {"raw": question, "reference": reference},
                "output": {"raw": [text or ""]},
                "answer_attribution": [extracted] if mark else [],
                "evaluation": {"score": float(bool(is_right)), "is_correct": bool(is_right)},
                "error": "no answer" if text is None else None,
                "metadata": {"epoch": str(number)},
            }


def _json(value: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    return to_json(value, indent=indent).encode("utf-8", "replace") + b"\n"


def _portable(name: str) -> str:
    """A part of a path on every system."""
    return re.sub(r"[^\w.+=-]|\.$", "_", name)
