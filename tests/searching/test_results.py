"""The results of a search are read back as they were written, and its recipes merge."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from slrmerge.errors import BusyError, MissingExtraError, OptionError, OutputError
from slrmerge.io.lock import lock
from slrmerge.merging.executor import merge
from slrmerge.recipe.load import AnyRecipe, load_recipe
from slrmerge.recipe.model import Recipe
from slrmerge.recipe.rules import LayerRule, Rules
from slrmerge.searching.candidates import CandidateInfo
from slrmerge.searching.prompt_scores import KeptScores, write_prompts
from slrmerge.searching.results import SearchResult
from slrmerge.searching.results_folder import read_result, why_not_results, write_result
from slrmerge.searching.run import search
from slrmerge.searching.select import select
from slrmerge.searching.selection import ScoredCandidate
from tests.merging.faults import snapshot
from tests.problems import refused
from tests.searching.pairs import SmallPair, made_result, made_rows, prompt_scores, row

SCORES = {(0, 0): (0.95, 1.4), (1, 1): (0.9, 1.7), (2, 2): (0.87, 1.6), (0, 1): (0.95, 1.6), (1, 2): (0.3, 2.2),
          (0, 2): (0.1, 2.4)}  # fmt: skip
OWN = CandidateInfo(
    space="recipe",
    label='ünï, "own".yaml',
    also_named=("a = b", "c, d = e", 'quote " and \nline'),
    rules=Rules(layers=(LayerRule(range=(0, 2), alpha=(0.25, 0.5), modules=("mlp",)),)),
)
ATTENTION = CandidateInfo(
    space="attention", label="layers 0–1, self_attn only", start=0, end=1, modules="self_attn", layers_restored=2,
    rules=Rules(layers=(LayerRule(range=(0, 1), modules=("self_attn",), alpha=1.0),)),
)  # fmt: skip
MERGEKIT = CandidateInfo(space="recipe", label="mergekit.yml", rules=Rules())
FILES = ["early.yaml", "late.yaml", "results.csv", "slr.yaml", "soup.yaml", "summary.json"]
COLUMNS = [
    "space", "label", "also_named", "start", "end", "alpha", "modules", "layers_restored", "quality", "diversity",
    "feasible", "pareto", "exact", "prompts", "dtype", "rules",
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("hurried")


def sample() -> list[ScoredCandidate]:
    """Rows of every kind."""
    others = [row(OWN, 0.5, 0.5), row(ATTENTION, 0.9, 1.1), row(MERGEKIT, 1 / 3, 1e-7)]
    return made_rows(SCORES | {(0, 2): (0.0, 0.0)}) + others


def write(folder: Path, result: SearchResult) -> SearchResult:
    """Write a result, and return it as one of a search into this folder."""
    base = result.choice.base.loaded_from(folder / "slr.yaml")
    result = replace(result, choice=replace(result.choice, base=base))
    write_result(folder, result)
    return result


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


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


# recipes


def recipe_text(folder: Path, name: str) -> list[str]:
    return (folder / f"{name}.yaml").read_text(encoding="utf-8").splitlines()


def test_a_recipe_has_its_origin_in_a_comment(tmp_path: Path) -> None:
    write_result(tmp_path, made_result(made_rows(SCORES), base=Recipe(pretrained="../pre", posttrained="../post")))
    for name, label in (("slr", "layers 1–1"), ("soup", "soup 0.50"), ("early", "layers 0–0"), ("late", "layers 2–2")):
        lines = recipe_text(tmp_path, name)
        comment = "\n".join(line for line in lines if line.startswith("#"))
        assert lines[0].startswith(f"# {label}: ")
        assert "40 prompts, float32" in comment
        assert "9 candidates" in comment
        assert "0.9600" in comment
    assert "Q 0.9000, D 1.7000" in "\n".join(recipe_text(tmp_path, "slr"))


def test_a_recipe_has_the_pair_the_rules_and_the_dtype(tmp_path: Path) -> None:
    base = Recipe(pretrained="../pre", posttrained="../post", dtype="bfloat16")
    write_result(tmp_path, made_result(made_rows(SCORES), base=base))
    content = yaml.safe_load((tmp_path / "slr.yaml").read_text(encoding="utf-8"))
    assert content == {"pretrained": "../pre", "posttrained": "../post", "restore": [1, 1], "dtype": "bfloat16"}


def test_recipes_without_a_selection_are_removed(tmp_path: Path) -> None:
    write_result(tmp_path, made_result(made_rows(SCORES)))
    assert set(snapshot(tmp_path) or {}) >= {*FILES}
    write_result(tmp_path, made_result(made_rows({(0, 0): (0.1, 1.4)})))
    assert [path.name for path in tmp_path.glob("*.yaml")] == ["soup.yaml"]


@pytest.mark.parametrize("scores", [SCORES, {(0, 0): (0.1, 1.4)}], ids=["written", "removed"])
def test_a_recipe_that_cannot_be_replaced_is_an_output_error(
    tmp_path: Path, scores: dict[tuple[int, int], tuple[float, float]]
) -> None:
    (tmp_path / "slr.yaml").mkdir()
    with refused(OutputError, "io-error"):
        write_result(tmp_path, made_result(made_rows(scores)))


def folders(recipe: AnyRecipe) -> list[Path]:
    """Where a recipe's checkpoints are."""
    sources = [recipe.source("pretrained"), recipe.source("posttrained")]
    return [source.resolve() for source in sources if isinstance(source, Path)]


