"""The commands as people type them: what goes to stdout and stderr, exit codes, --json, --quiet, and no tracebacks."""

import io
import itertools
import json
import os
import re
import subprocess
import sys
from typing import Any

import click
import pytest

from slrmerge import _version, errors, execute
from slrmerge.cli import main
from slrmerge.cli.group import as_typed, fail
from slrmerge.cli.progress import TerminalProgress
from slrmerge.evaluation.options import EvaluationOptions
from slrmerge.evaluation.tasks import TASKS as EVALUATION_TASKS
from slrmerge.io.options import options_of
from slrmerge.merging.options import MergeOptions
from slrmerge.recipe.model import generate_schema
from slrmerge.searching.options import SearchOptions
from slrmerge.searching.proxy_tasks import TASKS as PROXY_TASKS
from slrmerge.searching.spaces import SPACES
from tests.cli import at_a_terminal, refusal, run
from tests.conftest import Pair
from tests.merging.faults import snapshot

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


@pytest.mark.parametrize("word", ["plna", "verfy", "inspekt", "zzz", "x" * 300])
def test_a_mistyped_command_is_not_taken_for_a_recipe(word: str) -> None:
    result = run(word, "x")
    assert (result.exit_code, result.stdout) == (2, "")


@pytest.mark.parametrize("word", ["missing.yaml", "./plna", "recipes/missing"])
def test_a_word_that_looks_like_a_file_is_a_recipe(word: str) -> None:
    assert refusal(word, "--out", "out") == (3, ["recipe-unreadable"])


