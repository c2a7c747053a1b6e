"""Results: cells by hand and by their properties, and their forms as table, Markdown, CSV, HTML and data frame."""

import csv
from dataclasses import replace
from io import StringIO
from math import isnan, nan
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from slrmerge.errors import OptionError
from slrmerge.evaluation.metrics import Metric
from slrmerge.evaluation.output import as_csv, as_markdown, prompts_as_csv
from slrmerge.evaluation.result import Cell, EvaluationResult, summarise
from slrmerge.evaluation.tasks.base import ModelResponses, Score
from slrmerge.evaluation.tasks.creative import WritingPrompt
from tests.problems import refused


def cells(**values: list[float]) -> dict[str, Cell]:
    """One metric, `m`, of several models."""
    found = summarise({model: {"m": np.array(numbers, dtype=float)} for model, numbers in values.items()})
    return {cell.model: cell for cell in found}


def result(**values: list[float]) -> EvaluationResult:
    prompts = [WritingPrompt(prompt=f"Prompt {number}, “quoted”") for number in range(len(next(iter(values.values()))))]
    return EvaluationResult(
        task="creative",
        metrics=(Metric("m", "what it means"), Metric("none", "what no model has")),
        models=dict.fromkeys(values, "somewhere"),
        prompts=len(prompts),
        settings={"samples": 2, "judge": None},
        cells=summarise(
            {model: {"m": np.array(found), "none": np.full(len(found), nan)} for model, found in values.items()}
        ),
        notes=("first line\nsecond line", "another"),
        responses=[ModelResponses(model, prompt, ["a", "b"]) for prompt in prompts for model in values],
        scores=[
            Score({"m": values[model][number], "none": nan}, ["", "✓"])
            for number in range(len(prompts))
            for model in values
        ],
        plot="bars",
    )


def test_mean_and_standard_deviation_are_over_prompts() -> None:
    cell = cells(post=[1, 2, 3, 6])["post"]
    assert (cell.prompts, cell.mean) == (4, 3)
    assert cell.sd == pytest.approx(np.sqrt(14 / 3))  # of a sample: divided by one less
    assert isnan(cell.change)


def test_a_change_is_over_the_prompts_that_both_have() -> None:
    cell = cells(post=[1, 2, nan, 4], slr=[2, nan, 9, 8])["slr"]
    assert (cell.prompts, cell.mean) == (3, pytest.approx(19 / 3))
    assert cell.change == pytest.approx((1 + 4) / 2)
    assert cell.relative_change == pytest.approx(1.0)


def test_a_change_from_nothing_has_no_share() -> None:
    cell = cells(post=[0, 0], slr=[1, 1])["slr"]
    assert cell.change == 1
    assert isnan(cell.relative_change)


@pytest.mark.parametrize("values", [[], [nan], [nan, nan]])
def test_without_values_nothing_is_defined(values: list[float]) -> None:
    cell = cells(post=values, slr=values)["slr"]
    assert cell.prompts == 0
    assert all(isnan(number) for number in (cell.mean, cell.sd, cell.low, cell.high, cell.change, cell.change_low))


def test_one_prompt_has_a_mean_and_no_spread() -> None:
    cell = cells(post=[0.5])["post"]
    assert cell.mean == 0.5
    assert all(map(isnan, (cell.sd, cell.low, cell.high)))


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_the_interval_lies_within_the_values_and_around_nothing_else(values: list[float]) -> None:
    cell = cells(post=values)["post"]
    assert min(values) - 1e-9 <= cell.low <= cell.high + 1e-9 <= max(values) + 2e-9


def test_the_interval_is_near_that_of_students_t_where_values_are_many() -> None:
    values = np.random.default_rng(0).normal(3, 2, 200)
    cell = cells(post=list(values))["post"]
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (cell.low, cell.high) == pytest.approx((expected.low, expected.high), abs=0.03)


def test_values_that_are_all_equal_have_an_interval_without_width() -> None:
    cell = cells(post=[0.5, 0.5, 0.5], slr=[0.5, 0.5, 0.5])["slr"]
    assert (cell.sd, cell.low, cell.high) == (0, 0.5, 0.5)
    assert (cell.change, cell.change_low, cell.change_high, cell.relative_change) == (0, 0, 0, 0)


def test_the_same_values_give_the_same_interval() -> None:
    assert cells(post=[1, 2, 4]) == cells(post=[1, 2, 4])


def test_a_metric_that_no_model_has_is_not_shown() -> None:
    assert [metric.name for metric in result(post=[1.0, 3.0]).shown] == ["m"]


