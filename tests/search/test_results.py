"""What a search leaves in its folder reads back as it was, and its recipes merge."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from slrmerge import load_recipe
from slrmerge.crc import Scores
from slrmerge.errors import OutputError
from slrmerge.search.candidates import Candidate
from slrmerge.search.choose import Row
from slrmerge.search.results import read_report, write_prompts, write_report
from slrmerge.search.select import select
from tests.cli import run
from tests.merge.faults import snapshot
from tests.search.pairs import SmallPair, interval, made_report, made_rows, prompts_of, row

SCORES = {(0, 0): (0.95, 1.4), (1, 1): (0.9, 1.7), (2, 2): (0.87, 1.6), (0, 1): (0.95, 1.6), (1, 2): (0.3, 2.2),
          (0, 2): (0.1, 2.4)}  # fmt: skip
OWN = Candidate("recipe", {"layers": [{"range": [0, 2], "alpha": [0.25, 0.5], "modules": ["mlp"]}]}, 'ünï, "own".yaml')
ATTENTION = Candidate("attention", {"layers": [{"range": [0, 1], "modules": ["self_attn"], "alpha": 1.0}]},
                      "layers 0–1, self_attn only", 0, 1, modules="self_attn", layers_restored=2)  # fmt: skip
FILES = ["early.yaml", "late.yaml", "results.csv", "slr.yaml", "soup.yaml", "summary.json"]


def sample(**more: Any) -> list[Row]:
    """Rows of every kind."""
    others = [row(OWN, 0.5, 0.5), row(ATTENTION, 0.9, 1.1), row(interval(1, 2), 1 / 3, 1e-7, **more)]
    return made_rows(SCORES | {(0, 2): (0.0, 0.0)}) + others


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# round trip


def test_a_report_reads_back_as_it_was(tmp_path: Path) -> None:
    report = made_report(sample(), notes=("one – note", "another"), dtype="bfloat16", pretrained="../a b/ü")
    write_report(tmp_path, report)
    assert read_report(tmp_path) == report


def test_rows_that_were_not_asked_exactly_read_back_as_they_were(tmp_path: Path) -> None:
    report = made_report(made_rows(SCORES))
    rough = replace(report.rows[-1], exact=False, prompts=8, dtype="bfloat16")
    report = replace(
        report, rows=(*report.rows[:-1], rough), post_quality={**report.post_quality, "8 prompts, bfloat16": 0.25}
    )
    write_report(tmp_path, report)
    assert read_report(tmp_path) == report


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 4)), min_size=3, max_size=3), st.sampled_from([0, 0.5, 0.9, 1]))
def test_every_digit_of_a_score_reads_back(
    tmp_path_factory: pytest.TempPathFactory, scores: list[tuple[float, float]], min_quality: float
) -> None:
    folder = tmp_path_factory.getbasetemp() / "digits"
    folder.mkdir(exist_ok=True)
    spans = [(0, 0), (1, 1), (0, 1)]
    report = made_report(made_rows(dict(zip(spans, scores, strict=True))), min_quality=min_quality)
    write_report(folder, report)
    assert read_report(folder) == report


# the table


def test_the_table_has_a_line_a_candidate_in_the_order_they_were_tried(tmp_path: Path) -> None:
    report = made_report(sample())
    write_report(tmp_path, report)
    lines = table(tmp_path)
    assert list(lines[0]) == [
        "space", "label", "start", "end", "alpha", "modules", "layers_restored", "quality", "diversity", "feasible",
        "pareto", "exact", "prompts", "dtype", "rules",
    ]  # fmt: skip
    assert [line["label"] for line in lines] == [each.candidate.label for each in report.rows]
    assert [float(line["quality"]) for line in lines] == [each.quality for each in report.rows]


def test_a_cell_is_empty_where_a_number_has_no_meaning(tmp_path: Path) -> None:
    write_report(tmp_path, made_report(sample()))
    lines = {line["space"]: line for line in table(tmp_path)}
    assert (lines["post"]["start"], lines["post"]["end"], lines["post"]["alpha"]) == ("", "", "0.0")
    assert (lines["interval"]["start"], lines["interval"]["end"], lines["interval"]["alpha"]) == ("1", "2", "")
    assert [lines[space]["modules"] for space in ("attention", "interval", "soup")] == ["self_attn", "", ""]
    assert json.loads(lines["recipe"]["rules"]) == OWN.rules


def test_the_table_is_text_of_plain_lines(tmp_path: Path) -> None:
    write_report(tmp_path, made_report(made_rows({(0, 0): (0.95, 1.5)})))
    assert (tmp_path / "results.csv").read_bytes() == (
        "space,label,start,end,alpha,modules,layers_restored,quality,diversity,feasible,pareto,exact,prompts,dtype,rules\n"
        'post,post-trained,,,0.0,,0,0.96,1.0,true,true,true,40,float32,"{""alpha"": 0.0}"\n'
        'pre,pre-trained,,,1.0,,3,0.5,2.0,false,true,true,40,float32,"{""alpha"": 1.0}"\n'
        'soup,soup 0.50,,,0.5,,0,0.9,1.5,true,true,true,40,float32,"{""alpha"": 0.5}"\n'
        'interval,layers 0–0,0,0,,,1,0.95,1.5,true,true,true,40,float32,"{""restore"": [0, 0]}"\n'
    ).encode()


def test_the_summary_names_what_was_chosen_and_under_what(tmp_path: Path) -> None:
    report = made_report(made_rows(SCORES), notes=("a note",))
    write_report(tmp_path, report)
    value = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert value == report.summary()
    assert {name: chosen["label"] for name, chosen in value["chosen"].items()} == {
        "post": "post-trained", "slr": "layers 1–1", "soup": "soup 0.50", "early": "layers 0–0", "late": "layers 2–2",
        "pre": "pre-trained",
    }  # fmt: skip
    assert value["chosen"]["slr"] == {
        "label": "layers 1–1", "restore": [1, 1], "quality": 0.9, "diversity": 1.7, "exact": True
    }  # fmt: skip
    others = {"layers": 3, "candidates": 9, "min_quality": 0.9, "near_ties": [], "notes": ["a note"], "elapsed_s": 1.5}
    assert {name: value[name] for name in others} == others


def test_each_prompts_values_are_kept_with_who_was_asked_what(tmp_path: Path) -> None:
    rows = made_rows(SCORES)
    scores = Scores(np.random.default_rng(0).random((9, 2)), np.full((9, 2), np.nan))
    write_prompts(tmp_path / "prompts.npz", rows, ["why?", "wie groß?"], scores)
    kept = prompts_of(tmp_path)
    assert list(kept["candidates"]) == [each.candidate.label for each in rows]
    assert list(kept["questions"]) == ["why?", "wie groß?"]
    assert kept["quality"].tobytes() == scores.quality.tobytes()
    assert kept["diversity"].shape == (9, 2)
    assert np.isnan(kept["diversity"]).all()


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    report, scores = made_report(sample()), Scores(np.zeros((12, 2)), np.ones((12, 2)))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, report)
        write_prompts(tmp_path / name / "prompts.npz", report.rows, ["a", "b"], scores)
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    assert sorted(snapshot(tmp_path / "one") or {}) == sorted([*FILES, "prompts.npz"])


# recipes


def test_a_recipe_says_where_it_came_from(tmp_path: Path) -> None:
    write_report(tmp_path, made_report(made_rows(SCORES), dtype="bfloat16"))
    assert (tmp_path / "slr.yaml").read_text(encoding="utf-8") == (
        "# layers 1–1: the interval with the highest D whose Q is at least 0.9 of the post-trained model's.\n"
        "# Found by `slrmerge search` (crc, 40 prompts, float32) among 9 candidates:\n"
        "# Q 0.9000, D 1.7000 nats; the post-trained model has 0.9600 and 1.0000.\n"
        "pretrained: ../pre\nposttrained: ../post\nrestore: [1, 1]\ndtype: bfloat16\n"
    )
    firsts = {
        name: (tmp_path / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        for name in ("soup", "early", "late")
    }
    assert firsts == {
        "soup": "# soup 0.50: the soup with the highest D whose Q is at least 0.9 of the post-trained model's.",
        "early": "# layers 0–0: a control: as many layers as slr.yaml, the first ones.",
        "late": "# layers 2–2: a control: as many layers as slr.yaml, the last ones.",
    }


def test_recipes_without_a_choice_are_taken_away(tmp_path: Path) -> None:
    write_report(tmp_path, made_report(made_rows(SCORES)))
    assert sorted(snapshot(tmp_path) or {}) == FILES
    write_report(tmp_path, made_report(made_rows({(0, 0): (0.1, 1.4)})))
    assert sorted(snapshot(tmp_path) or {}) == ["results.csv", "soup.yaml", "summary.json"]


NAMES = {
    "beside": ("pair", "pair/search"),
    "with spaces and letters from elsewhere": ("a b/pär 模型", "a b/out put/sëarch"),
    "with signs that YAML and CSV know": ("it's: #1, [x] & *y", "it's: #1, [x] & *y/search"),
}


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("names", "written"),
    [
        ("beside", "relative"),
        ("beside", "absolute"),
        ("with spaces and letters from elsewhere", "relative"),
        ("with signs that YAML and CSV know", "absolute"),
    ],
)
def test_every_recipe_merges_from_where_it_lies(made_pair: Path, tmp_path: Path, names: str, written: str) -> None:
    folder, out = (tmp_path / name for name in NAMES[names])
    pair = SmallPair(Path(shutil.copytree(made_pair, folder)))
    sides = {side: str(folder / side.removesuffix("trained")) for side in ("pretrained", "posttrained")}
    recipe = pair.recipe(**(sides if written == "absolute" else {}))
    with pair.search(recipe) as search:
        report = search.run(out)
    for name in ("slr", "soup", "early", "late"):
        file = out / f"{name}.yaml"
        loaded = load_recipe(file)
        assert Path(loaded.pretrained).is_absolute() == (written == "absolute")
        rules = report.choice.named()[name].candidate.rules
        assert {key: loaded.to_dict().get(key) for key in rules} == {
            key: [value] if key == "restore" else value for key, value in rules.items()
        }
        result = run(file, "--out", tmp_path / "hybrids" / name, "--no-fsync", "--quiet")
        assert (result.exit_code, result.output) == (0, "")


@pytest.mark.usefixtures("hurried")
def test_a_recipe_reached_through_a_link_still_finds_its_sources(small: SmallPair) -> None:
    (small.folder / "recipes" / "deep").mkdir(parents=True)
    (small.folder / "link").symlink_to(small.folder / "recipes" / "deep")
    content = {"pretrained": "../../pre", "posttrained": "../../post"}
    (small.folder / "link" / "pair.yaml").write_text(yaml.safe_dump(content))
    recipe = load_recipe(small.folder / "link" / "pair.yaml", pair_only=True)
    with small.search(recipe, spaces=("intervals",)) as search:
        search.run(small.out)
    sides = load_recipe(small.out / "slr.yaml").sources()
    assert [side.resolve() for side in sides] == [small.folder / "pre", small.folder / "post"]


# choosing again


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("ratio", [0.5, 0.98, 1.0])
def test_choosing_again_chooses_as_a_fresh_search_would_without_the_weights(small: SmallPair, ratio: float) -> None:
    small.report(small.folder / "old", min_quality=0.9)
    small.report(small.folder / "fresh", min_quality=ratio)
    for side in ("pre", "post"):
        shutil.rmtree(small.folder / side)
    report = select(small.folder / "old", min_quality=ratio)
    assert read_report(small.folder / "old") == report
    old, fresh = (snapshot(small.folder / name) or {} for name in ("old", "fresh"))
    summaries = [json.loads(files.pop("summary.json")) for files in (old, fresh)]
    assert old == fresh
    assert [summary.pop("elapsed_s") > 0 for summary in summaries] == [True, True]
    assert summaries[0] == summaries[1]


@pytest.mark.usefixtures("hurried")
def test_choosing_back_gives_the_very_files_that_were_there(small: SmallPair) -> None:
    small.report()
    before = snapshot(small.out)
    select(small.out, min_quality=0.99)
    assert snapshot(small.out) != before
    select(small.out, min_quality=0.9)
    assert snapshot(small.out) == before


@pytest.mark.usefixtures("hurried")
def test_choosing_where_nothing_suffices_leaves_no_recipes_of_intervals(tmp_path: Path) -> None:
    write_report(tmp_path, made_report(made_rows(SCORES)))
    report = select(tmp_path, min_quality=0.995)
    assert report.choice.slr is None
    assert [path.name for path in sorted(tmp_path.glob("*.yaml"))] == []


@pytest.mark.usefixtures("hurried")
def test_what_was_not_asked_exactly_and_might_win_by_another_ratio_is_said(tmp_path: Path) -> None:
    rows = made_rows(SCORES)
    rows[-2] = replace(rows[-2], exact=False, prompts=8)
    assert rows[-2].candidate.label == "layers 1–2"
    report = made_report([rows[0], *rows[1:-2], rows[-1]])
    post_quality = {**report.post_quality, "8 prompts, float32": 0.96}
    write_report(tmp_path, replace(report, rows=(*report.rows, rows[-2]), post_quality=post_quality))
    again = select(tmp_path, min_quality=0.3)
    assert again.choice.slr is not None
    assert again.choice.slr.candidate.label == "layers 1–1"
    assert again.doubts == (
        "asked only roughly, and maybe better: layers 1–2; search without --quick and with --dtype float32 to be sure",
    )


BROKEN: dict[str, tuple[str, Callable[[bytes], bytes] | None]] = {
    "no summary": ("summary.json", None),
    "no table": ("results.csv", None),
    "an empty summary": ("summary.json", lambda old: b""),
    "a summary that is a list": ("summary.json", lambda old: b"[]"),
    "a summary without a ratio": ("summary.json", lambda old: b"{}"),
    "a summary nested too deeply": ("summary.json", lambda old: b"[" * 100_000),
    "an empty table": ("results.csv", lambda old: b""),
    "a table of its heads only": ("results.csv", lambda old: old.splitlines(keepends=True)[0]),
    "a table that is cut off": ("results.csv", lambda old: old[:-40]),
    "a table that is a picture": ("results.csv", lambda old: b"\x89PNG\r\n\x1a\n" + bytes(range(256))),
    "a table with an endless cell": ("results.csv", lambda old: old + b"x" * 200_000),
    "a table with a word for a number": ("results.csv", lambda old: old.replace(b"0.96", b"many")),
    "a table of other conditions": ("results.csv", lambda old: old.replace(b"float32", b"float16")),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_without_whole_results_is_refused_and_left_as_it_is(tmp_path: Path, case: str) -> None:
    write_report(tmp_path, made_report(made_rows(SCORES)))
    name, spoil = BROKEN[case]
    if spoil is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(spoil((tmp_path / name).read_bytes()))
    before = snapshot(tmp_path)
    with pytest.raises(OutputError) as caught:
        select(tmp_path, min_quality=0.8)
    assert str(caught.value) == (
        f"{tmp_path}: does not hold the results of a search; name the folder that slrmerge search wrote"
    )
    assert snapshot(tmp_path) == before
