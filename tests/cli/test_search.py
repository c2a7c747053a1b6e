"""The commands that look before a merge, as people type them: search, select, diff."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slrmerge import files
from slrmerge.cli import main
from slrmerge.search.results import read_report
from tests.checkpoints import Tensor, llama_config, llama_tensors, write_checkpoint
from tests.cli import at_a_terminal, run
from tests.conftest import Pair
from tests.merge.faults import leftovers, snapshot, tree
from tests.search.conftest import hurried as hurried
from tests.search.conftest import made_pair as made_pair
from tests.search.conftest import small as small
from tests.search.pairs import CHECKING, LAYERS, SmallPair, no_pictures

HURRY = "from tests.search.pairs import hurry; import pytest; hurry(pytest.MonkeyPatch())"
in_a_hurry = pytest.mark.usefixtures("hurried")


def strict_json(text: str) -> Any:
    """JSON as the standard has it, in which no number is infinite or NaN."""

    def refuse(word: str) -> object:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


# search


@in_a_hurry
def test_search_says_on_stderr_what_it_does_and_on_stdout_what_it_found(small: SmallPair) -> None:
    result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1)
    assert result.stderr == f"{CHECKING}\n"
    report = read_report(small.out)
    assert report.choice.slr is not None
    lines = result.stdout.splitlines()
    assert len(report.rows) == 15
    assert lines[-2:] == [
        "layers 1–2: the highest D with Q at least 0.9 of the post-trained model's, among 15 candidates",
        f"merge it: slrmerge {small.out}/slr.yaml --out ./hybrid",
    ]
    assert result.exit_code == 0


@in_a_hurry
def test_a_folder_with_spaces_is_quoted_where_it_is_to_be_typed(small: SmallPair) -> None:
    out = small.folder / "my search"
    result = run("search", small.recipe_file(), "--out", out, "--threads", 1)
    assert result.stdout.splitlines()[-1] == f"merge it: slrmerge '{out}/slr.yaml' --out ./hybrid"
    low = run("select", out, "--min-quality", 1)
    assert "Traceback" not in low.output


@in_a_hurry
def test_search_prints_its_result_as_json_and_nothing_else(small: SmallPair) -> None:
    result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1, "--json")
    value = strict_json(result.stdout)
    assert (value.pop("out"), result.stderr, result.exit_code) == (str(small.out), "", 0)
    best = value.pop("ten_best")
    assert value == strict_json((small.out / "summary.json").read_text())
    assert {key: best[0][key] for key in ("label", "quality", "diversity")} == {
        key: value["chosen"]["slr"][key] for key in ("label", "quality", "diversity")
    }
    assert value["chosen"]["slr"]["restore"] == [1, 2]


@in_a_hurry
def test_a_quiet_search_is_quiet(small: SmallPair) -> None:
    result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1, "--quiet")
    assert (result.output, result.exit_code) == ("", 0)
    assert (small.out / "slr.yaml").exists()


@in_a_hurry
def test_a_recipe_for_a_search_may_name_two_checkpoints_only_but_one_for_a_merge_may_not(small: SmallPair) -> None:
    recipe = small.recipe_file()
    assert run("search", recipe, "--out", small.out, "--threads", 1, "--quiet", "--space", "intervals").exit_code == 0
    assert run("diff", recipe, "--quiet").exit_code == 0
    for command in ("merge", "plan"):
        result = run(command, recipe, "--out", small.folder / "hybrid")
        assert result.exit_code == 3
        said = f"{recipe}: $: nothing to merge; give one of restore, alpha, layers, tensors"
        assert result.stderr == f"error: the recipe is not valid\n  {said}\n"


@in_a_hurry
def test_other_recipes_are_tried_by_request_under_their_files_names(small: SmallPair) -> None:
    also = [small.recipe_file("a soup.yaml", alpha=0.5), small.recipe_file("edges.yaml", restore=[[0, 0], [3, 3]])]
    arguments = ["search", small.recipe_file(), "--out", small.out, "--threads", 1, "--space", "soups", "--json"]
    result = run(*arguments, "--also", also[0], "--also", also[1])
    assert (result.exit_code, result.stderr) == (0, "")
    assert [each.candidate.label for each in read_report(small.out).rows[-2:]] == ["a soup.yaml", "edges.yaml"]


@in_a_hurry
@pytest.mark.parametrize(
    ("spaces", "tried"), [(["attention"], {"attention"}), (["mlp", "intervals", "mlp"], {"mlp", "interval"})]
)
def test_the_spaces_that_are_named_are_tried(small: SmallPair, spaces: list[str], tried: set[str]) -> None:
    options = [word for space in spaces for word in ("--space", space)]
    result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1, *options)
    assert result.exit_code == 0
    rows = read_report(small.out).rows
    assert {each.candidate.space for each in rows} == {"post", "pre", *tried}
    assert len({each.candidate for each in rows}) == len(rows)


@in_a_hurry
def test_a_search_without_intervals_does_not_say_that_they_are_not_good_enough(small: SmallPair) -> None:
    result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1, "--space", "soups")
    assert result.exit_code == 0
    assert "no interval has" not in result.stdout


@in_a_hurry
def test_all_options_together_reach_the_search(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrmerge.search.run.QUICK_PROMPTS", 2)
    result = run(
        "search", small.recipe_file(), "--out", small.out, "--threads", 1, "--quick", "--dtype", "bfloat16",
        "--max-memory", "1KB", "--no-resume", "--min-quality", 0.8, "--task", "crc", "--device", "cpu", "--json",
    )  # fmt: skip
    value = strict_json(result.stdout)
    assert (result.exit_code, value["min_quality"], value["task"]) == (0, 0.8, "crc")
    assert value["post_quality"].keys() == {"2 prompts, bfloat16", "6 prompts, float32"}
    assert leftovers(small.out) == []


@in_a_hurry
def test_what_is_skipped_is_said(small: SmallPair) -> None:
    result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1, "--dtype", "bfloat16")
    assert re.search(
        r"^note: all 15 candidates were asked 6 prompts, bfloat16; the \d+ that may win or that the winner is held "
        r"against were asked again: 6 prompts, float32$",
        result.stdout,
        re.MULTILINE,
    )


@in_a_hurry
def test_near_ties_are_said(small: SmallPair) -> None:
    from safetensors.torch import load_file, save_file

    name = "model.safetensors"  # layer 0 is almost the same on both sides, so whether it is restored hardly matters
    pre, post = load_file(small.folder / "pre" / name), load_file(small.folder / "post" / name)
    pre |= {key: value * 1.00001 for key, value in post.items() if ".layers.0." in key}
    save_file(pre, small.folder / "pre" / name)
    result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1)
    assert re.search(
        r"^near-tie: layers 0–2 has only \d\.\de-\d\d nats less than layers 1–2$|"
        r"^near-tie: layers 1–2 has only \d\.\de-\d\d nats less than layers 0–2$",
        result.stdout,
        re.MULTILINE,
    )
    assert result.stdout.count("near-tie: ") == 1


# dry run


@in_a_hurry
def test_a_dry_run_prints_the_estimate_and_the_papers_models_and_writes_nothing(small: SmallPair) -> None:
    recipe = small.recipe_file()
    before = tree(small.folder)
    result = run("search", recipe, "--dry-run", "--threads", 1, "--out", small.out)
    assert (result.exit_code, result.stderr) == (0, "")
    names = [line.split()[0] for line in result.stdout.splitlines() if "FLOP/s" in line]
    assert names == ["post", "Llama-3.1-8B", "Qwen2.5-7B", "Gemma-2-9B"]
    assert tree(small.folder) == before


@in_a_hurry
def test_a_dry_run_prints_json(small: SmallPair) -> None:
    value = strict_json(run("search", small.recipe_file(), "--dry-run", "--threads", 1, "--json").stdout)
    assert value.keys() == {"prompts", "prompt_tokens", "packed_tokens", "lines"}
    assert [line["name"] for line in value["lines"]] == ["post", "Llama-3.1-8B", "Qwen2.5-7B", "Gemma-2-9B"]
    for line in value["lines"]:
        assert line["seconds"] == line["cost"]["flop"] / line["flop_per_s"]


@in_a_hurry
def test_a_dry_run_looks_at_its_target_too(small: SmallPair) -> None:
    result = run("search", small.recipe_file(), "--dry-run", "--threads", 1, "--out", small.folder)
    assert result.exit_code == 6
    assert result.stderr.startswith(f"error: the output cannot be written\n  {small.folder}: ")


# select


def test_select_chooses_again_and_says_so(tiny_search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(tiny_search / "search", tmp_path / "search"))
    with monkeypatch.context() as patch:
        patch.setattr("slrmerge.search.select.draw_report", no_pictures)
        result = run("select", folder, "--min-quality", 0.95)
    assert (result.exit_code, result.stderr) == (0, "")
    assert snapshot(folder) != snapshot(tiny_search / "search")
    report = read_report(folder)
    assert report.choice.min_quality == 0.95
    assert report.choice.slr is not None
    label = report.choice.slr.candidate.label
    assert label != "layers 2–8"
    assert result.stdout.splitlines()[-2:] == [
        f"{label}: the highest D with Q at least 0.95 of the post-trained model's, among 76 candidates",
        f"merge it: slrmerge {folder}/slr.yaml --out ./hybrid",
    ]
    value = strict_json(run("select", folder, "--json").stdout)
    assert (value["chosen"]["slr"]["restore"], value["min_quality"]) == ([2, 8], 0.9)
    assert snapshot(folder) == snapshot(tiny_search / "search")


@in_a_hurry
def test_select_says_that_nothing_suffices_and_what_to_try(tiny_search: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_search / "search", tmp_path / "search"))
    table = (folder / "results.csv").read_text()
    poor = re.sub(r"^(interval,.*?,.*?,.*?,,,.*?),[\d.]+,", r"\1,0.5,", table, flags=re.MULTILINE)
    assert poor.count(",0.5,") >= 55
    (folder / "results.csv").write_text(poor)
    result = run("select", folder, "--min-quality", 1)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == (
        "no interval has Q at least 1 of the post-trained model's; "
        f"choose again by a lower share: slrmerge select {folder} --min-quality …"
    )
    assert not (folder / "slr.yaml").exists()


def test_select_needs_matplotlib_and_says_so_before_it_writes(
    tiny_search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_search / "search", tmp_path / "search"))
    monkeypatch.setattr("slrmerge.errors.find_spec", lambda name: None if name == "matplotlib" else object())
    result = run("select", folder, "--min-quality", 0.5)
    assert (result.exit_code, result.stdout) == (13, "")
    assert snapshot(folder) == snapshot(tiny_search / "search")


# diff


def test_diff_takes_two_folders_or_a_recipe_and_says_the_same(pair: Pair) -> None:
    by_recipe = run("diff", pair.recipe_file(restore=[2, 3]))
    by_folders = run("diff", pair.folder / "pre", pair.folder / "post")
    assert by_recipe.stdout == by_folders.stdout
    assert (by_recipe.exit_code, by_recipe.stderr, by_folders.stderr) == (0, "", "")
    assert len(by_recipe.stdout.splitlines()) == 1 + 6 + 3 + 2


def test_diff_leaves_a_table_and_a_heat_map_by_request(pair: Pair) -> None:
    out = pair.folder / "deep" / "moved"
    result = run("diff", pair.folder / "pre", pair.folder / "post", "--out", out, "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == ["diff.csv", "diff.png", "diff.svg"]


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


def test_diff_says_what_it_did_not_compare(pair: Pair) -> None:
    shutil.rmtree(pair.folder / "pre")
    odd = {name: tensor for name, tensor in llama_tensors("pre").items() if name != "lm_head.weight"}
    write_checkpoint(pair.folder / "pre", odd)
    result = run("diff", pair.folder / "pre", pair.folder / "post")
    assert "note: not compared, only post-trained: lm_head.weight\n" in result.stdout
    assert strict_json(run("diff", pair.folder / "pre", pair.folder / "post", "--json").stdout)["notes"] == [
        "not compared, only post-trained: lm_head.weight"
    ]


def test_diff_needs_matplotlib_for_its_heat_map_only_and_says_so_at_once(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slrmerge.errors.find_spec", lambda name: None)
    sides = [pair.folder / "pre", pair.folder / "post"]
    assert run("diff", *sides).exit_code == 0
    compared: list[object] = []
    monkeypatch.setattr("slrmerge.diff.compare_checkpoints", lambda *sides, **_: compared.append(sides))
    result = run("diff", *sides, "--out", pair.folder / "moved")
    assert result.exit_code == 13
    assert (
        result.stderr
        == "error: a package is missing\n  slrmerge search: needs matplotlib; pip install 'slrmerge[search]'\n"
    )
    assert compared == []
    assert not (pair.folder / "moved").exists()


# bad input


BAD: dict[str, tuple[Callable[[Pair], list[object]], int]] = {
    "search: no recipe": (lambda pair: ["search"], 2),
    "search: two recipes": (lambda pair: ["search", "a.yaml", "b.yaml"], 2),
    "search: nowhere to write": (lambda pair: ["search", pair.recipe_file(alpha=0.5)], 2),
    "search: no such device": (lambda pair: ["search", pair.recipe_file(), "--dry-run", "--device", "meta"], 2),
    "search: a size in words": (lambda pair: ["search", "x.yaml", "--max-memory", "lots"], 2),
    "search: no memory at all": (lambda pair: ["search", "x.yaml", "--max-memory", "0"], 2),
    "search: an unknown space": (lambda pair: ["search", "x.yaml", "--space", "heads"], 2),
    "search: an unknown task": (lambda pair: ["search", "x.yaml", "--task", "poems"], 2),
    "search: an unknown dtype": (lambda pair: ["search", "x.yaml", "--dtype", "int8"], 2),
    "search: too much quality": (lambda pair: ["search", "x.yaml", "--min-quality", 2], 2),
    "search: no quality": (lambda pair: ["search", "x.yaml", "--min-quality", -0.1], 2),
    "search: quality in words": (lambda pair: ["search", "x.yaml", "--min-quality", "nan"], 2),
    "search: no threads": (lambda pair: ["search", "x.yaml", "--threads", 0], 2),
    "search: an unknown device": (lambda pair: ["search", "x.yaml", "--device", "abacus"], 2),
    "search: a device that is not here": (lambda pair: ["search", "x.yaml", "--device", "cuda:7"], 2),
    "search: a missing recipe": (lambda pair: ["search", pair.folder / "no.yaml", "--out", pair.out], 3),
    "search: a missing recipe, dry": (lambda pair: ["search", pair.folder / "no.yaml", "--dry-run"], 3),
    "search: another recipe that is missing": (
        lambda pair: ["search", pair.recipe_file(alpha=0.5), "--out", pair.out, "--also", pair.folder / "no.yaml"], 3,
    ),
    "search: another recipe that says nothing": (
        lambda pair: ["search", pair.recipe_file(), "--out", pair.out, "--also", pair.recipe_file("other.yaml")], 3,
    ),
    "search: a side that is missing": (
        lambda pair: ["search", pair.recipe_file(pretrained="./nowhere"), "--out", pair.out], 4,
    ),
    "search: a model without a tokenizer": (lambda pair: ["search", pair.recipe_file(), "--out", pair.out], 12),
    "select: no folder": (lambda pair: ["select"], 2),
    "select: too much quality": (lambda pair: ["select", pair.folder, "--min-quality", 2], 2),
    "select: a folder that is missing": (lambda pair: ["select", pair.out], 6),
    "select: a folder without results": (lambda pair: ["select", pair.folder / "pre"], 6),
    "select: a file": (lambda pair: ["select", pair.recipe_file()], 6),
    "select: a long name": (lambda pair: ["select", "x" * 300], 6),
    "diff: nothing": (lambda pair: ["diff"], 2),
    "diff: three folders": (lambda pair: ["diff", pair.folder, pair.folder, pair.folder], 2),
    "diff: a missing recipe": (lambda pair: ["diff", pair.folder / "no.yaml"], 3),
    "diff: one folder": (lambda pair: ["diff", pair.folder / "pre"], 3),
    "diff: a folder that is missing": (lambda pair: ["diff", pair.folder / "pre", pair.folder / "no"], 4),
    "diff: a file for a folder": (lambda pair: ["diff", pair.folder / "pre", pair.recipe_file()], 4),
    "diff: an output that is a file": (
        lambda pair: ["diff", pair.folder / "pre", pair.folder / "post", "--out", pair.recipe_file()], 6,
    ),
    "diff: an output below a file": (
        lambda pair: ["diff", pair.folder / "pre", pair.folder / "post", "--out", pair.recipe_file() / "x"], 6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_bad_input_ends_in_words_and_an_exit_code(pair: Pair, case: str, more: list[str]) -> None:
    arguments, exit_code = BAD[case]
    result = run(*arguments(pair), *more)
    assert result.exit_code == exit_code, result.output
    if exit_code == 2:
        assert "\nError: " in result.stderr
    else:
        assert result.stderr.startswith("error: ")
        assert not more or strict_json(result.stdout)["problems"]
    assert more or result.stdout == ""
    assert not pair.out.exists()
    assert leftovers(pair.out) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["search", "x.yaml", "--space", "heads"], "'heads' is not one of 'intervals', 'soups', 'attention', 'mlp'."),
        (["search", "x.yaml", "--min-quality", "2"], "2.0 is not in the range 0<=x<=1."),
        (["search", "x.yaml", "--max-memory", "lots"],
         "'lots' is not a size; write a number with KB, MB, GB, KiB, MiB or GiB, such as 5GB"),
        (["diff", "a", "b", "c"], "give one recipe, or the pre-trained and the post-trained checkpoint"),
    ],
)  # fmt: skip
def test_usage_errors_say_what_is_known(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.stderr.splitlines()[-1].endswith(said)
    assert (result.exit_code, result.stdout) == (2, "")


@in_a_hurry
def test_a_search_needs_a_place_to_write_to(small: SmallPair) -> None:
    result = run("search", small.recipe_file(), "--threads", 1)
    assert result.stderr.splitlines()[-1] == "Error: missing option '--out'"
    assert (result.exit_code, result.stdout) == (2, "")


@in_a_hurry
def test_a_model_that_cannot_be_searched_has_an_exit_code_of_its_own(small: SmallPair) -> None:
    (small.folder / "post" / "chat_template.jinja").unlink()
    result = run("search", small.recipe_file(), "--out", small.out, "--json")
    value = strict_json(result.stdout)
    assert (result.exit_code, value["error"]) == (12, "UnsupportedModelError")
    assert result.stderr.startswith("error: this model cannot be used here\n  ")


def test_a_package_that_is_missing_has_an_exit_code_of_its_own(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrmerge.errors.find_spec", lambda name: None)
    result = run("search", pair.recipe_file(), "--out", pair.out)
    assert (result.exit_code, result.stdout) == (13, "")
    said = "slrmerge search: needs transformers and matplotlib; pip install 'slrmerge[search]'"
    assert result.stderr == f"error: a package is missing\n  {said}\n"


@in_a_hurry
def test_ctrl_c_says_what_is_kept(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    from slrmerge.cli.progress import TerminalProgress

    def press(self: TerminalProgress, what: str) -> None:
        if what.startswith("layer 3"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TerminalProgress, "stage", press)
        result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == (
        f"{CHECKING}\n\nstopped: finished layers are kept, and the same command goes on from there\n"
    )
    again = run("search", small.recipe_file(), "--out", small.out, "--threads", 1)
    assert again.stderr == f"{CHECKING}\ngoing on after layer 2 of {LAYERS}, which an earlier run finished\n"


@in_a_hurry
def test_ctrl_c_says_that_nothing_is_kept_where_nothing_is(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    from slrmerge.cli.progress import TerminalProgress

    def press(self: TerminalProgress, what: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TerminalProgress, "stage", press)
    result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1, "--no-resume", "--quiet")
    assert (result.exit_code, result.output) == (130, "\nstopped: nothing was written\n")
    assert not small.out.exists()
    assert not files.staging_folder(small.out).exists()


# progress


def test_a_terminal_sees_layers_states_and_the_time_left(small: SmallPair) -> None:
    code = f"import sys; from slrmerge.cli import main; {HURRY}; main(sys.argv[1:])"
    command = [
        sys.executable,
        "-c",
        code,
        "search",
        str(small.recipe_file()),
        "--out",
        str(small.out),
        "--threads",
        "1",
    ]
    exit_code, summary, seen = at_a_terminal(command, columns=120, OMP_NUM_THREADS="1", TQDM_MININTERVAL="0")
    text = seen.decode()
    assert exit_code == 0
    for layer in range(1, LAYERS + 1):
        assert f"layer {layer} of {LAYERS}" in text
    assert re.search(r"head: 100%\|.+\| [\d.]+/[\d.]+ \[00:\d\d<00:00, +[\d.]+k? states/s\]", text)
    assert b"\x1b" not in summary
    assert summary.decode().startswith("               hybrid")


@in_a_hurry
def test_without_a_terminal_there_is_no_bar(small: SmallPair) -> None:
    result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1)
    assert "\r" not in result.output
    assert "%|" not in result.output


def test_the_command_offers_every_space_and_every_task() -> None:
    from slrmerge.crc import TASKS
    from slrmerge.search.candidates import SPACES

    offered = {option.name: option.type for option in main.commands["search"].params}
    assert list(offered["spaces"].choices) == list(SPACES)  # type: ignore[attr-defined]
    assert list(offered["task"].choices) == list(TASKS)  # type: ignore[attr-defined]
