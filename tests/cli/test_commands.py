"""The commands as people type them: what goes to stdout and stderr, exit codes, --json, --quiet, and no tracebacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from slrmerge import errors, execute
from slrmerge.cli import main
from slrmerge.cli.group import fail
from tests.cli import at_a_terminal, run
from tests.conftest import Pair
from tests.merge.faults import snapshot

ERRORS: list[type[errors.SlrmergeError]] = [
    errors.SlrmergeError,
    *errors.SlrmergeError.__subclasses__(),
    errors.NoSpaceError,
]
COMMANDS = sorted(main.commands)


def script(*arguments: object, code: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line in a process of its own, with `code` after it; stdout and stderr as text."""
    body = f"import sys; from slrmerge.cli import main; main(sys.argv[1:], standalone_mode=False); {code}"
    command = [sys.executable, "-c", body, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


# which command


@pytest.mark.parametrize("order", ["recipe first", "options first", "named", "named, options first"])
def test_merge_is_the_default_command_wherever_the_options_stand(pair: Pair, order: str) -> None:
    recipe, options = pair.recipe_file(restore=[2, 3]), ["--out", pair.out, "--threads", 1, "--no-fsync"]
    words = [*options, recipe] if "options first" in order else [recipe, *options]
    result = run(*(["merge"] if "named" in order else []), *words)
    assert (result.exit_code, result.stderr) == (0, "")
    assert (pair.out / "slrmerge.json").exists()


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("plna", "did you mean plan?"),
        ("verfy", "did you mean verify?"),
        ("inspekt", "did you mean inspect?"),
        ("zzz", "a recipe is a .yaml file; see slrmerge --help"),
        ("x" * 300, "a recipe is a .yaml file; see slrmerge --help"),
    ],
)
def test_a_mistyped_command_gets_the_near_one_rather_than_a_missing_file(word: str, hint: str) -> None:
    result = run(word, "x")
    assert result.stderr.splitlines()[-1] == f"Error: no command or recipe {word!r}; {hint}"
    assert (result.exit_code, result.stdout) == (2, "")


@pytest.mark.parametrize("word", ["missing.yaml", "./plna", "recipes/missing"])
def test_what_looks_like_a_file_is_taken_for_one(word: str) -> None:
    result = run(word, "--out", "out")
    assert result.stderr.splitlines() == [
        "error: the recipe is not valid",
        f"  {Path(word)}: cannot be read (No such file or directory); name a recipe file",
    ]
    assert (result.exit_code, result.stdout) == (3, "")


