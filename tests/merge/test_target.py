"""Where a merge may go: never over its sources, never over what is not a checkpoint, never without room."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from slrmerge import execute
from slrmerge.errors import NoSpaceError, OutputError
from tests.checkpoints import read_back
from tests.cli import run
from tests.conftest import Pair
from tests.merge.faults import OLD, leftovers, snapshot, tree, write_files

HOLDS = "{out}: holds the source {folder}/"
NOT_EMPTY = "{out}: exists and is not empty; choose another --out, or replace it: --overwrite"
NO_CHECKPOINT = "{out}: is not a checkpoint, so --overwrite leaves it alone; choose another --out"


def linked(folder: Path) -> Path:
    """`pre` with its weights in another folder, as in the Hub's cache; returns that folder."""
    blobs = folder / "blobs"
    blobs.mkdir()
    (folder / "pre" / "model.safetensors").rename(blobs / "1234")
    (folder / "pre" / "model.safetensors").symlink_to(blobs / "1234")
    return blobs


def through_a_link(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "post")
    return folder / "link"


def a_file(folder: Path) -> Path:
    (folder / "file").write_text("mine")
    return folder / "file"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a source": (lambda folder: folder / "pre", "{out}: is one of the sources; choose another --out"),
    "a source by another way": (
        lambda folder: folder / "pre" / ".." / "post",
        "{folder}/post: is one of the sources; choose another --out",
    ),
    "a link to a source": (through_a_link, "{folder}/post: is one of the sources; choose another --out"),
    "inside a source": (
        lambda folder: folder / "pre" / "hybrid",
        "{out}: is inside the source {folder}/pre; choose an --out outside it",
    ),
    "around the sources": (
        lambda folder: folder,
        "\n".join([HOLDS + side + "; choose an --out beside it" for side in ("pre", "post")]),
    ),
    "around linked weights": (linked, "{out}: holds files that {folder}/pre links to; choose another --out"),
    "a file": (a_file, "{out}: is a file; name a folder"),
    "below a file": (
        lambda folder: a_file(folder) / "hybrid",
        "{folder}/file: is not a folder one can write to; choose another --out",
    ),
    "a folder with something in it": (lambda folder: write_files(folder / "out", {"notes.txt": b"mine"}), NOT_EMPTY),
    "an older checkpoint": (lambda folder: write_files(folder / "out", OLD), NOT_EMPTY),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("dry", [False, True])
def test_a_target_that_must_not_be_written_is_refused_before_anything_is(pair: Pair, case: str, dry: bool) -> None:
    recipe = pair.recipe_file(restore=[2, 3])
    make, message = REFUSED[case]
    out = make(pair.folder)
    before = tree(pair.folder)
    result = run(recipe, "--out", out, *(["--dry-run"] if dry else []))
    expected = message.format(out=out, folder=pair.folder).splitlines()
    assert result.stderr.splitlines() == ["error: the output cannot be written", *(f"  {line}" for line in expected)]
    assert (result.exit_code, result.stdout) == (6, "")
    assert tree(pair.folder) == before


@pytest.mark.parametrize("out", ["/", "/dev/null", "x" * 300])
def test_strange_targets_are_refused_in_words(pair: Pair, out: str) -> None:
    result = run(pair.recipe_file(restore=[2, 3]), "--out", out)
    assert result.stderr.startswith("error: the output cannot be written\n")
    assert result.exit_code == 6


def test_a_link_that_leads_nowhere_in_circles_is_refused(pair: Pair) -> None:
    pair.out.symlink_to(pair.out)
    result = run(pair.recipe_file(restore=[2, 3]), "--out", pair.out)
    assert result.stderr.startswith("error: the output cannot be written\n")
    assert result.exit_code == 6
    assert leftovers(pair.out) == []


def test_a_mount_point_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == pair.out)
    with pytest.raises(OutputError) as caught:
        execute(pair.plan(restore=[2, 3]), pair.out)
    assert str(caught.value) == f"{pair.out}: is a mount point, which cannot be swapped; name a folder inside it"


def test_a_parent_without_the_right_to_write_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != pair.folder)
    with pytest.raises(OutputError) as caught:
        execute(pair.plan(restore=[2, 3]), pair.out)
    assert str(caught.value) == f"{pair.folder}: is not a folder one can write to; choose another --out"


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent_is_refused(pair: Pair) -> None:
    recipe = pair.recipe_file(restore=[2, 3])
    pair.folder.chmod(0o555)
    result = run(recipe, "--out", pair.out)
    pair.folder.chmod(0o755)
    assert result.stderr.splitlines()[1:] == [
        f"  {pair.folder}: is not a folder one can write to; choose another --out"
    ]


@pytest.mark.parametrize("staging", [".hybrid.slrmerge-partial", ".hybrid.slrmerge-old"])
def test_a_source_that_stands_where_slrmerge_works_is_not_removed(pair: Pair, staging: str) -> None:
    (pair.folder / "pre").rename(pair.folder / staging)
    with pytest.raises(OutputError):
        execute(pair.plan(pretrained=f"./{staging}", restore=[2, 3]), pair.out)
    assert len(read_back(pair.folder / staging)) == len(pair.pre)


