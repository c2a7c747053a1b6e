"""The result of an evaluation: mean and standard deviation over prompts, confidence intervals, changes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from math import isnan, nan
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slrmerge.errors import OptionError, Problem, did_you_mean, require_extra
from slrmerge.evaluation.metrics import Metric
from slrmerge.evaluation.tasks.base import ModelResponses, Plot, Score
from slrmerge.io.sizes import shorten
from slrmerge.io.text import IN_PROSE, printable

if TYPE_CHECKING:
    from pandas import DataFrame

Values = Mapping[str, Mapping[str, NDArray[np.float64]]]
"""The values of each model and metric: one for each prompt, in the same order, NaN where undefined."""

RESAMPLES, CONFIDENCE = 9999, 0.95


@dataclass(frozen=True, slots=True)
class Cell:
    """One metric of one model over its prompts; NaN where undefined.

    `low` and `high` are the 95% confidence interval of the mean (bootstrap over prompts, percentiles). `change` is the
    mean difference to the first model over the prompts where both have a value, with its own interval;
    `relative_change` is it as a share of the first model's mean there.
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


@dataclass(frozen=True, repr=False)
class EvaluationResult:
    """The result of an evaluation.

    `models` are model ids by label, `prompts` the number of prompts, `settings` what every sample depends on. `scores`
    are those of `responses`, prompt by prompt and, within a prompt, model by model.
    """

    task: str
    metrics: tuple[Metric, ...]
    models: Mapping[str, str]
    prompts: int
    settings: Mapping[str, Any]
    cells: tuple[Cell, ...]
    notes: tuple[str, ...]
    plot: Plot
    responses: Sequence[ModelResponses[Any]]
    scores: Sequence[Score]

    def __repr__(self) -> str:
        means = ", ".join(
            f"{model}: {' '.join(f'{m.name} {self.cell(model, m.name).mean:.3f}' for m in self.shown)}"
            for model in self.models
        )
        return f"<EvaluationResult {self.task}, {self._asked}; {means}>"

    def _repr_html_(self) -> str:
        header, *rows = self.table_rows()
        lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in header)}</tr>"]
        lines += [
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>".replace("\n", "<br>") for row in rows
        ]
        table = f"<table><caption>{escape(self.caption)}</caption>{''.join(lines)}</table>"
        return printable(table, keep=IN_PROSE)

    def to_pandas(self) -> "DataFrame":
        """One row for each model and metric, with the fields of `Cell` as columns."""
        require_extra("eval", "pandas")
        from pandas import DataFrame

        return DataFrame([asdict(cell) for cell in self.cells])

    def of(self, model: str) -> Iterator[tuple[ModelResponses[Any], Score]]:
        """One model's responses and their scores, prompt by prompt."""
        for responses, score in zip(self.responses, self.scores, strict=True):
            if responses.model == model:
                yield responses, score

    def cell(self, model: str, metric: str) -> Cell:
        """Raises OptionError for a model or a metric that is not there."""
        by_name = {(cell.model, cell.metric): cell for cell in self.cells}
        if (model, metric) in by_name:
            return by_name[model, metric]
        known = {"model": (model, list(self.models)), "metric": (metric, [each.name for each in self.metrics])}
        raise OptionError(
            *(
                Problem("invalid-choice", name, f"there is no {shorten(given)}", did_you_mean(str(given), names))
                for name, (given, names) in known.items()
                if given not in names
            )
        )

    @property
    def shown(self) -> list[Metric]:
        """The columns of the table: what is defined for at least one model. Where that is nothing, the text metrics."""
        names = {cell.metric for cell in self.cells if not isnan(cell.mean)}
        defined = [metric for metric in self.metrics if metric.name in names]
        return [metric for metric in defined if metric.in_table] or defined

    @property
    def caption(self) -> str:
        """The table's caption."""
        first, *others = self.models
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items() if value is not None)
        columns = f"mean (sd) over prompts, [{CONFIDENCE:.0%} bootstrap interval]"
        columns += f", change from {first}" if others else ""
        return f"{self.task}, {self._asked}, {settings}: {columns}"

    @property
    def _asked(self) -> str:
        return f"{self.prompts:,} prompt{'s' if self.prompts != 1 else ''}"

    def table_rows(self) -> list[list[str]]:
        """A header and a row for each model; cells have lines for mean (sd) and change, each above its interval."""
        names = [metric.name for metric in self.shown]
        rows = [[model, *("\n".join(_lines(self.cell(model, name))) for name in names)] for model in self.models]
        return [["", *names], *rows]


def _lines(cell: Cell) -> list[str]:
    if isnan(cell.mean):
        return ["–"]
    lines = [f"{cell.mean:.3f}" + ("" if isnan(cell.sd) else f" ({cell.sd:.3f})")]
    if not isnan(cell.low):
        lines.append(f"[{cell.low:.3f}, {cell.high:.3f}]")
    if not isnan(cell.change):
        share = "" if isnan(cell.relative_change) else f" ({cell.relative_change:+.0%})"
        lines.append(f"{cell.change:+.3f}{share}")
    if not isnan(cell.change_low):
        lines.append(f"[{cell.change_low:+.3f}, {cell.change_high:+.3f}]")
    return lines


def values_of(responses: Sequence[ModelResponses[Any]], scores: Sequence[Score], metrics: Sequence[Metric]) -> Values:
    """The values of each model and metric, prompt by prompt."""
    by_model: dict[str, list[Score]] = {}
    for each, score in zip(responses, scores, strict=True):
        by_model.setdefault(each.model, []).append(score)
    return {
        model: {metric.name: np.array([score.metrics[metric.name] for score in found]) for metric in metrics}
        for model, found in by_model.items()
    }


def summarise(values: Values) -> tuple[Cell, ...]:
    """A cell for each model and metric; the first model is the reference of changes."""
    first = next(iter(values.values()))
    return tuple(
        _cell(model, metric, found, None if by_metric is first else first[metric])
        for model, by_metric in values.items()
        for metric, found in by_metric.items()
    )


def _cell(model: str, metric: str, values: NDArray[np.float64], reference: NDArray[np.float64] | None) -> Cell:
    known = values[~np.isnan(values)]
    sd = float(known.std(ddof=1)) if len(known) > 1 else nan
    cell = Cell(model, metric, len(known), _mean(known), sd, *_interval(known))
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


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The confidence interval of the mean; deterministic."""
    if len(values) < 2:
        return nan, nan
    from scipy.stats import bootstrap

    found = bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, batch=1000, confidence_level=CONFIDENCE, method="percentile", rng=0
    ).confidence_interval
    return float(found.low), float(found.high)
