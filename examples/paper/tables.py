"""The paper's tables 1 to 7 and its figure 3 from evaluations, beside the numbers that it prints for the same pair."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from slrmerge.evaluation.result import Cell, EvaluationResult
from slrmerge.io.figures import MODEL_COLOURS
from slrmerge.io.text import to_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PUBLISHED = Path(__file__).with_name("published.csv")

COMPARED = ("post", "soup", "slr")
ABLATION = ("post", "early", "late", "slr")
METHODS = {"post": "Post-trained", "soup": "Proxy-Soup", "early": "SLR-Early", "late": "SLR-Late", "slr": "SLR"}
WRITING = ("joke", "poem", "story")


class Table(NamedTuple):
    """A table of the paper: its number, its title, and the evaluations and models in it."""

    number: int
    title: str
    evaluations: tuple[str, ...]
    models: tuple[str, ...] = COMPARED


TABLES = (
    Table(1, "Creative writing", WRITING),
    Table(2, "Creative writing at temperature 1.5", tuple(f"{kind}-hot" for kind in WRITING)),
    Table(3, "Open-ended QA", ("open-qa",)),
    Table(4, "Open-ended QA at temperature 1.5", ("open-qa-hot",)),
    Table(5, "Reasoning", ("reasoning",)),
    Table(6, "Open-ended QA with verbalized sampling (K=4)", ("open-qa-verbalized",)),
    Table(7, "Ablation: the interval, on open-ended QA", ("open-qa",), ABLATION),
)

Results = Mapping[str, EvaluationResult]
"""Evaluations by name; those without data are missing."""


class Number(NamedTuple):
    """A number that the paper prints: a mean, with its standard deviation over prompts in brackets, as text."""

    mean: str
    sd: str

    def __str__(self) -> str:
        return f"{self.mean} ({self.sd})"


Published = Mapping[tuple[int, str, str], Number]
"""The paper's numbers for one pair, by table, model and metric."""


def published(posttrained: str) -> Published:
    """The paper's numbers for the pair with this post-trained repository; empty for other pairs."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        return {
            (int(row["table"]), row["model"], row["metric"]): Number(row["mean"], row["sd"])
            for row in csv.DictReader(file)
            if row["posttrained"] == posttrained
        }


class Row(NamedTuple):
    """A measured number of a table, and the paper's."""

    table: int
    evaluation: str
    cell: Cell
    paper: Number | None


def rows_of(table: Table, results: Results, paper: Published) -> Iterator[Row]:
    """The measured numbers of a table, model by model."""
    found = [(name, results[name]) for name in table.evaluations if name in results]
    for model in table.models:
        for name, result in found:
            for metric in result.shown if model in result.models else ():
                if metric.in_table and metric.name != "vendi":  # the paper has neither this nor the other text metrics
                    known = paper.get((table.number, model, paper_metric(metric.name)))
                    yield Row(table.number, name, result.cell(model, metric.name), known)


def paper_metric(metric: str) -> str:
    """A metric as published.csv names it: coverage for any number of samples is `coverage-n`."""
    return "coverage-n" if metric.startswith("coverage-") else metric


def as_csv(results: Results, paper: Published) -> str:
    """A line for each number of all tables; empty where the paper has none."""
    names = "table evaluation model metric prompts mean sd low high paper_mean paper_sd"
    lines = [
        [row.table, row.evaluation, *_fields(row.cell), *(row.paper or ("", ""))]
        for table in TABLES
        for row in rows_of(table, results, paper)
    ]
    return to_csv(names.split(), lines)


def _fields(cell: Cell) -> list[object]:
    numbers = ("" if isnan(value) else f"{value:.6g}" for value in (cell.mean, cell.sd, cell.low, cell.high))
    return [cell.model, cell.metric, cell.prompts, *numbers]