# what is accepted


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_replaces_an_older_checkpoint_whole(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr("slrmerge.files._exchange", lambda first, second: False)
    plan = pair.plan(restore=[2, 3])
    expected = execute(plan, pair.out).files
    shutil.rmtree(pair.out)
    write_files(pair.out, OLD)
    assert execute(plan, pair.out, overwrite=True).files == expected
    assert (snapshot(pair.out) or {}).keys() == expected.keys()
    assert leftovers(pair.out) == []


def test_overwrite_leaves_what_is_not_a_checkpoint_alone(pair: Pair) -> None:
    write_files(pair.out, {"thesis.tex": b"mine"})
    with pytest.raises(OutputError) as caught:
        execute(pair.plan(restore=[2, 3]), pair.out, overwrite=True)
    assert str(caught.value) == NO_CHECKPOINT.format(out=pair.out)
    assert snapshot(pair.out) == {"thesis.tex": b"mine"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_is_as_good_as_none(pair: Pair, overwrite: bool) -> None:
    pair.out.mkdir()
    execute(pair.plan(restore=[2, 3]), pair.out, overwrite=overwrite)
    assert len(read_back(pair.out)) == len(pair.post)


@pytest.mark.parametrize("there", [False, True])
def test_a_link_to_a_folder_stays_a_link(pair: Pair, there: bool) -> None:
    real = pair.folder / "disk" / "real"
    real.mkdir(parents=True)
    if not there:
        real.rmdir()
    pair.out.symlink_to(real)
    result = execute(pair.plan(restore=[2, 3]), pair.out)
    assert pair.out.is_symlink()
    assert result.folder == real
    assert len(read_back(real)) == len(pair.post)
    assert leftovers(real) == leftovers(pair.out) == []


def test_missing_parents_are_made(pair: Pair) -> None:
    out = pair.folder / "a" / "b" / "hybrid"
    execute(pair.plan(restore=[2, 3]), out)
    assert len(read_back(out)) == len(pair.post)


def test_a_relative_target_counts_from_where_one_stands(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    (pair.folder / "here").mkdir()
    monkeypatch.chdir(pair.folder / "here")
    execute(pair.plan(restore=[2, 3]), Path("hybrid"))
    assert len(read_back(pair.folder / "here" / "hybrid")) == len(pair.post)


@pytest.mark.parametrize("command", [["merge", "--dry-run"], ["plan"]])
@pytest.mark.parametrize("out", ["hybrid", "a/b/hybrid", None])
def test_planning_writes_nothing_at_all(pair: Pair, command: list[str], out: str | None) -> None:
    recipe = pair.recipe_file(restore=[2, 3])
    before = tree(pair.folder)
    result = run(*command, recipe, *([] if out is None else ["--out", pair.folder / out]))
    assert (result.exit_code, result.stderr) == (0, "")
    assert tree(pair.folder) == before


# room


def test_too_small_a_disk_is_refused_before_the_first_byte(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, recipe = pair.plan(restore=[2, 3]), pair.recipe_file(restore=[2, 3])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=plan.output_bytes - 1))
    result = run(recipe, "--out", pair.out)
    assert result.stderr.splitlines() == [
        "error: not enough disk space",
        f"  {pair.out}: needs 0.00 GB, the disk has 0.00 GB free; free 0.00 GB, or choose --out on another disk",
    ]
    assert result.exit_code == 7
    assert not pair.out.exists()
    assert leftovers(pair.out) == []
    with pytest.raises(NoSpaceError):
        execute(plan, pair.out)
    assert leftovers(pair.out) == []


def test_exactly_enough_room_is_enough(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = pair.plan(restore=[2, 3])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=plan.output_bytes))
    assert execute(plan, pair.out).folder == pair.out


@pytest.mark.parametrize("name", [".git", "checkpoint-5", "original"])
def test_overwrite_leaves_a_folder_that_holds_more_than_a_checkpoint_alone(pair: Pair, name: str) -> None:
    write_files(pair.out, OLD | {f"{name}/file": b"precious"})
    before = tree(pair.out)
    result = run(pair.recipe_file(restore=[2, 3]), "--out", pair.out, "--overwrite")
    what = f"holds more than a checkpoint ({name}), so --overwrite leaves it alone; choose another --out"
    assert result.stderr.splitlines()[1:] == [f"  {pair.out}: {what}"]
    assert tree(pair.out) == before


def test_a_target_that_a_side_file_of_a_source_links_into_is_refused(pair: Pair) -> None:
    write_files(pair.out, OLD | {"vocab.txt": b"words"})
    (pair.folder / "post" / "vocab.txt").symlink_to(pair.out / "vocab.txt")
    result = run(pair.recipe_file(restore=[2, 3]), "--out", pair.out, "--overwrite")
    what = f"holds files that {pair.folder}/post links to; choose another --out"
    assert result.stderr.splitlines()[1:] == [f"  {pair.out}: {what}"]


def test_a_replaced_checkpoint_that_cannot_be_removed_is_said_and_the_merge_is_complete(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(pair.out, OLD)
    rmtree = shutil.rmtree

    def stubborn(path: Path) -> None:
        if (path / "model.safetensors").exists() and (path / "model.safetensors").read_bytes() == b"old weights":
            raise PermissionError(13, "Permission denied", str(path))
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", stubborn)
    result = run(pair.recipe_file(restore=[2, 3]), "--out", pair.out, "--overwrite")
    assert result.exit_code == 0
    assert "the checkpoint that was replaced is still in" in result.stderr
    assert read_back(pair.out).keys() == pair.post.keys()
