"""The commands that select again and that compare: select, diff."""

import csv
import shutil
from pathlib import Path

import pytest

from slrmerge.searching.results_folder import read_result
from tests.checkpoints import Tensor, llama_config, llama_tensors, write_checkpoint
from tests.cli import refusal, run, strict_json
from tests.conftest import Pair
from tests.merging.faults import snapshot
from tests.searching.conftest import hurried as hurried
from tests.searching.conftest import made_pair as made_pair
from tests.searching.conftest import small as small
from tests.searching.pairs import no_pictures

in_a_hurry = pytest.mark.usefixtures("hurried")


# select


def test_select_selects_again(tiny_search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(tiny_search / "search", tmp_path / "search"))
    with monkeypatch.context() as patch:
        patch.setattr("slrmerge.searching.plots.draw_result", no_pictures)
        result = run("select", folder, "--min-quality", 0.95)
    assert (result.exit_code, result.stderr) == (0, "")
    assert snapshot(folder) != snapshot(tiny_search / "search")
    found = read_result(folder)
    assert found.choice.min_quality == 0.95
    assert found.choice.slr is not None
    assert (found.choice.slr.start, found.choice.slr.end) != (2, 8)
    assert found.choice.slr.label in result.stdout
    value = strict_json(run("select", folder, "--json").stdout)
    assert value["min_quality"] == 0.9
    assert value["selected"]["slr"]["restore"] in ([2, 8], [[2, 8]])
    assert snapshot(folder) == snapshot(tiny_search / "search")


@in_a_hurry
def test_select_without_a_feasible_interval_advises_a_lower_quality(tiny_search: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_search / "search", tmp_path / "search"))
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | ({"quality": "0.5"} if row["space"] == "interval" else {}) for row in rows)
    result = run("select", folder, "--min-quality", 1)
    assert result.exit_code == 0
    assert f"slrmerge select {folder} --min-quality" in result.stdout.splitlines()[-1]
    assert not (folder / "slr.yaml").exists()


def test_select_without_matplotlib_changes_nothing(
    tiny_search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_search / "search", tmp_path / "search"))
    monkeypatch.setattr("slrmerge.errors.find_spec", lambda name: None if name == "matplotlib" else object())
    assert refusal("select", folder, "--min-quality", 0.5) == (13, ["missing-extra"])
    assert snapshot(folder) == snapshot(tiny_search / "search")


# diff


def test_diff_prints_the_same_for_a_recipe_and_for_two_folders(pair: Pair) -> None:
    by_recipe = run("diff", pair.recipe_file(restore=[2, 3]))
    by_folders = run("diff", pair.folder / "pre", pair.folder / "post")
    assert by_recipe.stdout == by_folders.stdout
    assert (by_recipe.exit_code, by_recipe.stderr, by_folders.stderr) == (0, "", "")
    assert len(by_recipe.stdout.splitlines()) == 1 + 6 + 3 + 2


def test_diff_writes_a_table_and_a_heat_map_by_request(pair: Pair) -> None:
    out = pair.folder / "deep" / "moved"
    result = run("diff", pair.folder / "pre", pair.folder / "post", "--out", out, "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == ["diff.csv", "diff.png", "diff.svg", "report.html"]


def test_diff_prints_json_even_where_a_side_is_zero(tmp_path: Path) -> None:
    tensors = llama_tensors("x", layers=1, dtype="F32")
    zero = {**tensors}
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
        zero[name] = Tensor("F32", tensors[name].shape, bytes(len(tensors[name].data)))
    for side, content in (("pre", zero), ("post", tensors)):
        write_checkpoint(tmp_path / side, content, llama_config(layers=1))
    value = strict_json(run("diff", tmp_path / "pre", tmp_path / "post", "--json").stdout)
    by_name = {(entry["layer"], entry["module"]): entry for entry in value["modules"]}
    assert by_name[0, "self_attn.k_proj"]["relative_change"] == 0
    assert by_name[0, "self_attn.q_proj"]["relative_change"] is None
    assert by_name[0, "self_attn.q_proj"]["cosine"] is None


def test_diff_notes_what_it_did_not_compare(pair: Pair) -> None:
    shutil.rmtree(pair.folder / "pre")
    odd = {name: tensor for name, tensor in llama_tensors("pre").items() if name != "model.norm.weight"}
    write_checkpoint(pair.folder / "pre", odd)
    (note,) = strict_json(run("diff", pair.folder / "pre", pair.folder / "post", "--json").stdout)["notes"]
    assert "model.norm.weight" in note
    assert f"\nnote: {note}\n" in run("diff", pair.folder / "pre", pair.folder / "post").stdout


def test_diff_requires_matplotlib_only_for_its_heat_map(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrmerge.errors.find_spec", lambda name: None)
    sides = [pair.folder / "pre", pair.folder / "post"]
    assert run("diff", *sides).exit_code == 0
    shutil.rmtree(pair.folder / "pre")  # refused before anything is opened
    assert refusal("diff", *sides, "--out", pair.folder / "moved") == (13, ["missing-extra"])
    assert not (pair.folder / "moved").exists()
