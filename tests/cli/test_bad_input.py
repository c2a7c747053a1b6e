"""Bad input of every kind ends in a message and an exit code, never in a traceback."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.checkpoints import llama_config, llama_tensors, write_checkpoint
from tests.cli import codes, run, strict_json
from tests.conftest import Pair
from tests.merging.faults import leftovers

Arguments = Callable[[Pair], list[object]]


def bad_recipe(**content: Any) -> Arguments:
    return lambda pair: [pair.recipe_file(**content), "--out", pair.out]


def bad_text(text: bytes) -> Arguments:
    def arguments(pair: Pair) -> list[object]:
        (pair.folder / "bad.yaml").write_bytes(text)
        return [pair.folder / "bad.yaml", "--out", pair.out]

    return arguments


def bad_config(config: object) -> Arguments:
    def arguments(pair: Pair) -> list[object]:
        (pair.folder / "post" / "config.json").write_text(json.dumps(config))
        return ["inspect", pair.folder / "post"]

    return arguments


def empty_folder(pair: Pair) -> list[object]:
    pair.out.mkdir()
    return ["inspect", pair.out]


def merge(*options: object) -> Arguments:
    return lambda pair: [pair.recipe_file(alpha=0.5), "--out", pair.out, *options]


def search(*options: object) -> Arguments:
    return lambda pair: ["search", pair.recipe_file(), "--out", pair.out, *options]


def evaluate(*options: object) -> Arguments:
    def arguments(pair: Pair) -> list[object]:
        data = pair.folder / "questions.json"
        data.write_text('{"Name a state.": ["Ohio"]}')
        named = () if "--model" in options else ("--model", "org/model@http://localhost:1/v1")
        return ["eval", "open-qa", "--data", data, *named, "--out", pair.out, *options]

    return arguments


USAGE: dict[str, Arguments] = {
    "nothing": lambda pair: [],
    "unknown option": merge("--fast"),
    "mistyped command": lambda pair: ["plna", pair.recipe_file(alpha=0.5)],
    "merge without output folder": lambda pair: [pair.recipe_file(alpha=0.5)],
    "no threads": merge("--threads", 0),
    "unknown dtype": merge("--dtype", "int8"),
    "unknown kind of download": merge("--download", "all"),
    "--private without --push-to-hub": merge("--private"),
    "--revision without --push-to-hub": merge("--revision", "main"),
    "verify without folder": lambda pair: ["verify"],
    "search without recipe": lambda pair: ["search"],
    "search of three folders": lambda pair: ["search", pair.folder, pair.folder, pair.folder, "--dry-run"],
    "search without output folder": lambda pair: ["search", pair.recipe_file()],
    "unknown space": search("--space", "heads"),
    "unknown dtype of a search": search("--dtype", "int8"),
    "quality above 1": search("--min-quality", 2),
    "quality below 0": search("--min-quality", -0.1),
    "quality that is not a number": search("--min-quality", "much"),
    "search without threads": search("--threads", 0),
    "select without folder": lambda pair: ["select"],
    "select with quality above 1": lambda pair: ["select", pair.folder, "--min-quality", 2],
    "diff of nothing": lambda pair: ["diff"],
    "diff of one folder": lambda pair: ["diff", pair.folder / "pre"],
    "diff of three folders": lambda pair: ["diff", pair.folder, pair.folder, pair.folder],
    "eval without model": lambda pair: ["eval", "open-qa", "--data", "x.json", "--out", pair.out],
    "unknown task": lambda pair: ["eval", "poems", "--data", "x.json", "--model", "x", "--out", pair.out],
    "min_p above 1": evaluate("--min-p", 1.5),
    "no timeout": evaluate("--timeout", 0),
    "no samples": evaluate("--samples", 0),
}

BAD: dict[str, tuple[Arguments, int, str]] = {
    "empty word": (lambda pair: ["", "--out", pair.out], 3, "recipe-unreadable"),
    "unknown proxy task": (search("--task", "poems"), 2, "invalid-choice"),
    "folder as recipe": (lambda pair: [pair.folder, "--out", pair.out], 3, "recipe-unreadable"),
    "recipe with a long name": (lambda pair: ["x" * 300 + ".yaml", "--out", pair.out], 3, "recipe-unreadable"),
    "empty recipe": (bad_text(b""), 3, "wrong-type"),
    "binary recipe": (bad_text(bytes(range(256))), 3, "not-utf8"),
    "recipe of NULs": (bad_text(bytes(10)), 3, "invalid-yaml"),
    "list of recipes": (bad_text(b"- a\n- b\n"), 3, "wrong-type"),
    "deep recipe": (bad_text(b"[" * 1000), 3, "invalid-yaml"),
    "unhashable key": (bad_text(b"? [a, b]\n: c\n"), 3, "invalid-yaml"),
    "tag": (bad_text(b"!!python/object/apply:os.system [ls]\n"), 3, "invalid-yaml"),
    "impossible date": (bad_recipe(restore="2020-99-99"), 3, "invalid-interval"),
    "endless number": (bad_text(b"alpha: " + b"9" * 5000 + b"\n"), 3, "invalid-yaml"),
    "unknown key": (bad_recipe(restor=[2, 3]), 3, "unknown-key"),
    "size in words": (merge("--max-shard-size", "big"), 3, "invalid-size"),
    "missing side": (bad_recipe(pretrained="./nowhere", alpha=0.5), 4, "no-checkpoint"),
    "missing side above": (bad_recipe(pretrained="../nowhere", alpha=0.5), 4, "no-checkpoint"),
    "side with a long name": (bad_recipe(pretrained="x" * 300, alpha=0.5), 4, "unreadable"),
    "side with a NUL": (bad_recipe(pretrained="pre\0", alpha=0.5), 4, "no-checkpoint"),
    "home of an unknown user": (bad_recipe(pretrained="~no-such-user/pre", alpha=0.5), 4, "no-checkpoint"),
    "file as side": (bad_recipe(pretrained="./pre/config.json", alpha=0.5), 4, "no-checkpoint"),
    "empty folder": (empty_folder, 4, "no-checkpoint"),
    "inspect of a missing folder": (lambda pair: ["inspect", pair.out], 4, "no-checkpoint"),
    "more layers than weights": (bad_config(llama_config(layers=60)), 4, "layers-missing"),
    "config that is a list": (bad_config([]), 4, "invalid-json"),
    "layer past the last": (bad_recipe(restore=[2, 6]), 5, "layer-out-of-range"),
    "rule that matches nothing": (
        bad_recipe(tensors=[{"match": "nothing.*", "alpha": 1}]),
        5,
        "pattern-matches-nothing",
    ),
    "nothing to merge": (bad_recipe(), 3, "nothing-to-merge"),
    "file as output": (lambda pair: [f := pair.recipe_file(alpha=0.5), "--out", f], 6, "output-is-a-file"),
    "output below a file": (
        lambda pair: [f := pair.recipe_file(alpha=0.5), "--out", f / "x"],
        6,
        "output-not-writable",
    ),
    "push to an invalid name": (merge("--push-to-hub", "no spaces please"), 2, "invalid-repository"),
    "verify of a missing folder": (lambda pair: ["verify", pair.out], 10, "no-manifest"),
    "verify of a folder that is not a merge": (lambda pair: ["verify", pair.folder / "pre"], 10, "no-manifest"),
    "verify of a file": (lambda pair: ["verify", pair.recipe_file(alpha=0.5)], 10, "no-manifest"),
    "verify of a long name": (lambda pair: ["verify", "x" * 300], 10, "no-manifest"),
    "search with a size in words": (search("--max-memory", "lots"), 2, "invalid-size"),
    "search without memory": (search("--max-memory", "0"), 2, "invalid-size"),
    "search with quality nan": (search("--min-quality", "nan"), 2, "out-of-range"),
    "search on an unknown device": (search("--device", "abacus"), 2, "device-unavailable"),
    "search on a missing device": (search("--device", "cuda:7"), 2, "device-unavailable"),
    "search on meta": (search("--device", "meta", "--dry-run"), 2, "device-unavailable"),
    "search with a missing recipe": (
        lambda pair: ["search", pair.folder / "no.yaml", "--out", pair.out],
        3,
        "recipe-unreadable",
    ),
    "dry search with a missing recipe": (
        lambda pair: ["search", pair.folder / "no.yaml", "--dry-run"],
        3,
        "recipe-unreadable",
    ),
    "search and another recipe that is missing": (search("--also", "no.yaml"), 3, "recipe-unreadable"),
    "search of a missing side": (
        lambda pair: ["search", pair.recipe_file(pretrained="./nowhere"), "--out", pair.out],
        4,
        "no-checkpoint",
    ),
    "search of a model without tokenizer": (search(), 12, "no-tokenizer"),
    "select in a missing folder": (lambda pair: ["select", pair.out], 6, "no-results"),
    "select in a folder without results": (lambda pair: ["select", pair.folder / "pre"], 6, "no-results"),
    "select in a file": (lambda pair: ["select", pair.recipe_file()], 6, "no-results"),
    "select in a long name": (lambda pair: ["select", "x" * 300], 6, "no-results"),
    "diff of a missing recipe": (lambda pair: ["diff", pair.folder / "no.yaml"], 3, "recipe-unreadable"),
    "diff of a missing folder": (lambda pair: ["diff", pair.folder / "pre", pair.folder / "no"], 4, "no-checkpoint"),
    "diff of a file": (lambda pair: ["diff", pair.folder / "pre", pair.recipe_file()], 4, "no-checkpoint"),
    "diff with a file as output": (
        lambda pair: ["diff", pair.folder / "pre", pair.folder / "post", "--out", pair.recipe_file()],
        6,
        "io-error",
    ),
    "diff with an output below a file": (
        lambda pair: ["diff", pair.folder / "pre", pair.folder / "post", "--out", pair.recipe_file() / "x"],
        6,
        "io-error",
    ),
    "eval with samples that --verbalized does not divide": (evaluate("--verbalized", 3), 2, "not-a-multiple"),
    "eval of two models with one label": (evaluate("--model", "a=x", "--model", "a=y"), 2, "duplicate-label"),
    "eval of an invalid URL": (evaluate("--model", "a@http://:0"), 2, "invalid-url"),
    "eval with temperature nan": (evaluate("--temperature", "nan"), 2, "out-of-range"),
    "eval on an unknown device": (evaluate("--model", "./post", "--device", "abacus"), 2, "device-unavailable"),
    "eval of missing questions": (evaluate("--data", "missing.json"), 15, "unreadable"),
    "eval of missing models": (evaluate("--model", "./nowhere", "--model", "./neither"), 4, "no-checkpoint"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_ends_with_2(pair: Pair, case: str) -> None:
    words = USAGE[case](pair)
    result, as_json = run(*words), run(*words, "--json")
    assert (result.exit_code, as_json.exit_code) == (2, 2)
    assert (result.stdout, codes(as_json)) == ("", ["usage"])
    assert result.stderr.startswith("Usage: ")
    assert not words or result.stderr.splitlines()[-1].startswith("error: slrmerge")
    assert "\x1b" not in result.stderr
    assert not pair.out.exists()


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_a_message_and_an_exit_code(pair: Pair, case: str) -> None:
    arguments, exit_code, code = BAD[case]
    words = arguments(pair)
    result, as_json = run(*words), run(*words, "--json")
    assert (result.exit_code, as_json.exit_code) == (exit_code, exit_code), result.output
    assert (result.stdout, codes(as_json)) == ("", [code])
    for line in result.stderr.splitlines():
        assert line.startswith("error: ")
    assert "\x1b" not in result.stderr
    assert result.stderr == as_json.stderr
    assert not pair.out.exists() or not any(pair.out.iterdir())
    assert leftovers(pair.out) == []


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": [1, None]},
        {"architectures": "Llama"},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": "six"},
    ],
)
def test_unusual_configs_can_be_inspected(pair: Pair, config: dict[str, Any]) -> None:
    words = bad_config(config)(pair)
    assert (run(*words).exit_code, run(*words, "--json").exit_code) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (search("--max-memory", "lots"), "--max-memory"),
        (search("--min-quality", "nan"), "--min-quality"),
        (search("--device", "abacus"), "--device"),
        (evaluate("--verbalized", 3), "--samples"),
        (evaluate("--model", "a=x", "--model", "a=y"), "--model"),
        (lambda pair: ["push", pair.folder, "no spaces please"], "USER/REPO"),
        (merge("--push-to-hub", "no spaces please"), "--push-to-hub"),
    ],
)
def test_errors_name_options_as_they_are_typed(pair: Pair, arguments: Arguments, where: str) -> None:
    result = run(*arguments(pair), "--json")
    assert [problem["where"] for problem in strict_json(result.stdout)["problems"]] == [where]
    assert result.exit_code == 2


def merge_from_the_hub(pair: Pair) -> list[object]:
    return [pair.recipe_file(pretrained="org/base@v1", posttrained="./post", alpha=0.5), "--out", pair.out]


@pytest.mark.parametrize(
    ("arguments", "repository", "command"),
    [
        (merge_from_the_hub, "org/base@v1", "hf download org/base --revision v1"),
        (lambda pair: ["inspect", "org/chat"], "org/chat", "hf download org/chat"),
        (lambda pair: ["diff", pair.folder / "pre", "org/chat"], "org/chat", "hf download org/chat"),
    ],
    ids=["merge", "inspect", "diff"],
)
def test_a_repository_offline_is_an_error_with_the_command_that_downloads_it(
    pair: Pair, arguments: Arguments, repository: str, command: str
) -> None:
    body = "import sys; from slrmerge.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", body, *map(str, [*arguments(pair), "--json"])],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(pair.folder / "nothing")},
    )
    value = json.loads(done.stdout)
    (problem,) = value["problems"]
    assert (done.returncode, value["error"], value["exit_code"]) == (14, "HubError", 14)
    assert (problem["code"], problem["where"]) == ("not-cached", repository)
    assert problem["remedy"].endswith(command)
    assert not pair.out.exists()


def test_names_with_brackets_are_printed_unchanged(tmp_path: Path) -> None:
    tensors = llama_tensors("x") | {"odd[/bold].:smile:": llama_tensors("x")["lm_head.weight"]}
    folder = write_checkpoint(tmp_path / "model[bold]", tensors)
    for options in ([], ["--tensors"]):
        result = run("inspect", folder, *options)
        assert (result.exit_code, result.stderr) == (0, "")
        assert "odd[/bold].:smile:" in result.stdout
    recipe = tmp_path / "recipe.yaml"
    other = write_checkpoint(tmp_path / "other", llama_tensors("y") | {"odd[/bold].:smile:": tensors["lm_head.weight"]})
    recipe.write_text(yaml.safe_dump({"pretrained": str(folder), "posttrained": str(other), "restore": [0, 1]}))
    assert run("plan", recipe).stdout.count(str(folder)) == 1