def as_markdown(table: Table, results: Results, paper: Published) -> str:
    """A table with a row for each model: mean (sd) over prompts and, below, what the paper prints."""
    rows = list(rows_of(table, results, paper))
    title = f"## Table {table.number}: {table.title}"
    missing = [name for name in table.evaluations if name not in results]
    left_out = f"Not measured: {', '.join(missing)}." if missing else ""
    if not rows:
        return f"{title}\n\n{left_out or 'Nothing was measured.'}"
    is_single = len(table.evaluations) == 1
    heads = [row.cell.metric if is_single else f"{row.evaluation}: {row.cell.metric}" for row in rows]
    columns = list(dict.fromkeys(heads))
    lines = [f"| Method | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    for model in table.models:
        cells = {head: _shown(row) for head, row in zip(heads, rows, strict=True) if row.cell.model == model}
        if cells:
            lines.append(f"| {METHODS[model]} | {' | '.join(cells.get(head, '–') for head in columns)} |")
    return "\n\n".join(filter(None, (title, left_out, "\n".join(lines))))


def _shown(row: Row) -> str:
    mean, sd = row.cell.mean, row.cell.sd
    own = "–" if isnan(mean) else f"{mean:.3f}" + ("" if isnan(sd) else f" ({sd:.3f})")
    return f"{own}<br>paper: {row.paper}" if row.paper else own


def figure_3(results: Results, paper: Published) -> "Figure":
    """The paper's figure 3: writing, open-ended QA, and pass@k. Diamonds are the paper's numbers."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, 3).ravel().tolist()
    for axes, metric in zip(panels[:2], ("quality", "diversity"), strict=True):
        _bars(axes, f"creative writing: {metric}", [(name, metric) for name in WRITING], results, {})
    for axes, metric in zip(panels[2:5], ("precision", "entropy", "coverage-n"), strict=True):
        _bars(axes, f"open-ended QA: {metric}", [("open-qa", metric)], results, paper)
    _curves(panels[5], results.get("reasoning"))
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
        if not (axes.patches or axes.lines):
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="gray")
    handles = [Patch(color=MODEL_COLOURS[model], label=METHODS[model]) for model in COMPARED]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _bars(axes: "Axes", title: str, groups: Sequence[tuple[str, str]], results: Results, paper: Published) -> None:
    """A group of bars for each evaluation, one bar for each model, with 95 % intervals."""
    axes.set_title(title, fontsize=9)
    axes.set_xticks(range(len(groups)), [name for name, _ in groups])
    axes.set_xlim(-0.5, len(groups) - 0.5)
    for place, (name, metric) in enumerate(groups):
        for number, model in enumerate(COMPARED):
            found = [cell for cell in _cells(results.get(name), model) if paper_metric(cell.metric) == metric]
            x = place + (number - 1) * 0.27
            for cell in found:
                ends = [[max(0.0, cell.mean - cell.low)], [max(0.0, cell.high - cell.mean)]]
                bars = None if isnan(cell.low) else ends
                axes.bar(x, cell.mean, 0.25, yerr=bars, capsize=2, color=MODEL_COLOURS[model])
            if found and (known := paper.get((3, model, metric))):
                axes.plot(x, float(known.mean), "D", color="white", markeredgecolor="black", markersize=5)


def _curves(axes: "Axes", result: EvaluationResult | None) -> None:
    axes.set_title("reasoning: pass@k", fontsize=9)
    for model in COMPARED if result else ():
        cells = [cell for cell in _cells(result, model) if cell.metric.startswith("pass@")]
        ks = [int(cell.metric.removeprefix("pass@")) for cell in cells]
        axes.plot(ks, [cell.mean for cell in cells], "o-", color=MODEL_COLOURS[model], markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, map(str, ks))


def _cells(result: EvaluationResult | None, model: str) -> list[Cell]:
    """The measured metrics of a model."""
    return [cell for cell in result.cells if cell.model == model and not isnan(cell.mean)] if result else []
