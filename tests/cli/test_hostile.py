"""Names and texts from others, streams that are closed or full, and bytes that are not UTF-8."""

import ast
import errno
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any
from weakref import ReferenceType, ref

import pytest

from slrmerge.cli import group
from slrmerge.cli.options import PATH
from slrmerge.cli.progress import TerminalProgress
from slrmerge.errors import SlrmergeError
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint
from tests.cli import ROOT, at_a_terminal, refusal, run
from tests.conftest import Pair
from tests.merging.faults import leftovers

BAD = "x\x1b[31m\x07\x9b\u202e\u2066\ud800\n# y"
"""Colours, a bell, C1, directions, a lone surrogate, a new line."""

BAD_NAME = BAD.replace("\ud800", "\udce9")  # the byte 0xE9, which a file's name may have


def assert_printable(*texts: str) -> None:
    for text in texts:
        assert text.replace("\n", "").isprintable(), ascii(text)
        assert "\n# y" not in text


@pytest.fixture
def hostile(tmp_path: Path) -> Pair:
    """A pair in a folder, with config keys, tensors and files that have hostile names."""
    folder = tmp_path / BAD_NAME
    more = llama_tensors("more")["lm_head.weight"]
    pre, post = (llama_tensors(side) | {"odd](x)|<b>`": more} for side in ("pre", "post"))
    for side, tensors in (("pre", pre), ("post", post)):
        text = BAD.replace("\ud800", "")  # which JSON that is read strictly does not have
        config = llama_config() | {text: side, "architectures": [text]}
        write_checkpoint(folder / side, tensors, config, side_files={f"LICENSE{BAD_NAME}": "free"})
    (folder / "post" / f"{BAD_NAME}.py").touch()
    return Pair(folder, pre, post)


def with_bad_tensor(folder: Path) -> Path:
    tensors = llama_tensors("pre")
    return write_checkpoint(folder, tensors | {BAD.replace("\ud800", ""): tensors["lm_head.weight"]})


