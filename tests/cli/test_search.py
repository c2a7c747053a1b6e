"""The command that looks for layers to restore: search."""

import re
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from slrmerge.searching.results_folder import read_result
from tests.cli import at_a_terminal, on_a_terminal, refusal, run, strict_json
from tests.conftest import Pair
from tests.merging.faults import harm, leftovers, tree
from tests.searching.conftest import hurried as hurried
from tests.searching.conftest import made_pair as made_pair
from tests.searching.conftest import small as small
from tests.searching.pairs import LAYERS, SmallPair

HURRY = "from tests.searching.pairs import hurry; import pytest; hurry(pytest.MonkeyPatch())"
in_a_hurry = pytest.mark.usefixtures("hurried")


# search


@in_a_hurry
def test_search_reports_on_stderr_and_prints_its_result_on_stdout(small: SmallPair) -> None:
    result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1)
    assert result.exit_code == 0
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == ["warning"]
    found = read_result(small.out)
    assert len(found.rows) == 15
    assert found.choice.slr is not None
    assert found.choice.slr.label in result.stdout
    assert result.stdout.splitlines()[-1].endswith(f": slrmerge {small.out}/slr.yaml --out ./hybrid")


@in_a_hurry
def test_a_folder_with_spaces_is_quoted_in_commands(small: SmallPair) -> None:
    out = small.folder / "my search"
    result = run("search", small.recipe_file(), "--out", out, "--threads", 1)
    assert f"slrmerge '{out}/slr.yaml' --out ./hybrid" in result.stdout
    assert run("select", out, "--min-quality", 1).exit_code == 0


@in_a_hurry
def test_search_prints_its_result_as_json_and_nothing_else(small: SmallPair) -> None:
    result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1, "--json")
    value = strict_json(result.stdout)
    assert (value.pop("out"), result.exit_code) == (str(small.out), 0)
    assert result.stderr.startswith("warning: the post-trained model answers crc correctly")
    best = value.pop("ten_best")
    said = {"notes": [], "doubts": [], "warnings": []}
    assert value == {**said, **strict_json((small.out / "summary.json").read_text())}
    assert {key: best[0][key] for key in ("label", "quality", "diversity")} == {
        key: value["selected"]["slr"][key] for key in ("label", "quality", "diversity")
    }
    assert value["selected"]["slr"]["restore"] in ([1, 2], [[1, 2]])


@in_a_hurry
def test_a_quiet_search_is_quiet(small: SmallPair) -> None:
    result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1, "--quiet")
    assert (result.output, result.exit_code) == ("", 0)
    assert (small.out / "slr.yaml").exists()


@in_a_hurry
def test_a_recipe_without_rules_is_enough_for_search_and_diff_but_not_for_a_merge(small: SmallPair) -> None:
    recipe = small.recipe_file()
    assert run("search", recipe, "--out", small.out, "--threads", 1, "--quiet", "--space", "intervals").exit_code == 0
    assert run("diff", recipe, "--quiet").exit_code == 0
    for command in ("merge", "plan"):
        assert refusal(command, recipe, "--out", small.folder / "hybrid") == (3, ["nothing-to-merge"])


@in_a_hurry
def test_search_takes_two_folders_in_place_of_a_recipe(small: SmallPair) -> None:
    sides = [small.folder / "pre", small.folder / "post"]
    assert run("search", *sides, "--out", small.out, "--threads", 1, "--quiet", "--space", "soups").exit_code == 0
    assert run("plan", small.out / "soup.yaml", "--json").exit_code == 0
    assert run("search", *sides, "more", "--out", small.out).exit_code == 2


@in_a_hurry
def test_other_recipes_are_scored_under_their_file_names(small: SmallPair) -> None:
    also = [small.recipe_file("a soup.yaml", alpha=0.5), small.recipe_file("edges.yaml", restore=[[0, 0], [3, 3]])]
    arguments = ["search", small.recipe_file(), "--out", small.out, "--threads", 1, "--space", "intervals", "--json"]
    result = run(*arguments, "--also", also[0], "--also", also[1])
    assert result.exit_code == 0
    assert [row.label for row in read_result(small.out).rows[-2:]] == ["a soup.yaml", "edges.yaml"]


@in_a_hurry
@pytest.mark.parametrize(
    ("spaces", "tried"), [(["attention"], {"attention"}), (["mlp", "intervals", "mlp"], {"mlp", "interval"})]
)
def test_only_the_named_spaces_are_tried(small: SmallPair, spaces: list[str], tried: set[str]) -> None:
    options = [word for space in spaces for word in ("--space", space)]
    result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1, *options)
    assert result.exit_code == 0
    rows = read_result(small.out).rows
    assert {row.space for row in rows} == {"post", "pre", *tried}
    assert len({row.label for row in rows}) == len(rows)