def test_a_recipe_may_have_any_name_that_is_there(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.recipe_file("plna", restore=[2, 3])
    monkeypatch.chdir(pair.folder)
    assert run("plna", "--out", "hybrid").exit_code == 0


def test_merging_needs_a_place_to_write_to(pair: Pair) -> None:
    result = run(pair.recipe_file(restore=[2, 3]))
    assert result.stderr.splitlines()[-1] == "Error: missing option '--out'"
    assert result.exit_code == 2


# help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_in_its_help(command: str) -> None:
    result = run(command, "--help")
    assert f"\n  slrmerge {command.replace('merge', 'recipe.yaml')} " in result.stdout
    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_does(command: str) -> None:
    options = [parameter for parameter in main.commands[command].params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_the_help_lists_every_exit_code() -> None:
    epilog = run("--help").stdout.partition("Exit codes:")[2].split()
    codes = {str(error.exit_code) for error in ERRORS} | {"0", "2", "130"}
    assert {word for word in epilog if word.isdecimal()} == codes


def test_the_version_is_the_packages(pair: Pair) -> None:
    assert run("--version").stdout == "slrmerge, version 0.1.0\n"


# errors


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("as_json", [False, True])
def test_each_error_leaves_with_its_own_exit_code(
    capsys: pytest.CaptureFixture[str], error: type[errors.SlrmergeError], as_json: bool
) -> None:
    raised = error(errors.Problem("here", "is wrong", "mend it"), errors.Problem("there", "is too"))
    raised.add_note("2 of 3 shards are kept")
    with pytest.raises(SystemExit) as left:
        fail(raised, as_json=as_json)
    assert left.value.code == error.exit_code
    printed = capsys.readouterr()
    words = f"error: {error.summary}\n  here: is wrong; mend it\n  there: is too\n  2 of 3 shards are kept\n"
    assert printed.err == words
    if as_json:
        assert json.loads(printed.out) == {
            "error": error.__name__,
            "summary": error.summary,
            "problems": [
                {"where": "here", "what": "is wrong", "remedy": "mend it"},
                {"where": "there", "what": "is too", "remedy": ""},
            ],
            "notes": ["2 of 3 shards are kept"],
        }
    else:
        assert printed.out == ""


# output


@pytest.fixture
def hybrid(pair: Pair) -> Pair:
    execute(pair.plan(restore=[2, 3]), pair.out, fsync=False)
    return pair


def test_merge_prints_its_result_as_json(pair: Pair) -> None:
    (pair.folder / "post" / "code.py").touch()
    result = run(pair.recipe_file(restore=[2, 3], max_shard_size="2KB"), "--out", pair.out, "--json")
    value, written = json.loads(result.stdout), snapshot(pair.out) or {}
    assert {name: file["bytes"] for name, file in value.pop("files").items()} == {n: len(written[n]) for n in written}
    assert value.pop("elapsed_s") >= 0
    assert value == {
        "out": str(pair.out),
        "output_bytes": sum(map(len, written.values())),
        "resumed_pieces": 0,
        "notes": ["code left behind: code.py; --allow-code copies it"],
    }
    assert (result.exit_code, result.stderr) == (0, "")


def test_how_to_download_makes_no_difference_to_folders(pair: Pair) -> None:
    written = []
    for download in ("ranges", "full"):
        result = run(pair.recipe_file(restore=[2, 3]), "--out", pair.out, "--overwrite", "--download", download)
        assert (result.exit_code, result.stderr) == (0, "")
        written.append(snapshot(pair.out))
    assert written[0] == written[1] is not None


@pytest.mark.parametrize("command", [["plan"], ["merge", "--dry-run"]])
@pytest.mark.parametrize("out", [False, True])
def test_plan_prints_every_tensor_as_json(pair: Pair, command: list[str], out: bool) -> None:
    where = ["--out", pair.out] if out else []
    value = json.loads(run(*command, pair.recipe_file(restore=[2, 3]), *where, "--json").stdout)
    assert value["tensors"].keys() == pair.post.keys()
    assert {name for name, entry in value["tensors"].items() if entry["alpha"] == 1} == {
        name for name in pair.post if ".2." in name or ".3." in name
    }
    assert value["shards"].keys() == {"model.safetensors"}
    assert value["read_bytes"] == sum(len(tensor.data) for tensor in pair.post.values())
    assert (value["download_bytes"], value["whole_download_bytes"]) == (0, 0)  # both sides are folders
    assert (value["pretrained"], value["posttrained"]) == (str(pair.folder / "pre"), str(pair.folder / "post"))
    assert (value.get("out"), "free_bytes" in value) == (str(pair.out) if out else None, out)


@pytest.mark.parametrize("full", [[], ["--full"]])
def test_verify_prints_its_report_as_json(hybrid: Pair, full: list[str]) -> None:
    value = json.loads(run("verify", hybrid.out, "--json", *full).stdout)
    assert value.pop("checked_bytes") > 5000
    assert value == {
        "folder": str(hybrid.out),
        "files": 6,
        "against_sources": True,
        "sources": "the weights are equal bit by bit",
        "verified": True,
    }


def test_inspect_prints_headers_as_json(pair: Pair) -> None:
    value = json.loads(run("inspect", pair.folder / "post", "--json").stdout)
    assert value["checkpoint"] == value["folder"] == str(pair.folder / "post")
    assert (value["layers"], value["layer_prefix"], value["architecture"]) == (6, "model.layers", "LlamaForCausalLM")
    assert value["bytes_by_dtype"] == {"BF16": value["total_bytes"]}
    assert value["tensors"]["model.norm.weight"] == {
        "dtype": "BF16",
        "shape": [8],
        "bytes": 16,
        "file": "model-00002-of-00002.safetensors",
    }


def test_schema_prints_json() -> None:
    assert json.loads(run("schema").stdout)["title"] == "slrmerge recipe"


def test_quiet_means_quiet(pair: Pair) -> None:
    assert run(pair.recipe_file(restore=[2, 3]), "--out", pair.out, "--quiet").output == ""
    assert run("verify", pair.out, "--quiet").output == ""


def test_a_failed_verification_is_said_on_stderr_even_when_quiet(hybrid: Pair) -> None:
    (hybrid.out / "config.json").unlink()
    result = run("verify", hybrid.out, "--quiet")
    assert (result.exit_code, result.stdout) == (10, "")
    assert result.stderr == f"error: verification failed\n  {hybrid.out}/config.json: is missing; merge again\n"


def test_a_restoration_does_not_import_torch(pair: Pair) -> None:
    code = "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    done = script(pair.recipe_file(restore=[2, 3]), "--out", pair.out, "--quiet", code=code)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    done = script("verify", pair.out, "--quiet", code=code)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_terminal_that_knows_ascii_only_is_no_reason_to_fail(pair: Pair) -> None:
    done = script("plan", pair.recipe_file(restore=[2, 3]), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_sees_the_progress(pair: Pair) -> None:
    code = "import sys; from slrmerge.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, str(pair.recipe_file(restore=[2, 3])), "--out", str(pair.out)]
    exit_code, summary, seen = at_a_terminal(command, columns=100)
    assert exit_code == 0
    assert b"merging: 100%" in seen
    assert b"B/s" in seen
    assert b"\x1b" not in summary
