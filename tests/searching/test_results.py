"""The results of a search are read back as they were written."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from slrmerge.errors import MissingExtraError
from slrmerge.recipe.model import Recipe
from slrmerge.searching.prompt_scores import KeptScores, write_prompts
from slrmerge.searching.results_folder import read_result, write_result
from tests.merging.faults import snapshot
from tests.problems import refused
from tests.searching.made_results import COLUMNS, FILES, OWN, SCORES, sample, table, write
from tests.searching.pairs import made_result, made_rows, prompt_scores, row

pytestmark = pytest.mark.usefixtures("hurried")


# round trip


def test_a_result_is_read_back_as_it_was(tmp_path: Path) -> None:
    base = Recipe(pretrained="../a b/ü", posttrained="../post", dtype="bfloat16")
    result = made_result(sample(), notes=("one – note", "another"), base=base)
    result = write(tmp_path, result)
    assert read_result(tmp_path) == result
    assert read_result(str(tmp_path)) == result


def test_rough_candidates_are_read_back_as_they_were(tmp_path: Path) -> None:
    result = made_result(made_rows(SCORES))
    rough = replace(result.rows[-1], exact=False, prompts=8, dtype="bfloat16")
    result = replace(
        result, rows=(*result.rows[:-1], rough), post_quality={**result.post_quality, "8 prompts, bfloat16": 0.25}
    )
    result = write(tmp_path, result)
    assert read_result(tmp_path) == result


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 4)), min_size=3, max_size=3), st.sampled_from([0, 0.5, 0.9, 1]))
def test_scores_are_read_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, scores: list[tuple[float, float]], min_quality: float
) -> None:
    folder = tmp_path_factory.getbasetemp() / "digits"
    folder.mkdir(exist_ok=True)
    spans = [(0, 0), (1, 1), (0, 1)]
    result = made_result(made_rows(dict(zip(spans, scores, strict=True))), min_quality=min_quality)
    result = write(folder, result)
    assert read_result(folder) == result


def test_a_label_is_no_formula_and_no_line_of_a_recipe(tmp_path: Path) -> None:
    label = "=1+1\nalpha: 1"
    candidate = replace(OWN, label=label, also_named=("\u202e",))
    result = write(tmp_path, made_result([*made_rows(SCORES), row(candidate, 0.9, 2.9)]))
    assert read_result(tmp_path) == result
    with open(tmp_path / "results.csv", newline="") as file:
        assert [line["label"] for line in csv.DictReader(file)][-1] == f"'{label}"
    for name in ("slr", "soup", "early", "late"):
        assert yaml.safe_load((tmp_path / f"{name}.yaml").read_text()).keys() >= {"pretrained", "posttrained"}


def test_the_name_of_a_task_is_no_line_of_a_recipe(tmp_path: Path) -> None:
    write(tmp_path, replace(made_result(made_rows(SCORES)), task="mine.yaml\nrestore: [0, 1]\n#"))
    for name in ("slr", "soup", "early", "late"):
        path = tmp_path / f"{name}.yaml"
        lines = [line for line in path.read_text().splitlines() if line.startswith("restore")]
        assert "restore: [0, 1]" not in lines
        assert "mine.yaml" in path.read_text()


labels = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1)


@given(st.lists(labels, min_size=1, max_size=3))
def test_labels_are_read_back_exactly(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    folder = tmp_path_factory.getbasetemp() / "labels"
    folder.mkdir(exist_ok=True)
    info = replace(OWN, label=names[0], also_named=tuple(names[1:]))
    result = made_result([*made_rows(SCORES), row(info, 0.5, 0.5)])
    result = write(folder, result)
    assert read_result(folder) == result


@pytest.mark.parametrize(
    ("post", "pre", "warnings"), [(0.96, 0.5, 0), (0.3, 0.3, 0), (0.29, 0.1, 1), (0.9, 0.91, 1), (0.2, 0.9, 2)]
)
def test_a_low_quality_and_swapped_sides_are_warnings(tmp_path: Path, post: float, pre: float, warnings: int) -> None:
    rows = made_rows(SCORES)
    rows[:2] = [replace(rows[0], quality=post), replace(rows[1], quality=pre)]
    result = write(tmp_path, made_result(rows))
    assert len(result.warnings) == warnings
    assert read_result(tmp_path) == result
    assert tuple(json.loads((tmp_path / "summary.json").read_bytes()).get("warnings", ())) == result.warnings


def test_a_result_without_the_pre_trained_model_is_read_back_as_it_was(tmp_path: Path) -> None:
    result = write(tmp_path, made_result([row for row in made_rows(SCORES) if row.space != "pre"]))
    assert result.choice.pre is None
    assert read_result(tmp_path) == result


# the table


def test_the_table_has_a_line_per_candidate_in_the_order_of_scoring(tmp_path: Path) -> None:
    result = made_result(sample())
    write_result(tmp_path, result)
    lines = table(tmp_path)
    assert list(lines[0]) == COLUMNS
    assert [line["label"] for line in lines] == [each.label for each in result.rows]
    assert [float(line["quality"]) for line in lines] == [each.quality for each in result.rows]


def test_cells_are_empty_where_a_value_has_no_meaning(tmp_path: Path) -> None:
    write_result(tmp_path, made_result(sample()[:-1]))
    lines = {line["space"]: line for line in table(tmp_path)}
    assert (lines["post"]["start"], lines["post"]["end"], lines["post"]["alpha"]) == ("", "", "0.0")
    assert (lines["interval"]["start"], lines["interval"]["end"], lines["interval"]["alpha"]) == ("0", "2", "")
    assert [lines[space]["modules"] for space in ("attention", "interval", "soup")] == ["self_attn", "", ""]
    assert json.loads(lines["recipe"]["rules"]) == OWN.rules.rules()
    assert lines["interval"]["also_named"] == ""
    assert tuple(json.loads(lines["recipe"]["also_named"])) == OWN.also_named


def test_the_table_is_plain_text(tmp_path: Path) -> None:
    write_result(tmp_path, made_result(made_rows({(0, 0): (0.95, 1.5)})))
    assert (tmp_path / "results.csv").read_bytes() == (
        "space,label,also_named,start,end,alpha,modules,layers_restored,quality,diversity,feasible,pareto,exact,"
        "prompts,dtype,rules\n"
        'post,post-trained,,,,0.0,,0,0.96,1.0,true,true,true,40,float32,"{""alpha"": 0.0}"\n'
        'pre,pre-trained,,,,1.0,,3,0.5,2.0,false,true,true,40,float32,"{""alpha"": 1.0}"\n'
        'soup,soup 0.50,,,,0.5,,0,0.9,1.5,true,true,true,40,float32,"{""alpha"": 0.5}"\n'
        'interval,layers 0–0,,0,0,,,1,0.95,1.5,true,true,true,40,float32,"{""restore"": [0, 0]}"\n'
    ).encode()


def test_to_pandas_has_the_columns_and_rows_of_the_table(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    result = made_result(sample())
    write_result(tmp_path, result)
    frame = result.to_pandas()
    assert list(frame.columns) == COLUMNS
    assert list(frame["label"]) == [line["label"] for line in table(tmp_path)]
    assert list(frame["quality"]) == [each.quality for each in result.rows]
    assert frame["feasible"].dtype == bool
    assert [None if pandas.isna(end) else end for end in frame["end"]] == [each.end for each in result.rows]


@pytest.mark.parametrize(("method", "package"), [("to_pandas", "pandas"), ("plot", "matplotlib")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, method: str, package: str) -> None:
    monkeypatch.setattr("slrmerge.errors.find_spec", lambda name: None if name == package else object())
    with refused(MissingExtraError, "missing-extra") as caught:
        getattr(made_result(sample()), method)()
    assert package in caught.value.problems[0].what


def test_the_summary_names_the_selected_candidates_and_the_conditions(tmp_path: Path) -> None:
    result = made_result(made_rows(SCORES), notes=("a note",))
    write_result(tmp_path, result)
    value = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert type(result.summary()).model_validate(value) == result.summary()
    assert {name: selected["label"] for name, selected in value["selected"].items()} == {
        "post": "post-trained", "slr": "layers 1–1", "soup": "soup 0.50", "early": "layers 0–0", "late": "layers 2–2",
        "pre": "pre-trained",
    }  # fmt: skip
    assert value["selected"]["slr"] == {
        "label": "layers 1–1", "restore": [1, 1], "quality": 0.9, "diversity": 1.7, "exact": True
    }  # fmt: skip
    others = {"layers": 3, "candidates": 9, "min_quality": 0.9, "notes": ["a note"], "elapsed_s": 1.5}
    assert {name: value[name] for name in others} == others


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    result = made_result(sample())
    asked = prompt_scores([row.label for row in result.rows], 2, seed=0)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_result(tmp_path / name, result)
        write_prompts(tmp_path / name, KeptScores(asked, prompt_scores(["post-trained"], 3, seed=1)))
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    assert set(snapshot(tmp_path / "one") or {}) >= {*FILES, "prompts.npz"}


# views


def test_the_repr_is_one_useful_line() -> None:
    text = repr(made_result(made_rows(SCORES)))
    assert "\n" not in text
    assert len(text) < 120
    assert "9 candidates" in text
    assert "layers 1–1" in text


def test_the_html_view_shows_the_selection_and_escapes_labels() -> None:
    info = replace(OWN, label="<b>.yaml", also_named=("x & y",))
    html = made_result([*made_rows(SCORES), row(info, 0.95, 3.0)])._repr_html_()
    assert "layers 1–1" in html
    assert "&lt;b&gt;.yaml = x &amp; y" in html
    assert "<b>" not in html


def test_plot_gives_a_figure() -> None:
    pytest.importorskip("matplotlib")
    assert len(made_result(made_rows(SCORES)).plot().axes) == 1