COMMANDS: dict[str, Callable[[Pair], list[object]]] = {
    "merge": lambda pair: [pair.recipe_file(restore=[2, 3]), "--out", pair.out],
    "plan": lambda pair: ["plan", pair.recipe_file(restore=[2, 3])],
    "inspect": lambda pair: ["inspect", pair.folder / "post"],
    "inspect --tensors": lambda pair: ["inspect", pair.folder / "post", "--tensors"],
    "inspect of a tensor": lambda pair: ["inspect", with_bad_tensor(pair.folder / "bad")],
    "diff": lambda pair: ["diff", pair.recipe_file()],
    "export": lambda pair: ["export", pair.recipe_file(restore=[2, 3])],
    "missing recipe": lambda pair: ["plan", pair.folder / "missing.yaml"],
    "recipe with unknown keys": lambda pair: ["plan", pair.recipe_file("recipe.yaml", **{BAD: 1})],
    "recipe with a path": lambda pair: ["plan", pair.recipe_file(pretrained=f"./{BAD_NAME}", alpha=0.5)],
    "recipe with a pattern": lambda pair: ["plan", pair.recipe_file(tensors=[{"match": BAD, "alpha": 1}])],
    "recipe with a choice": lambda pair: ["plan", pair.recipe_file(blend=BAD, alpha=0.5)],
    "verify": lambda pair: ["verify", pair.folder / "post"],
    "select": lambda pair: ["select", pair.folder / "post"],
    "search": lambda pair: ["search", pair.recipe_file(), "--out", pair.out],
    "push": lambda pair: ["push", pair.folder, BAD_NAME],
    "usage": lambda pair: ["verify", pair.folder, pair.folder],
    "mistyped command": lambda pair: ["plna\x1b[31m"],
    "eval": lambda pair: [
        "eval", "open-qa", "--data", pair.folder / "q.json", "--model", f"{BAD_NAME}@http://h:0", "--out", pair.out,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_what_others_wrote_is_printed_escaped(hostile: Pair, name: str, more: list[str]) -> None:
    result = run(*COMMANDS[name](hostile), *([] if name == "export" else more))
    assert_printable(result.stdout, result.stderr)
    assert result.stdout + result.stderr


def test_a_hostile_merge_is_verified_and_merged_again(hostile: Pair) -> None:
    out = hostile.folder.parent / "out"
    result = run(hostile.recipe_file(restore=[2, 3]), "--out", out)
    assert result.exit_code == 0, result.stderr
    assert run("verify", out).exit_code == 0
    assert run(out / "slrmerge.yaml", "--out", out.with_name("again")).exit_code == 0
    (out / f"LICENSE{BAD_NAME}").unlink()
    result = run("verify", out)
    assert result.exit_code == 10
    assert_printable(result.stderr)


def test_progress_is_printed_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalProgress(quiet=False) as progress:
        progress.message(f"{BAD} http://user:sekret@host")
    printed = capsys.readouterr().err
    assert_printable(printed)
    assert "sekret" not in printed


def test_a_progress_bar_and_warnings_of_libraries_are_printed_escaped() -> None:
    code = f"""
import sys, warnings
from slrmerge.cli.output import open_streams
from slrmerge.cli.progress import TerminalProgress
open_streams()
with TerminalProgress(quiet=False) as progress:
    progress.start({BAD!r}, 10)
    progress.stage({BAD!r})
    progress.advance(10)
warnings.warn({BAD!r})
"""
    exit_code, _, seen = at_a_terminal([sys.executable, "-c", code], columns=100)
    assert exit_code == 0
    assert b"100%" in seen
    assert b"UserWarning" in seen
    assert not set(seen) & set(b"\x07\x1b\x9b")
    assert "\u202e".encode() not in seen


def test_only_one_module_prints() -> None:
    for path in (ROOT / "slrmerge").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("echo", "secho", "stdout", "stderr"):
                reads_stderr = path.name in (
                    "progress.py",
                    "push.py",
                    "cluster.py",
                )  # terminals; Ray
                assert path.parts[-2:] == ("cli", "output.py") or (reads_stderr and node.attr == "stderr"), path


# paths


@pytest.mark.parametrize("command", ["merge", "plan", "search", "diff", "eval"])
def test_an_empty_output_folder_is_refused(pair: Pair, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pair.folder)
    words = ["open-qa", "--data", "q", "--model", "m"] if command == "eval" else [pair.recipe_file(restore=[2, 3])]
    result = run(command, *words, "--out", "")
    assert (result.exit_code, result.stdout) == (2, "")
    assert {path.name for path in pair.folder.iterdir()} <= {"pre", "post", "recipe.yaml"}


@pytest.mark.parametrize("length", [238, 255, 256])
@pytest.mark.parametrize("command", ["merge", "plan"])
def test_a_name_that_is_too_long_is_refused_before_anything_is_written(pair: Pair, command: str, length: int) -> None:
    out = pair.folder / ("x" * length)
    assert refusal(command, pair.recipe_file(restore=[2, 3]), "--out", out) == (6, ["invalid-output"])
    assert leftovers(out.with_name("x")) == []


def test_the_longest_name_is_written(pair: Pair) -> None:
    assert run(pair.recipe_file(restore=[2, 3]), "--out", pair.folder / ("x" * 237)).exit_code == 0


def test_an_unreadable_recipe_is_a_bad_recipe(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not PATH.readable  # click's own check would be a matter of usage
    recipe = pair.recipe_file(restore=[2, 3])

    def refuse(path: object, *_: object) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    assert refusal("plan", recipe) == (3, ["recipe-unreadable"])


@pytest.mark.parametrize("code", [0xD800, 0xDCE9])
def test_a_lone_surrogate_in_a_config_is_refused_before_anything_is_written(pair: Pair, code: int) -> None:
    value = chr(code)
    config = pair.folder / "post" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "x": value, value: 1}))
    assert refusal(pair.recipe_file(restore=[2, 3]), "--out", pair.out) == (4, ["invalid-json"])
    assert not pair.out.exists()


def test_json_stays_json_with_a_space_that_does_not_print(pair: Pair) -> None:
    folder = (pair.folder / "post").rename(pair.folder / "no\u00a0break")
    assert json.loads(run("inspect", folder, "--json").stdout)["checkpoint"].endswith("no\u00a0break")