@in_a_hurry
def test_a_search_without_intervals_does_not_advise_a_lower_quality(small: SmallPair) -> None:
    result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1, "--space", "soups")
    assert result.exit_code == 0
    assert "--min-quality" not in result.stdout


@in_a_hurry
def test_all_options_together_reach_the_search(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrmerge.searching.prepare.QUICK_PROMPTS", 2)
    result = run(
        "search", small.recipe_file(), "--out", small.out, "--threads", 1, "--quick", "--dtype", "bfloat16",
        "--max-memory", "1KB", "--no-resume", "--min-quality", 0.8, "--task", "crc", "--device", "cpu",
        "--no-held-out", "--json",
    )  # fmt: skip
    value = strict_json(result.stdout)
    assert (result.exit_code, value["min_quality"], value["task"]) == (0, 0.8, "crc")
    assert value["post_quality"].keys() == {"2 prompts, bfloat16", "6 prompts, float32"}
    assert "held_out" not in value
    assert leftovers(small.out) == []


@in_a_hurry
def test_notes_report_a_first_pass_in_bfloat16(small: SmallPair) -> None:
    result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1, "--dtype", "bfloat16")
    (note,) = read_result(small.out).notes
    assert f"\nnote: {note}\n" in result.stdout
    assert re.search(r"\b15\b.*6 prompts, bfloat16.*6 prompts, float32", note)


@in_a_hurry
def test_near_ties_are_reported(small: SmallPair) -> None:
    from safetensors.torch import load_file, save_file

    name = "model.safetensors"  # layer 0 is almost the same on both sides, so whether it is restored hardly matters
    pre, post = load_file(small.folder / "pre" / name), load_file(small.folder / "post" / name)
    pre |= {key: value * 1.00001 for key, value in post.items() if ".layers.0." in key}
    save_file(pre, small.folder / "pre" / name)
    result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1)
    found = read_result(small.out)
    (tie,) = found.choice.near_ties
    assert found.choice.slr is not None
    assert {tie.label, found.choice.slr.label} == {"layers 0–2", "layers 1–2"}
    assert f"\nnote: {found.doubts[0]}\n" in result.stdout


# dry run


@in_a_hurry
def test_a_dry_run_estimates_this_search_and_those_of_the_paper_and_writes_nothing(small: SmallPair) -> None:
    recipe = small.recipe_file()
    before = tree(small.folder)
    result = run("search", recipe, "--dry-run", "--threads", 1, "--out", small.out)
    assert (result.exit_code, result.stderr) == (0, "")
    names = [re.split("  +", line)[0] for line in result.stdout.splitlines() if "FLOP/s" in line]
    assert names == ["post", "post, held-out", "Llama-3.1-8B", "Qwen2.5-7B", "Gemma-2-9B"]
    assert tree(small.folder) == before


@in_a_hurry
def test_a_dry_run_prints_json(small: SmallPair) -> None:
    value = strict_json(run("search", small.recipe_file(), "--dry-run", "--threads", 1, "--json").stdout)
    about_prompts = {"prompts", "prompt_tokens", "packed_tokens", "prompt", "date"}
    assert value.keys() == {*about_prompts, "rows", "workers", "download_bytes", "program_bytes", "notes"}
    assert [row["name"] for row in value["rows"]] == [
        "post", "post, held-out", "Llama-3.1-8B", "Qwen2.5-7B", "Gemma-2-9B"
    ]  # fmt: skip
    for row in value["rows"]:
        assert row["seconds"] == row["cost"]["flop"] / row["flop_per_s"] + row["overhead_s"]
        assert row["memory_bytes"] > value["program_bytes"] > 0


@in_a_hurry
def test_a_dry_run_checks_its_output_folder(small: SmallPair) -> None:
    options = ["--dry-run", "--threads", 1, "--out", small.folder]
    assert refusal("search", small.recipe_file(), *options) == (6, ["output-overlaps"])


# errors


@in_a_hurry
def test_a_model_that_cannot_be_searched_has_its_own_exit_code(small: SmallPair) -> None:
    (small.folder / "post" / "chat_template.jinja").unlink()
    assert refusal("search", small.recipe_file(), "--out", small.out) == (12, ["no-chat-template"])