NAMES = {
    "beside": ("pair", "pair/search"),
    "with spaces and other letters": ("a b/pär 模型", "a b/out put/sëarch"),
    "with characters of YAML and CSV": ("it's: #1, [x] & *y", "it's: #1, [x] & *y/search"),
}


@pytest.mark.parametrize(
    ("names", "written"),
    [
        ("beside", "relative"),
        ("beside", "absolute"),
        ("with spaces and other letters", "relative"),
        ("with characters of YAML and CSV", "absolute"),
    ],
)
def test_every_recipe_merges_from_the_results_folder(made_pair: Path, tmp_path: Path, names: str, written: str) -> None:
    folder, out = (tmp_path / name for name in NAMES[names])
    pair = SmallPair(Path(shutil.copytree(made_pair, folder)))
    sides = {side: str(folder / side.removesuffix("trained")) for side in ("pretrained", "posttrained")}
    result = pair.search(pair.recipe(**(sides if written == "absolute" else {}))).run(out)
    for name in ("slr", "soup", "early", "late"):
        loaded = load_recipe(out / f"{name}.yaml")
        assert Path(loaded.pretrained).is_absolute() == (written == "absolute")
        assert folders(loaded) == [folder / "pre", folder / "post"]
        assert loaded.rules() == result.choice.named()[name].rules.rules()
        hybrid = merge(out / f"{name}.yaml", tmp_path / "hybrids" / name, fsync=False).folder
        assert (hybrid / "model.safetensors").is_file()


def test_a_recipe_reached_through_a_link_still_finds_its_sources(small: SmallPair) -> None:
    (small.folder / "recipes" / "deep").mkdir(parents=True)
    (small.folder / "link").symlink_to(small.folder / "recipes" / "deep")
    content = {"pretrained": "../../pre", "posttrained": "../../post"}
    (small.folder / "link" / "pair.yaml").write_text(yaml.safe_dump(content))
    small.search(load_recipe(small.folder / "link" / "pair.yaml"), spaces=("intervals",)).run(small.out)
    assert folders(load_recipe(small.out / "slr.yaml")) == [small.folder / "pre", small.folder / "post"]


def test_relative_folders_of_a_recipe_without_a_file_count_from_the_current_folder(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small.folder)
    search({"pretrained": "./pre", "posttrained": "post"}, "deep/search", spaces="intervals", threads=1)
    monkeypatch.chdir("/")
    recipe = load_recipe(small.folder / "deep" / "search" / "slr.yaml")
    assert (recipe.pretrained, recipe.posttrained) == ("../../pre", "../../post")
    assert folders(recipe) == [small.folder / "pre", small.folder / "post"]


