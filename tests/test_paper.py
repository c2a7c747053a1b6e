"""examples/paper: its published numbers are those of the paper's tables, and measured ones appear beside them."""

import csv
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from slrmerge.evaluation.result import EvaluationResult, summarise
from slrmerge.evaluation.tasks.open_qa import OpenQA
from slrmerge.recipe.load import load_recipe
from tests.documentation import ROOT

EXAMPLE = ROOT / "examples" / "paper"
sys.path.insert(0, str(EXAMPLE))
import tables  # noqa: E402  # a script's own module

FIXTURE = Path(__file__).with_name("paper_tables.txt")
"""The rows of the tables 3, 4, 6 and 7 as the paper's text has them."""

PAIRS = {"Llama": "llama-3.1-8b", "Qwen": "qwen2.5-7b", "Gemma": "gemma-2-9b"}
MODELS = {name: model for model, name in tables.METHODS.items()}


def posttrained(family: str) -> str:
    return load_recipe(ROOT / "recipes" / f"{PAIRS[family]}-slr.yaml").posttrained


def rows_of_the_paper() -> Iterator[dict[str, str]]:
    """The numbers in the fixture, as published.csv has them."""
    table = family = ""
    metrics: list[str] = []
    for line in FIXTURE.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("Table "):
            table = line.removeprefix("Table ")
        elif len(cells) == 1:
            family = cells[0]
        elif cells[0] == "Method":
            metrics = [metric.lower() for metric in cells[1:]]
        else:
            method = re.split(r" [@+]", cells[0])[0]
            for metric, cell in zip(metrics, cells[1:], strict=True):
                mean, sd = re.fullmatch(r"([\d.]+) \(([\d.]+)\)", cell).groups()  # type: ignore[union-attr]
                yield {
                    "table": table, "posttrained": posttrained(family), "model": MODELS[method], "metric": metric,
                    "mean": mean, "sd": sd,
                }  # fmt: skip


def test_the_published_numbers_are_those_of_the_papers_tables() -> None:
    with tables.PUBLISHED.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert found == list(rows_of_the_paper())
    assert len(found) == 3 * 3 * (3 + 3 + 3 + 4)


@pytest.mark.skipif("PAPER_TEXT" not in os.environ, reason="PAPER_TEXT does not name the paper's text")
def test_the_fixture_is_what_the_papers_text_says() -> None:
    text = Path(os.environ["PAPER_TEXT"]).read_text("utf-8").splitlines()
    for line in FIXTURE.read_text("utf-8").splitlines():
        assert any(each.startswith(f"{line}:") for each in text) if line.startswith("Table") else line in text
    assert [line for line in text if re.match(r"\| .*\d\.\d+ \(\d", line) and line not in FIXTURE.read_text()] == []


def measured(models: tuple[str, ...], coverage: float) -> EvaluationResult:
    """An evaluation of open questions in which every model has the same values."""
    metrics = OpenQA().metrics(4)
    values = dict(zip((metric.name for metric in metrics), ([1.0, 0.5], [0.2, 0.4], [coverage] * 2), strict=True))
    cells = summarise({model: {name: np.array(each) for name, each in values.items()} for model in models})
    return EvaluationResult(
        task="open-qa", metrics=metrics, models=dict.fromkeys(models, "an-id"), prompts=2, settings={}, cells=cells,
        notes=(), plot="bars", responses=[], scores=[],
    )  # fmt: skip


@pytest.mark.parametrize("family", PAIRS)
def test_measured_numbers_are_shown_above_the_papers_of_the_same_table(family: str) -> None:
    results = {"open-qa": measured((*tables.ABLATION, "soup"), 0.25), "open-qa-hot": measured(tables.COMPARED, 0.75)}
    paper = tables.published(posttrained(family))
    own = [row for row in rows_of_the_paper() if row["posttrained"] == posttrained(family)]
    expected = {(int(row["table"]), row["model"], row["metric"]): row for row in own}
    shown = "\n".join(tables.as_markdown(table, results, paper) for table in tables.TABLES)
    for (table, model, metric), row in expected.items():
        number = f"{row['mean']} ({row['sd']})"
        if table != 6:  # which was not measured
            coverage = "0.750" if table == 4 else "0.250"
            values = {"precision": "0.750 (0.354)", "entropy": "0.300 (0.141)", "coverage-n": f"{coverage} (0.000)"}
            (line,) = [line for line in section(shown, table) if line.startswith(f"| {tables.METHODS[model]} |")]
            assert f"{values[metric]}<br>paper: {number}" in line
    assert [line for line in section(shown, 6) if line] == ["Not measured: open-qa-verbalized."]
    lines = list(csv.DictReader(tables.as_csv(results, paper).splitlines()))
    assert len(lines) == (3 + 3 + 4) * 3
    assert [line["paper_mean"] for line in lines] == [
        expected[int(line["table"]), line["model"], tables.paper_metric(line["metric"])]["mean"] for line in lines
    ]


def section(markdown: str, table: int) -> list[str]:
    """The lines of a table."""
    return re.split(r"^## Table (\d).*$", markdown, flags=re.MULTILINE)[2 * table].split("\n")


def test_other_pairs_have_no_published_numbers() -> None:
    assert tables.published("org/other") == {}
    shown = tables.as_markdown(tables.TABLES[2], {"open-qa": measured(tables.COMPARED, 0.25)}, {})
    assert "paper" not in shown
    assert shown.count("0.750 (0.354) |") == len(tables.COMPARED)


def test_the_figure_shows_what_was_measured_and_the_papers_numbers() -> None:
    paper = tables.published(posttrained("Llama"))
    figure = tables.figure_3({"open-qa": measured(tables.COMPARED, 0.25)}, paper)
    bars = {axes.get_title(): len(axes.patches) for axes in figure.axes}
    assert [bars[f"open-ended QA: {metric}"] for metric in ("precision", "entropy", "coverage-n")] == [3, 3, 3]
    empty = [axes.get_title() for axes in figure.axes if any("not measured" in t.get_text() for t in axes.texts)]
    assert empty == ["creative writing: quality", "creative writing: diversity", "reasoning: pass@k"]
    diamonds = [line.get_ydata() for axes in figure.axes for line in axes.lines if line.get_marker() == "D"]
    assert [float(y[0]) for y in diamonds] == [
        float(paper[3, model, metric].mean)
        for metric in ("precision", "entropy", "coverage-n")
        for model in tables.COMPARED
    ]