def test_a_missing_package_has_its_own_exit_code(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrmerge.errors.find_spec", lambda name: None)
    assert refusal("search", pair.recipe_file(), "--out", pair.out) == (13, ["missing-extra"])


@in_a_hurry
def test_an_interrupted_search_resumes(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    from slrmerge.cli.progress import TerminalProgress

    def press(self: TerminalProgress, what: str) -> None:
        if what.startswith("layer 3"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TerminalProgress, "on_stage", press)
        result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1)
    assert (result.exit_code, result.stdout) == (130, "")
    assert "\ninterrupted: " in result.stderr
    assert leftovers(small.out) != []
    again = run("search", small.recipe_file(), "--out", small.out, "--threads", 1)
    assert again.exit_code == 0
    assert f"layer 2 of {LAYERS}" in again.stderr
    assert leftovers(small.out) == []


@in_a_hurry
@pytest.mark.parametrize("side", ["pre", "post"])
def test_a_side_that_is_replaced_during_a_search_is_noticed(
    small: SmallPair, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slrmerge.cli.progress import TerminalProgress

    weights = small.folder / side / "model.safetensors"

    def replace(self: TerminalProgress, what: str) -> None:
        if what.startswith("layer 3") and weights.exists():
            harm(weights, "replaced")

    monkeypatch.setattr(TerminalProgress, "on_stage", replace)
    assert refusal("search", small.recipe_file(), "--out", small.out, "--threads", 1) == (9, ["source-changed"])
    assert not small.out.exists()


@in_a_hurry
def test_a_complete_search_whose_folder_must_not_be_replaced_is_kept(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slrmerge.cli.progress import TerminalProgress

    def occupy(self: TerminalProgress, what: str) -> None:
        if what == "writing the results":
            small.out.mkdir()
            (small.out / "notes.txt").touch()

    search = ("search", small.recipe_file(), "--out", small.out, "--threads", 1)
    with monkeypatch.context() as patch:
        patch.setattr(TerminalProgress, "on_status", occupy)
        assert refusal(*search) == (6, ["output-exists"])
    (small.out / "notes.txt").unlink()
    again = run(*search)
    assert again.exit_code == 0
    assert "resuming: this pass is complete" in again.stderr


@in_a_hurry
def test_an_interrupted_search_without_resume_keeps_nothing(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    from slrmerge.cli.progress import TerminalProgress

    def press(self: TerminalProgress, what: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TerminalProgress, "on_stage", press)
    result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1, "--no-resume", "--quiet")
    assert (result.exit_code, result.output) == (130, "\ninterrupted: nothing was written\n")
    assert not small.out.exists()
    assert leftovers(small.out) == []


# progress


def test_a_terminal_shows_layers_states_and_the_time_left(small: SmallPair) -> None:
    code = f"import sys; from slrmerge.cli import main; {HURRY}; main(sys.argv[1:])"
    arguments = ["search", str(small.recipe_file()), "--out", str(small.out), "--threads", "1"]
    command = [sys.executable, "-c", code, *arguments]
    exit_code, summary, seen = at_a_terminal(command, columns=120, OMP_NUM_THREADS="1", TQDM_MININTERVAL="0")
    text = seen.decode()
    assert exit_code == 0
    for layer in range(1, LAYERS + 1):
        assert f"scoring candidates, layer {layer} of {LAYERS}: " in text
    assert re.search(r"scoring candidates: 100%\|.+\| (\d+)/\1 \[00:\d\d<00:00\]", text)
    assert b"\x1b" not in summary
    assert summary.decode().split()[:3] == ["hybrid", "layers", "Q"]


def test_a_terminal_says_what_is_loaded_before_it_is_loaded(tmp_path: Path) -> None:
    code = """import sys
from slrmerge.cli import main
from slrmerge.cli.progress import TerminalProgress
shown = TerminalProgress.on_status
def on_status(self, text):
    shown(self, text)
    print(text, "torch" in sys.modules, "pydantic" in sys.modules)
TerminalProgress.on_status = on_status
main(sys.argv[1:])"""
    commands = "search x.yaml --out out", "diff x.yaml", "select x", "plan x.yaml", "inspect x", "init x y"
    for command in map(str.split, commands):
        exit_code, printed, seen = at_a_terminal([sys.executable, "-c", code, *command], columns=100)
        assert exit_code != 0
        status, *loaded = printed.decode().splitlines()[0].rsplit(" ", 2)
        assert loaded == ["False", "False"]
        assert f"{status} ...".encode() in seen
        assert b"error:" in seen


@in_a_hurry
def test_a_terminal_shows_a_finished_search_as_complete_where_layers_are_the_same(small: SmallPair) -> None:
    weights = {side: load_file(small.folder / side / "model.safetensors") for side in ("pre", "post")}
    same = {name: tensor for name, tensor in weights["post"].items() if "layers.1." in name or "embed" in name}
    save_file({**weights["pre"], **same}, small.folder / "pre" / "model.safetensors")
    seen = on_a_terminal("search", small.recipe_file(), "--out", small.out, "--threads", 1, columns=120)
    last = [line for line in seen.split("\r") if "%|" in line][-1]
    assert re.search(r"held-out prompts: 100%\|.+\| (\d+)/\1 ", last)


@in_a_hurry
def test_without_a_terminal_there_is_no_bar(small: SmallPair) -> None:
    result = run("search", small.recipe_file(), "--out", small.out, "--threads", 1)
    assert "\r" not in result.output
    assert "%|" not in result.output
