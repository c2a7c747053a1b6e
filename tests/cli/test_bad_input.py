"""Whatever the command line is given, it ends in words and an exit code, never in a traceback."""

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
from tests.cli import run
from tests.conftest import Pair


def bad_recipe(**content: Any) -> Callable[[Pair], list[object]]:
    return lambda pair: [pair.recipe_file(**content), "--out", pair.out]


def bad_text(text: bytes) -> Callable[[Pair], list[object]]:
    def arguments(pair: Pair) -> list[object]:
        (pair.folder / "bad.yaml").write_bytes(text)
        return [pair.folder / "bad.yaml", "--out", pair.out]

    return arguments


def bad_config(config: object, command: str = "inspect") -> Callable[[Pair], list[object]]:
    def arguments(pair: Pair) -> list[object]:
        (pair.folder / "post" / "config.json").write_text(json.dumps(config))
        return [command, pair.folder / "post"]

    return arguments


def an_empty_side(pair: Pair) -> list[object]:
    pair.out.mkdir()
    return ["inspect", pair.out]


BAD: dict[str, tuple[Callable[[Pair], list[object]], int]] = {
    "no words": (lambda pair: [], 2),
    "an empty word": (lambda pair: [""], 3),
    "an unknown option": (lambda pair: ["x.yaml", "--fast"], 2),
    "no threads": (lambda pair: [pair.recipe_file(alpha=0.5), "--threads", 0], 2),
    "no folder to verify": (lambda pair: ["verify"], 2),
    "a folder for a recipe": (lambda pair: [pair.folder, "--out", pair.out], 3),
    "a recipe with a long name": (lambda pair: ["x" * 300 + ".yaml", "--out", pair.out], 3),
    "an empty recipe": (bad_text(b""), 3),
    "a binary recipe": (bad_text(bytes(range(256))), 3),
    "a recipe of NULs": (bad_text(bytes(10)), 3),
    "a list of recipes": (bad_text(b"- a\n- b\n"), 3),
    "a deep recipe": (bad_text(b"[" * 1000), 3),
    "an unhashable key": (bad_text(b"? [a, b]\n: c\n"), 3),
    "a tag": (bad_text(b"!!python/object/apply:os.system [ls]\n"), 3),
    "a date for a key": (bad_text(b"2020-99-99: x\n"), 3),
    "an impossible date": (bad_text(b"restore: 2020-99-99\n"), 3),
    "an endless number": (bad_text(b"alpha: " + b"9" * 5000 + b"\n"), 3),
    "an unknown key": (bad_recipe(restor=[2, 3]), 3),
    "a bad size": (lambda pair: [pair.recipe_file(alpha=0.5), "--out", pair.out, "--max-shard-size", "big"], 3),
    "a bad dtype": (lambda pair: [pair.recipe_file(alpha=0.5), "--out", pair.out, "--dtype", "int8"], 2),
    "one Hub repo for both sides": (bad_recipe(pretrained="org/model", posttrained="org/model", alpha=0.5), 3),
    "a download of some other kind": (lambda pair: [pair.recipe_file(alpha=0.5), "--download", "all"], 2),
    "a missing side": (bad_recipe(pretrained="./nowhere", alpha=0.5), 4),
    "a missing side above": (bad_recipe(pretrained="../nowhere", alpha=0.5), 4),
    "a side with a long name": (bad_recipe(pretrained="x" * 300, alpha=0.5), 4),
    "a side with a NUL": (bad_recipe(pretrained="pre\0", alpha=0.5), 4),
    "a stranger's home": (bad_recipe(pretrained="~nobody-at-all/pre", alpha=0.5), 4),
    "a file for a side": (bad_recipe(pretrained="./pre/config.json", alpha=0.5), 4),
    "an empty side": (an_empty_side, 4),
    "nothing to inspect": (lambda pair: ["inspect", pair.out], 4),
    "more layers than weights": (bad_config(llama_config(layers=60)), 4),
    "a config that is a list": (bad_config([]), 4),
    "architectures that are numbers": (bad_config({"architectures": [1, None]}), 0),
    "architectures that are a text": (bad_config({"architectures": "Llama"}), 0),
    "layers below zero": (bad_config({"num_hidden_layers": -1}), 0),
    "layers in words": (bad_config({"num_hidden_layers": "six"}), 0),
    "a layer past the last": (bad_recipe(restore=[2, 6]), 5),
    "a rule for nothing": (bad_recipe(tensors=[{"match": "nothing.*", "alpha": 1}]), 5),
    "a file for an output": (lambda pair: [f := pair.recipe_file(alpha=0.5), "--out", f], 6),
    "an output below a file": (lambda pair: [f := pair.recipe_file(alpha=0.5), "--out", f / "x"], 6),
    "nothing to verify": (lambda pair: ["verify", pair.out], 10),
    "a file to verify": (lambda pair: ["verify", pair.recipe_file(alpha=0.5)], 10),
    "a long name to verify": (lambda pair: ["verify", "x" * 300], 10),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_bad_input_ends_in_words_and_an_exit_code(pair: Pair, case: str, more: list[str]) -> None:
    arguments, exit_code = BAD[case]
    result = run(*arguments(pair), *more)
    assert result.exit_code == exit_code
    assert "\x1b" not in result.output
    if exit_code > 2:
        assert result.stderr.startswith("error: ")
        assert not more or json.loads(result.stdout)["problems"]
        assert more or result.stdout == ""
    assert not pair.out.exists() or not any(pair.out.iterdir())


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
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_hub_repo_without_a_network_gets_the_command_that_fetches_it(
    pair: Pair, arguments: Callable[[Pair], list[object]], repository: str, command: str, more: list[str]
) -> None:
    body = "import sys; from slrmerge.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", body, *map(str, [*arguments(pair), *more])],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(pair.folder / "nothing")},
    )
    what = "is not whole in the Hub's cache, and HF_HUB_OFFLINE is set"
    remedy = f"fetch it where there is a network: {command}"
    assert done.returncode == 14
    assert done.stderr == f"error: the Hub did not give what was asked\n  {repository}: {what}; {remedy}\n"
    if more:
        assert json.loads(done.stdout) == {
            "error": "HubError",
            "summary": "the Hub did not give what was asked",
            "problems": [{"where": repository, "what": what, "remedy": remedy}],
            "notes": [],
        }
    else:
        assert done.stdout == ""
    assert not pair.out.exists()


def test_names_with_brackets_are_shown_as_they_are(tmp_path: Path) -> None:
    tensors = llama_tensors("x") | {"odd[/bold].:smile:": llama_tensors("x")["lm_head.weight"]}
    folder = write_checkpoint(tmp_path / "model[bold]", tensors)
    for options in ([], ["--tensors"]):
        result = run("inspect", folder, *options)
        assert (result.exit_code, result.stderr) == (0, "")
        assert "odd[/bold].:smile:" in result.stdout
    recipe = tmp_path / "recipe.yaml"
    other = write_checkpoint(tmp_path / "other", tensors)
    recipe.write_text(yaml.safe_dump({"pretrained": str(folder), "posttrained": str(other), "restore": [0, 1]}))
    assert run("plan", recipe).stdout.count(str(folder)) == 1