# selecting again


@pytest.mark.parametrize("ratio", [0.5, 0.98, 1.0])
def test_selecting_again_gives_the_files_of_a_fresh_search_without_the_weights(small: SmallPair, ratio: float) -> None:
    small.run(small.folder / "old", min_quality=0.9, held_out=False)  # which are asked of other candidates
    small.run(small.folder / "fresh", min_quality=ratio, held_out=False)
    for side in ("pre", "post"):
        shutil.rmtree(small.folder / side)
    result = select(small.folder / "old", min_quality=ratio)
    assert read_result(small.folder / "old") == result
    old, fresh = (snapshot(small.folder / name) or {} for name in ("old", "fresh"))
    summaries = [json.loads(files.pop("summary.json")) for files in (old, fresh)]
    assert old == fresh
    assert [summary.pop("elapsed_s") > 0 for summary in summaries] == [True, True]
    assert summaries[0] == summaries[1]


def test_selecting_back_restores_the_same_bytes(small: SmallPair) -> None:
    small.run()
    before = snapshot(small.out)
    select(small.out, min_quality=0.99)
    assert snapshot(small.out) != before
    select(str(small.out), min_quality=0.9)
    assert snapshot(small.out) == before


def test_select_where_nothing_is_feasible_removes_the_recipes_of_intervals(tmp_path: Path) -> None:
    write_result(tmp_path, made_result(made_rows(SCORES)))
    result = select(tmp_path, min_quality=0.995)
    assert result.choice.slr is None
    assert list(tmp_path.glob("*.yaml")) == []


def test_of_two_that_select_at_once_one_is_refused(tmp_path: Path) -> None:
    write_result(tmp_path, made_result(made_rows(SCORES)))
    before = snapshot(tmp_path)
    with lock(tmp_path / "summary.json"):
        with refused(BusyError, "output-busy"):
            select(tmp_path, min_quality=0.3)
        assert why_not_results(tmp_path) is None  # where a killed one left its lock
    assert snapshot(tmp_path) == before


def test_rough_candidates_that_could_be_better_are_doubts(tmp_path: Path) -> None:
    rows = made_rows(SCORES)
    rough = replace(rows[-2], exact=False, prompts=8)
    assert rough.label == "layers 1–2"
    result = made_result([*rows[:-2], rows[-1]])
    post_quality = {**result.post_quality, "8 prompts, float32": 0.96}
    write_result(tmp_path, replace(result, rows=(*result.rows, rough), post_quality=post_quality))
    again = select(tmp_path, min_quality=0.3)
    assert again.choice.slr is not None
    assert again.choice.slr.label == "layers 1–1"
    (doubt,) = again.doubts
    assert "layers 1–2" in doubt
    assert json.loads((tmp_path / "summary.json").read_text())["doubts"] == [doubt]


def test_near_ties_are_doubts_and_in_the_summary(tmp_path: Path) -> None:
    result = made_result(made_rows({(0, 0): (0.95, 1.7), (1, 1): (0.95, 1.6995), (2, 2): (0.95, 1.5)}))
    write_result(tmp_path, result)
    (doubt,) = result.doubts
    assert "layers 1–1" in doubt
    (tie,) = json.loads((tmp_path / "summary.json").read_text())["near_ties"]
    assert (tie["label"], tie["diversity"]) == ("layers 1–1", 1.6995)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), "most"])
def test_a_minimum_quality_out_of_range_is_refused(tmp_path: Path, ratio: float) -> None:
    write_result(tmp_path, made_result(made_rows(SCORES)))
    before = snapshot(tmp_path)
    with pytest.raises(OptionError) as caught:
        select(tmp_path, min_quality=ratio)
    assert [problem.where for problem in caught.value.problems] == ["min_quality"]
    assert snapshot(tmp_path) == before