def test_an_existing_file_of_any_name_is_a_recipe(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.recipe_file("plna", restore=[2, 3])
    monkeypatch.chdir(pair.folder)
    assert run("plna", "--out", "hybrid").exit_code == 0


# help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_in_its_help(command: str) -> None:
    result = run(command, "--help")
    assert f"\n  slrmerge {command.replace('merge', 'recipe.yaml')} " in result.stdout
    assert (result.exit_code, result.stderr) == (0, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command: str) -> None:
    options = [parameter for parameter in main.commands[command].params if isinstance(parameter, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_the_help_lists_every_exit_code() -> None:
    epilog = run("--help").stdout.partition("Exit codes:")[2].split()
    codes = {str(error.exit_code) for error in ERRORS} | {"0", "2", "130", "141"}
    assert {word for word in epilog if word.isdecimal()} == codes


def test_the_version_is_the_packages() -> None:
    assert run("--version").stdout == f"slrmerge, version {_version.__version__}\n"


# options


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("merge", MergeOptions),
        ("plan", MergeOptions),
        ("search", SearchOptions),
        ("eval", EvaluationOptions),
    ],
)
def test_every_field_of_an_option_class_is_an_option_of_its_command(command: str, kind: type) -> None:
    offered = {each.name: each for each in main.commands[command].params if isinstance(each, click.Option)}
    for name, known in options_of(kind).items():
        if known.flag == "":
            assert name not in offered
            continue
        option, default = offered[name], kind.__dataclass_fields__[name].default
        assert option.help == known.help
        assert (option.to_info_dict()["default"] or None) == (default or None), name
        assert default is not None or option.show_default == (known.default_help or True)
        if known.choices and not known.or_file:
            assert isinstance(option.type, click.Choice)
            assert tuple(option.type.choices) == known.choices
        elif {known.minimum, known.maximum, known.above} != {None}:
            assert isinstance(option.type, click.IntRange | click.FloatRange)
            lowest = known.minimum if known.above is None else known.above
            assert (option.type.min, option.type.max) == (lowest, known.maximum)
            assert option.type.min_open == (known.above is not None)


def test_select_has_the_minimum_quality_of_a_search() -> None:
    def option(command: str) -> dict[str, object]:
        found = next(each for each in main.commands[command].params if each.name == "min_quality")
        return found.to_info_dict()

    assert option("select") == option("search")


@pytest.mark.parametrize(
    ("command", "parameter", "registry"),
    [("search", "spaces", SPACES), ("eval", "task", EVALUATION_TASKS)],
)
def test_a_command_offers_everything_that_is_registered(command: str, parameter: str, registry: dict[str, Any]) -> None:
    (offered,) = (each.type for each in main.commands[command].params if each.name == parameter)
    assert isinstance(offered, click.Choice)
    assert list(offered.choices) == list(registry)


def test_search_names_every_proxy_task() -> None:
    (help_text,) = (
        each.help for each in main.commands["search"].params if isinstance(each, click.Option) and each.name == "task"
    )
    assert help_text is not None
    assert [name for name in PROXY_TASKS if name not in help_text] == []


# errors


@pytest.mark.parametrize(
    ("command", "message", "typed"),
    [
        ("merge", "pass overwrite=True", "pass --overwrite"),
        ("merge", 'use download="full", or wait', "use --download full, or wait"),
        ("search", "pass resume=False", "pass --no-resume"),
        ("search", "pass quick=False", "pass quick=False"),
        ("search", 'pass color="red"', 'pass color="red"'),
        ("merge", "a == b, dtype=bfloat16", "a == b, dtype=bfloat16"),
    ],
)
def test_messages_name_options_as_the_command_takes_them(command: str, message: str, typed: str) -> None:
    with click.Context(main.commands[command]):
        assert as_typed(message) == typed


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("as_json", [False, True])
def test_each_error_leaves_with_its_own_exit_code(
    capsys: pytest.CaptureFixture[str], error: type[errors.SlrmergeError], as_json: bool
) -> None:
    raised = error(
        errors.Problem("is-wrong", "here", "is wrong", "correct it"), errors.Problem("too", "there", "is too")
    )
    raised.add_note("2 of 3 shards are kept")
    with pytest.raises(SystemExit) as left:
        fail(raised, as_json=as_json)
    assert left.value.code == error.exit_code
    printed = capsys.readouterr()
    assert printed.err == "error: here: is wrong; correct it\nerror: there: is too\nnote: 2 of 3 shards are kept\n"
    if as_json:
        assert json.loads(printed.out) == {
            "error": error.__name__,
            "exit_code": error.exit_code,
            "problems": [
                {"code": "is-wrong", "where": "here", "what": "is wrong", "remedy": "correct it"},
                {"code": "too", "where": "there", "what": "is too", "remedy": ""},
            ],
            "notes": ["2 of 3 shards are kept"],
        }
    else:
        assert printed.out == ""


# output


@pytest.fixture
def hybrid(pair: Pair) -> Pair:
    execute(pair.plan(restore=[2, 3]), pair.out, options=MergeOptions(fsync=False))
    return pair


def test_merge_prints_its_result_as_json(pair: Pair) -> None:
    (pair.folder / "post" / "code.py").touch()
    result = run(pair.recipe_file(restore=[2, 3], max_shard_size="2KB"), "--out", pair.out, "--json")
    value, written = json.loads(result.stdout), snapshot(pair.out) or {}
    assert {name: file["bytes"] for name, file in value.pop("files").items()} == {n: len(written[n]) for n in written}
    assert value.pop("elapsed_s") >= 0
    assert len(value.pop("notes")) == 1
    assert value == {
        "out": str(pair.out),
        "output_bytes": sum(map(len, written.values())),
        "resumed_pieces": 0,
    }
    assert (result.exit_code, result.stderr) == (0, "")


def test_download_makes_no_difference_for_folders(pair: Pair) -> None:
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
    assert value["shards"].keys() == {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    assert (value["resharded"], value["unchanged_shards"]) == ("", [])
    assert value["read_bytes"] == sum(value["shards"].values())
    assert (value["download_bytes"], value["full_download_bytes"]) == (0, 0)  # both sides are folders
    assert (value["pretrained"], value["posttrained"]) == (str(pair.folder / "pre"), str(pair.folder / "post"))
    assert value.get("out") == (str(pair.out) if out else None)
    assert value["free_bytes"] > 0


@pytest.mark.parametrize("full", [[], ["--full"]])
def test_verify_prints_its_report_as_json(hybrid: Pair, full: list[str]) -> None:
    value = json.loads(run("verify", hybrid.out, "--json", *full).stdout)
    assert value.pop("checked_bytes") > 5000
    assert value.pop("sources")
    assert value == {
        "folder": str(hybrid.out),
        "files": 8,
        "against_sources": True,
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


def test_schema_prints_the_schema_of_recipes() -> None:
    assert json.loads(run("schema").stdout) == generate_schema()


def test_quiet_prints_nothing(pair: Pair) -> None:
    assert run(pair.recipe_file(restore=[2, 3]), "--out", pair.out, "--quiet").output == ""
    assert run("verify", pair.out, "--quiet").output == ""


def test_a_failed_verification_is_reported_on_stderr_even_when_quiet(hybrid: Pair) -> None:
    (hybrid.out / "config.json").unlink()
    result = run("verify", hybrid.out, "--quiet")
    assert (result.exit_code, result.stdout) == (10, "")
    assert result.stderr.startswith(f"error: {hybrid.out}/config.json: ")
    assert refusal("verify", hybrid.out, "--quiet") == (10, ["file-missing"])


def test_a_restoration_does_not_import_torch(pair: Pair) -> None:
    code = "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    done = script(pair.recipe_file(restore=[2, 3]), "--out", pair.out, "--quiet", code=code)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    done = script("verify", pair.out, "--quiet", code=code)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_terminal_with_ascii_only_is_enough(pair: Pair) -> None:
    done = script("plan", pair.recipe_file(restore=[2, 3]), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")


def test_progress_is_shown_at_a_terminal(pair: Pair) -> None:
    code = "import sys; from slrmerge.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, str(pair.recipe_file(restore=[2, 3])), "--out", str(pair.out)]
    exit_code, summary, seen = at_a_terminal(command, columns=100)
    assert exit_code == 0
    assert b"merging: 100%" in seen
    assert b"B/s" in seen
    assert b"\x1b" not in summary


def test_a_slow_count_has_a_rate_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, clock = io.StringIO(), itertools.count(0, 20)
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    with TerminalProgress(quiet=False) as progress:
        progress.start("post", 640, " samples")
        progress.advance(1)
    assert re.search(r"0\.0\d samples/s\]", screen.getvalue())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that progress sees, in seconds; it stands still."""
    now = [0.0]
    monkeypatch.setattr("slrmerge.cli.progress.monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_what_takes_long_ticks_at_a_terminal(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    progress = TerminalProgress(quiet=False)
    progress.status("loading torch")
    clock[0] = 12
    progress.tick()
    assert screen.getvalue().endswith("\rloading torch ... [00:12]")
    progress.start("merging", 10)
    clock[0] = 15
    progress.tick()
    assert "| 0.00/10.0 [00:03<?" in screen.getvalue()


def test_what_takes_minutes_is_printed_without_a_terminal(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with TerminalProgress(quiet=False) as progress:
        progress.start("scoring", 10, "")
        progress.stage("layer 3 of 10")
        for clock[0] in range(0, 200, 10):
            progress.tick()
    assert capsys.readouterr().err == "scoring, layer 3 of 10 (70 s)\nscoring, layer 3 of 10 (2 min)\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["select", "x", "--min-quality", "90%"], "'90%' is not a valid number."),
        (["diff", "x", "--threads", "two"], "'two' is not a valid whole number."),
        (["search", "x", "--threads", "two"], "'two' is not a valid whole number."),
        (["eval", "open-qa", "--batch", "two"], "'two' is not a valid whole number."),
    ],
)
def test_what_is_no_number_is_called_so(words: list[str], expected: str) -> None:
    assert expected.removesuffix(".") in run(*words).stderr


def test_the_help_of_a_command_with_many_options_lists_them_under_headings() -> None:
    text = run("search", "--help").stdout
    headings = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert headings == ["Output", "Candidates", "Prompts", "Resources", "Options"]
    assert re.findall(r"^  +(?:-\w, )?--([\w-]+)", text.split("\nOptions:\n")[1], re.MULTILINE) == [
        "dry-run", "json", "quiet", "help",
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["push", "diff", "verify"])
def test_the_help_of_a_command_with_few_options_has_one_heading(command: str) -> None:
    text = run(command, "--help").stdout
    assert re.findall(r"^(\w+):$", text, re.MULTILINE) == ["Options"]