@pytest.mark.skipif(os.name == "nt", reason="Windows does not delete a folder that is in use")
@pytest.mark.parametrize("command", ["merge", "plan", "diff", "search"])
def test_a_current_folder_that_was_deleted_is_an_error(
    hostile: Pair, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, gone = COMMANDS[command](hostile), hostile.folder.parent / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert refusal(*arguments) == (6, ["no-current-folder"])


# streams


def shell(redirection: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run slrmerge in bash with a redirection; its exit code is that of the first command of a pipe."""
    words = shlex.join([sys.executable, "-m", "slrmerge", *map(os.fspath, map(str, arguments))])
    command = ["bash", "-c", f"{words} {redirection}; exit ${{PIPESTATUS[0]}}"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-"])
def test_messages_that_cannot_be_printed_change_nothing(pair: Pair, redirection: str) -> None:
    done = shell(redirection, pair.recipe_file(restore=[2, 3]), "--out", pair.out)
    assert (done.returncode, done.stderr) == (0, "")
    assert run("verify", pair.out).exit_code == 0
    assert shell(redirection, "verify", pair.folder / "post").returncode == 10
    assert shell(redirection, "plna").returncode == 2


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_result_that_cannot_be_printed_is_an_error_after_the_work(
    pair: Pair, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    done = shell(">/dev/full", pair.recipe_file(restore=[2, 3]), "--out", pair.out)
    assert done.returncode == 6
    assert done.stderr.startswith("error: stdout: ")
    assert done.stderr.count("\n") == 1
    assert run("verify", pair.out).exit_code == 0
    assert shell(">/dev/full", "--help").returncode == 6
    refused = shell(">/dev/full", "verify", pair.folder / "post", "--json")
    assert refused.returncode == 10
    assert refused.stderr.startswith(f"error: {pair.folder}")


@pytest.mark.parametrize("arguments", [["inspect", "examples/tiny/pretrained", "--tensors"], ["--help"], ["schema"]])
def test_a_reader_that_left_is_no_error_to_report(arguments: list[str]) -> None:
    done = shell("| (exec <&-; sleep 0.1)", *arguments)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_file_that_is_written_gets_no_descriptor_of_a_stream() -> None:
    code = "import os; from slrmerge.cli.output import open_streams; open_streams(); assert os.dup(0) > 2"
    done = subprocess.run(["bash", "-c", shlex.join([sys.executable, "-c", code]) + " <&- >&- 2>&-"], cwd=ROOT)
    assert done.returncode == 0


# Ctrl-C


def test_ctrl_c_while_the_command_line_is_imported_prints_no_traceback() -> None:
    code = """
import sys
class Interrupted:
    def find_spec(self, name, *_):
        if name == "click":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
import slrmerge.cli
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize("moment", ["parse_args", "invoke"])
def test_ctrl_c_before_a_command_begins_is_an_interrupt(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(*_: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("slrmerge.cli.group.Command." + moment, press)
    result = run("schema")
    assert (result.exit_code, result.output) == (130, "\ninterrupted: nothing was written\n")


# threads


@pytest.mark.parametrize("command", ["merge", "soup", "verify", "diff", "search", "select", "eval"])
def test_a_system_that_starts_no_thread_is_an_error(pair: Pair, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, questions = pair.recipe_file(alpha=0.5), pair.folder / "questions.json"
    questions.write_text('{"Name a state.": ["Ohio"]}')
    commands: dict[str, list[object]] = {
        "merge": [pair.recipe_file("restore.yaml", restore=[2, 3]), "--out", pair.out],
        "soup": [recipe, "--out", pair.out],
        "verify": ["verify", pair.out],
        "diff": ["diff", recipe],
        "search": ["search", recipe, "--out", pair.out],
        "select": ["select", pair.out],
        "eval": ["eval", "open-qa", "--data", questions, "--model", "x=http://localhost:1/v1", "--out", pair.out],
    }
    if command == "verify":
        assert run(*commands["soup"]).exit_code == 0

    def refuse(_: Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Thread, "start", refuse)
    assert refusal(*commands[command]) == (18, ["no-more-threads"])
    assert leftovers(pair.out) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), (18, ["no-more-memory"])),
        (ImportError("libtorch.so: failed to map segment", name="torch"), (13, ["import-failed"])),
        (OSError(errno.EMFILE, "Too many open files", "transformers"), (6, ["io-error"])),
        (OSError(errno.ENOSPC, "No space left on device"), (7, ["no-space"])),
    ],
)
def test_what_the_system_refuses_to_a_library_is_an_error(
    pair: Pair, error: Exception, expected: tuple[int, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise error

    monkeypatch.setattr("slrmerge.merging.plan.planner.plan", fail)
    assert refusal("plan", pair.recipe_file(restore=[2, 3])) == expected


def test_memory_that_ran_out_is_free_again_when_the_error_is_printed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[ReferenceType[Thread]] = []

    def fail(*_: object, **__: object) -> Any:
        large = Thread()
        held.append(ref(large))
        raise MemoryError

    def describe(error: Any) -> SlrmergeError:
        assert [each() for each in held] == [None]
        return system_error(error)

    system_error = group._system_error
    monkeypatch.setattr(group, "_system_error", describe)
    monkeypatch.setattr("slrmerge.merging.plan.planner.plan", fail)
    assert refusal("plan", pair.recipe_file(restore=[2, 3])) == (18, ["no-more-memory"])
