"""The table: mean and standard deviation over prompts, confidence intervals, what changed against the first model."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from math import isnan, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slrmerge.evaluate.tasks import Answered, Metric, Plot, Scored

RESAMPLES, CONFIDENCE = 9999, 0.95


@dataclass(frozen=True, slots=True)
class Cell:
    """One metric of one model over its prompts; NaN where something is not defined.

    `low` and `high` hold the mean with 95 % confidence (bootstrap over prompts, percentiles). `change` is the mean
    difference to the first model on the prompts that both have a value for, with its own interval, and
    `relative_change` that difference as a share of the first model's mean there.
    """

    model: str
    metric: str
    prompts: int
    mean: float
    sd: float
    low: float
    high: float
    change: float = nan
    change_low: float = nan
    change_high: float = nan
    relative_change: float = nan


@dataclass(frozen=True)
class Report:
    """An evaluation's outcome. `settings` are what every sample was made by, `prompts` how many were asked.

    `answered` and `scored` go together, prompt by prompt and, for each, model by model.
    """

    task: str
    metrics: tuple[Metric, ...]
    models: Mapping[str, str]
    prompts: int
    settings: Mapping[str, Any]
    cells: tuple[Cell, ...]
    notes: tuple[str, ...]
    answered: Sequence[Answered]
    scored: Sequence[Scored]
    plot: Plot

    def cell(self, model: str, metric: str) -> Cell:
        return next(cell for cell in self.cells if (cell.model, cell.metric) == (model, metric))

    @property
    def shown(self) -> list[Metric]:
        """The metrics that some model has a value for."""
        return [
            metric for metric in self.metrics if not all(isnan(self.cell(m, metric.name).mean) for m in self.models)
        ]


def values_of(
    answered: Sequence[Answered], scored: Sequence[Scored], metrics: Sequence[Metric]
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """The values of each model and metric, prompt by prompt."""
    by_model: dict[str, list[Scored]] = {}
    for each, worth in zip(answered, scored, strict=True):
        by_model.setdefault(each.model, []).append(worth)
    return {
        model: {metric.name: np.array([worth.metrics[metric.name] for worth in worths]) for metric in metrics}
        for model, worths in by_model.items()
    }


def summarise(values: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> tuple[Cell, ...]:
    """Cells from the values of each model and metric: one a prompt, in the same order, NaN where there is none."""
    first = next(iter(values.values()))
    return tuple(
        _cell(model, metric, found, None if by_metric is first else first[metric])
        for model, by_metric in values.items()
        for metric, found in by_metric.items()
    )


def _cell(model: str, metric: str, values: NDArray[np.float64], reference: NDArray[np.float64] | None) -> Cell:
    known = values[~np.isnan(values)]
    cell = Cell(model, metric, len(known), _mean(known), _sd(known), *_interval(known))
    if reference is None:
        return cell
    both = ~np.isnan(values) & ~np.isnan(reference)
    change, start = values[both] - reference[both], _mean(reference[both])
    low, high = _interval(change)
    return replace(
        cell,
        change=_mean(change),
        change_low=low,
        change_high=high,
        relative_change=_mean(change) / start if start else nan,
    )


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else nan


def _sd(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else nan


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The confidence interval of the mean; the same for the same values."""
    if len(values) < 2:
        return nan, nan
    from scipy.stats import bootstrap

    found = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, batch=1000, confidence_level=CONFIDENCE, method="percentile", rng=0
    ).confidence_interval
    return float(found.low), float(found.high)


def table_rows(report: Report) -> list[list[str]]:
    """A header and a row for each model: mean (sd), its interval, and what changed, in lines."""
    rows = [["", *(metric.name for metric in report.shown)]]
    for model in report.models:
        rows.append([model, *("\n".join(_lines(report.cell(model, metric.name))) for metric in report.shown)])
    return rows


def _lines(cell: Cell) -> list[str]:
    if isnan(cell.mean):
        return ["–"]
    lines = [f"{cell.mean:.3f}" + ("" if isnan(cell.sd) else f" ({cell.sd:.3f})")]
    if not isnan(cell.low):
        lines.append(f"[{cell.low:.3f}, {cell.high:.3f}]")
    if not isnan(cell.change):
        share = "" if isnan(cell.relative_change) else f" ({cell.relative_change:+.0%})"
        interval = "" if isnan(cell.change_low) else f" [{cell.change_low:+.3f}, {cell.change_high:+.3f}]"
        lines.append(f"{cell.change:+.3f}{share}{interval}")
    return lines


def caption(report: Report) -> str:
    """What the table shows, in a sentence."""
    first, *others = report.models
    said = ", ".join(f"{name} {value}" for name, value in report.settings.items() if value is not None)
    shown = f"mean (sd) over prompts, [{CONFIDENCE:.0%} bootstrap interval]"
    shown += f", change against {first}" if others else ""
    return f"{report.task}, {report.prompts:,} prompts, {said}: {shown}"


def as_markdown(report: Report) -> str:
    """The table, what its columns are, and the notes."""
    header, *rows = table_rows(report)
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    lines += [f"| {' | '.join(cell.replace(chr(10), '<br>') for cell in row)} |" for row in rows]
    meanings = [f"- **{metric.name}**: {metric.meaning}" for metric in report.shown]
    notes = [f"- {note.replace(chr(10), chr(10) + '  ')}" for note in report.notes]
    parts = [caption(report), "\n".join(lines), "\n".join(meanings), *(["\n".join(notes)] if notes else [])]
    return "\n\n".join(parts) + "\n"


def as_csv(report: Report) -> str:
    """A line for each model and metric; empty where something is not defined."""
    fields = list(Cell.__dataclass_fields__)
    return _csv(fields, ([getattr(cell, field) for field in fields] for cell in report.cells))


def prompts_as_csv(report: Report) -> str:
    """A line for each prompt and model, with every metric."""
    metrics = [metric.name for metric in report.metrics]
    return _csv(
        ["prompt", "model", *metrics, "text"],
        (
            [each.question.id, each.model, *(scored.metrics[name] for name in metrics), each.question.text]
            for each, scored in zip(report.answered, report.scored, strict=True)
        ),
    )


def _csv(header: Sequence[str], rows: Any) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow(["" if isinstance(value, float) and isnan(value) else value for value in row])
    return text.getvalue()