Spoil = Callable[[bytes], bytes]

DAMAGED: dict[str, tuple[str, Spoil]] = {
    "an empty summary": ("summary.json", lambda old: b""),
    "a summary that is a list": ("summary.json", lambda old: b"[]"),
    "a summary without keys": ("summary.json", lambda old: b"{}"),
    "a summary nested too deeply": ("summary.json", lambda old: b"[" * 100_000),
    "a summary that is not UTF-8": ("summary.json", lambda old: old.replace(b"crc", b"cr\xff")),
    "a summary with a wrong type": ("summary.json", lambda old: old.replace(b'"layers": 3', b'"layers": "many"')),
    "a summary without a checkpoint": ("summary.json", lambda old: old.replace(b'"../pre"', b'""')),
    "a summary with an invalid dtype": ("summary.json", lambda old: old.replace(b'"task"', b'"dtype": "x", "task"')),
    "an empty table": ("results.csv", lambda old: b""),
    "a table with its header only": ("results.csv", lambda old: old.splitlines(keepends=True)[0]),
    "a table that is cut off": ("results.csv", lambda old: old[:-40]),
    "a table without one parent": ("results.csv", lambda old: b"".join(
        line for line in old.splitlines(keepends=True) if not line.startswith(b"pre,"))),
    "a table with a parent twice": ("results.csv", lambda old: old + old.splitlines(keepends=True)[1]),
    "a table that is a picture": ("results.csv", lambda old: b"\x89PNG\r\n\x1a\n" + bytes(range(256))),
    "a table with an endless cell": ("results.csv", lambda old: old + b"x" * 200_000),
    "a table with a word for a number": ("results.csv", lambda old: old.replace(b"0.96", b"many")),
    "a table with an unknown column": ("results.csv", lambda old: old.replace(b"space,label", b"space,name")),
    "a table with invalid rules": ("results.csv", lambda old: old.replace(b"[0, 0]", b"[1, 0]")),
    "a table of other conditions": ("results.csv", lambda old: old.replace(b"float32", b"float16")),
}  # fmt: skip


@pytest.mark.parametrize("name", ["summary.json", "results.csv"])
def test_a_folder_without_results_is_refused(tmp_path: Path, name: str) -> None:
    write_result(tmp_path, made_result(made_rows(SCORES)))
    (tmp_path / name).unlink()
    before = snapshot(tmp_path)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with refused(OutputError, "no-results") as caught:
            select(folder, min_quality=0.8)
        assert caught.value.problems[0].where == str(folder)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_results_are_refused_and_left_as_they_are(tmp_path: Path, case: str) -> None:
    write_result(tmp_path, made_result(made_rows(SCORES)))
    name, spoil = DAMAGED[case]
    valid = (tmp_path / name).read_bytes()
    assert spoil(valid) != valid
    (tmp_path / name).write_bytes(spoil(valid))
    before = snapshot(tmp_path)
    with refused(OutputError, "results-damaged") as caught:
        select(tmp_path, min_quality=0.8)
    assert caught.value.problems[0].where == str(tmp_path)
    assert snapshot(tmp_path) == before


def test_a_folder_of_others_cannot_add_to_recipes(tmp_path: Path) -> None:
    write_result(tmp_path, made_result(made_rows(SCORES)))
    for name, new in (("results.csv", b"float\nalpha: 1"), ("summary.json", rb"float\nalpha: 1")):
        text = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(text.replace(b",float32,", b',"' + new + b'",').replace(b"float32", new))
    select(tmp_path, min_quality=0.8)
    recipe = load_recipe(tmp_path / "slr.yaml")
    assert (recipe.rules().keys(), recipe.dtype) == ({"restore"}, None)


def test_a_bug_is_not_reported_as_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> SearchResult:
        raise TypeError

    write_result(tmp_path, made_result(made_rows(SCORES)))
    monkeypatch.setattr("slrmerge.searching.results_folder.select_from", broken)
    with pytest.raises(TypeError):
        read_result(tmp_path)