def test_metrics_of_the_files_are_shown_where_the_table_has_none() -> None:
    of_files = Metric("m", "what it means", in_table=False)
    assert replace(result(post=[1.0]), metrics=(of_files,)).shown == [of_files]
    assert replace(result(post=[nan]), metrics=(of_files,)).shown == []


def test_the_table_has_mean_interval_and_change_in_lines() -> None:
    header, post, slr = result(post=[1.0, 1.0], slr=[2.0, 2.0]).table_rows()
    assert header == ["", "m"]
    assert post == ["post", "1.000 (0.000)\n[1.000, 1.000]"]
    assert slr == ["slr", "2.000 (0.000)\n[2.000, 2.000]\n+1.000 (+100%)\n[+1.000, +1.000]"]


def test_the_table_of_one_prompt_has_no_intervals() -> None:
    assert result(post=[1.0], slr=[0.5]).table_rows()[1:] == [["post", "1.000"], ["slr", "0.500\n-0.500 (-50%)"]]


def test_a_model_without_values_has_a_dash() -> None:
    assert result(post=[1.0], slr=[nan]).table_rows()[2] == ["slr", "–"]


def test_the_caption_names_settings_and_reference() -> None:
    alone, both = result(post=[1.0]).caption, result(post=[1.0], slr=[1.0]).caption
    assert alone.startswith("creative, 1 prompt, samples 2: ")
    assert "post" not in alone
    assert both.startswith(alone)
    assert both.endswith("from post")


def test_markdown_has_table_definitions_and_notes() -> None:
    found = result(post=[1.0, 1.0])
    assert as_markdown(found) == (
        f"{found.caption}\n\n"
        "|  | m |\n| --- | --- |\n| post | 1.000 (0.000)<br>[1.000, 1.000] |\n\n"
        "- **m**: what it means\n\n"
        "- first line\n  second line\n- another\n"
    )


def test_csv_has_every_number_in_full_and_nothing_where_there_is_none() -> None:
    lines = list(csv.DictReader(StringIO(as_csv(result(post=[1 / 3, 1 / 3])))))
    assert [(line["model"], line["metric"]) for line in lines] == [("post", "m"), ("post", "none")]
    assert float(lines[0]["mean"]) == 1 / 3
    assert lines[0]["change"] == lines[1]["mean"] == ""
    assert lines[1]["prompts"] == "0"


def test_every_prompt_has_a_line_for_every_model() -> None:
    found = result(post=[1.0, 2.0], slr=[3.0, 4.0])
    lines = list(csv.DictReader(StringIO(prompts_as_csv(found))))
    assert [(line["model"], line["m"], line["none"]) for line in lines] == [
        ("post", "1.0", ""), ("slr", "3.0", ""), ("post", "2.0", ""), ("slr", "4.0", ""),
    ]  # fmt: skip
    assert lines[2]["text"] == "Prompt 1, “quoted”"


def test_the_repr_is_one_line_with_the_means() -> None:
    assert repr(result(post=[1.0, 2.0], slr=[3.0, 4.0])) == (
        "<EvaluationResult creative, 2 prompts; post: m 1.500, slr: m 3.500>"
    )


@pytest.mark.parametrize(("model", "metric"), [("slr", "m"), ("post", "n"), (None, 3)])
def test_a_cell_that_is_not_there_is_an_error(model: Any, metric: Any) -> None:
    with refused(OptionError, "invalid-choice"):
        result(post=[1.0]).cell(model, metric)


def test_the_html_table_escapes_labels() -> None:
    html = result(**{"<b>": [1.0, 1.0]})._repr_html_()
    assert html.startswith("<table>")
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert "1.000 (0.000)<br>[1.000, 1.000]" in html


def test_the_data_frame_has_a_row_for_each_cell() -> None:
    found = result(post=[1.0, 2.0], slr=[3.0, 4.0])
    frame = found.to_pandas()
    assert list(frame.columns) == list(Cell.__dataclass_fields__)
    assert frame.set_index(["model", "metric"]).loc[("slr", "m"), "mean"] == 3.5
    assert len(frame) == len(found.cells)


def test_no_cell_of_a_table_is_a_formula() -> None:
    found = result(post=[1.0, -1.0])
    question = WritingPrompt(prompt='=HYPERLINK("http://x")')
    found = replace(found, responses=[ModelResponses("=post", question, each.texts) for each in found.responses])
    rows = list(csv.reader(StringIO(prompts_as_csv(found))))
    assert [row[1] for row in rows[1:]] == ["'=post"] * 2
    assert [row[-1] for row in rows[1:]] == [f"'{question.text}"] * 2
    assert [float(row[2]) for row in rows[1:]] == [1.0, -1.0]
