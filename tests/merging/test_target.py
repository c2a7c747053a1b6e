"""The output folder of a merge: never a source, never something other than a checkpoint, never without space."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from slrmerge.checkpoint.side_files import MANIFEST_NAME
from slrmerge.errors import NoSpaceError, OutputError
from slrmerge.io import files
from slrmerge.merging.executor import execute, merge, output_folder
from slrmerge.merging.options import MergeOptions
from slrmerge.merging.plan.planner import plan_merge
from tests.checkpoints import read_back
from tests.conftest import Pair
from tests.merging.faults import OLD, Recorder, kept_pieces, leftovers, snapshot, tree, write_files
from tests.problems import refused

OVERWRITE = MergeOptions(overwrite=True)
OLD_WEIGHTS = OLD["model.safetensors"]


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


REFUSED: dict[str, tuple[Callable[[Path], Path], str, list[str]]] = {
    "a source": (lambda folder: folder / "pre", "output-overlaps", ["{out}"]),
    "a source by another path": (
        lambda folder: folder / "pre" / ".." / "post",
        "output-overlaps",
        ["{folder}/post"],
    ),
    "a link to a source": (through_a_link, "output-overlaps", ["{folder}/post"]),
    "inside a source": (lambda folder: folder / "pre" / "hybrid", "output-overlaps", ["{out}"]),
    "around the sources": (lambda folder: folder, "output-overlaps", ["{out}", "{out}"]),
    "around linked weights": (linked, "output-overlaps", ["{out}"]),
    "a file": (a_file, "output-is-a-file", ["{out}"]),
    "below a file": (lambda folder: a_file(folder) / "hybrid", "output-not-writable", ["{folder}/file"]),
    "a folder that is not empty": (
        lambda folder: write_files(folder / "out", {"notes.txt": b"mine"}),
        "output-exists",
        ["{out}"],
    ),
    "an older checkpoint": (lambda folder: write_files(folder / "out", OLD), "output-exists", ["{out}"]),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("check_only", [False, True])
def test_a_target_that_must_not_be_written_is_refused_before_anything_is_written(
    pair: Pair, case: str, check_only: bool
) -> None:
    recipe = pair.recipe(restore=[2, 3])
    make, code, places = REFUSED[case]
    out = make(pair.folder)
    before = tree(pair.folder)
    with refused(OutputError, code) as caught:
        if check_only:
            output_folder(plan_merge(recipe), out, MergeOptions()).check()
        else:
            merge(recipe, out)
    expected = [place.format(out=out, folder=pair.folder) for place in places]
    assert [problem.where for problem in caught.value.problems] == expected
    assert tree(pair.folder) == before


@pytest.mark.parametrize(
    ("out", "code"),
    [
        ("/", "mount-point"),
        ("/dev/null", "output-is-a-file"),
        ("x" * 300, "invalid-output"),
        ("a\0b", "invalid-output"),
    ],
)
def test_a_path_that_cannot_be_a_folder_is_refused(pair: Pair, out: str, code: str) -> None:
    with refused(OutputError, code):
        merge(pair.recipe(restore=[2, 3]), out)


def test_a_link_to_itself_is_refused(pair: Pair) -> None:
    pair.out.symlink_to(pair.out)
    with refused(OutputError, "invalid-output"):
        merge(pair.recipe(restore=[2, 3]), pair.out)
    assert leftovers(pair.out) == []


def test_a_mount_point_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == pair.out)
    with refused(OutputError, "mount-point"):
        execute(pair.plan(restore=[2, 3]), pair.out)


def test_a_parent_without_the_right_to_write_is_refused(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != pair.folder)
    with refused(OutputError, "output-not-writable") as caught:
        execute(pair.plan(restore=[2, 3]), pair.out)
    assert caught.value.problems[0].where == str(pair.folder)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent_is_refused(pair: Pair) -> None:
    recipe = pair.recipe(restore=[2, 3])
    pair.folder.chmod(0o555)
    with refused(OutputError, "output-not-writable"):
        merge(recipe, pair.out)
    pair.folder.chmod(0o755)


@pytest.mark.parametrize("staging", [".hybrid.slrmerge-partial", ".hybrid.slrmerge-old"])
def test_a_source_in_the_place_of_the_staging_folder_is_not_removed(pair: Pair, staging: str) -> None:
    (pair.folder / "pre").rename(pair.folder / staging)
    with refused(OutputError, "output-overlaps"):
        execute(pair.plan(pretrained=f"./{staging}", restore=[2, 3]), pair.out)
    assert len(read_back(pair.folder / staging)) == len(pair.pre)


# what is accepted


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_replaces_an_older_checkpoint_whole(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "exchange", lambda first, second: False)
    plan = pair.plan(restore=[2, 3])
    expected = execute(plan, pair.out).files
    shutil.rmtree(pair.out)
    write_files(pair.out, OLD)
    assert execute(plan, pair.out, options=OVERWRITE).files == expected
    assert (snapshot(pair.out) or {}).keys() == expected.keys()
    assert leftovers(pair.out) == []


def test_overwrite_does_not_replace_a_folder_that_is_not_a_checkpoint(pair: Pair) -> None:
    write_files(pair.out, {"thesis.tex": b"mine"})
    with refused(OutputError, "output-not-replaceable"):
        execute(pair.plan(restore=[2, 3]), pair.out, options=OVERWRITE)
    assert snapshot(pair.out) == {"thesis.tex": b"mine"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_is_replaced(pair: Pair, overwrite: bool) -> None:
    pair.out.mkdir()
    execute(pair.plan(restore=[2, 3]), pair.out, options=MergeOptions(overwrite=overwrite))
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


def test_missing_parents_are_created(pair: Pair) -> None:
    out = pair.folder / "a" / "b" / "hybrid"
    execute(pair.plan(restore=[2, 3]), out)
    assert len(read_back(out)) == len(pair.post)


def test_a_relative_target_counts_from_the_current_folder(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    (pair.folder / "here").mkdir()
    monkeypatch.chdir(pair.folder / "here")
    execute(pair.plan(restore=[2, 3]), Path("hybrid"))
    assert len(read_back(pair.folder / "here" / "hybrid")) == len(pair.post)


@pytest.mark.parametrize("out", ["hybrid", "a/b/hybrid"])
def test_planning_and_checking_write_nothing(pair: Pair, out: str) -> None:
    recipe = pair.recipe(restore=[2, 3])
    before = tree(pair.folder)
    output_folder(plan_merge(recipe), pair.folder / out, MergeOptions()).check()
    assert tree(pair.folder) == before


# space


def test_too_small_a_disk_is_refused_before_the_first_byte(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, recorder = pair.plan(restore=[2, 3]), Recorder()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=plan.output_bytes - 1))
    with refused(NoSpaceError, "no-space") as caught:
        execute(plan, pair.out, progress=recorder)
    assert caught.value.problems[0].where == str(pair.out)
    assert recorder.started == []
    assert not pair.out.exists()
    assert leftovers(pair.out) == []


def test_exactly_enough_space_is_enough(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = pair.plan(restore=[2, 3])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=plan.output_bytes))
    assert execute(plan, pair.out).folder == pair.out


@pytest.mark.parametrize("name", [".git", "checkpoint-5", "original"])
def test_overwrite_does_not_replace_a_folder_that_contains_more_than_a_checkpoint(pair: Pair, name: str) -> None:
    write_files(pair.out, OLD | {f"{name}/file": b"precious"})
    before = tree(pair.out)
    with refused(OutputError, "output-not-replaceable") as caught:
        merge(pair.recipe(restore=[2, 3]), pair.out, overwrite=True)
    assert name in caught.value.problems[0].what
    assert tree(pair.out) == before


MINE = [
    "my_notes.txt",
    "notes",
    "optimizer.pt",
    "training_args.bin",
    "results.csv",
    "my_data.json",
    "config.json.bak",
    "model.safetensors.bak",
    "lora.safetensors",
    ".env",
    "train.py",
    "chat_templates/notes.md",
    ".cache/thesis.tex",
]


@pytest.mark.parametrize("name", MINE)
@pytest.mark.parametrize("is_merge", [False, True])
def test_overwrite_does_not_replace_a_folder_with_other_files(pair: Pair, name: str, is_merge: bool) -> None:
    recipe = pair.recipe(restore=[2, 3])
    if is_merge:
        merge(recipe, pair.out)
    write_files(pair.out, ({} if is_merge else OLD) | {name: b"precious"})
    before = tree(pair.out)
    with refused(OutputError, "output-not-replaceable") as caught:
        merge(recipe, pair.out, overwrite=True)
    assert name in caught.value.problems[0].what
    assert tree(pair.out) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_at_the_target_during_a_merge_is_not_replaced(pair: Pair, overwrite: bool) -> None:
    recipe = pair.recipe(restore=[2, 3])
    if overwrite:
        write_files(pair.out, OLD)
    recorder = Recorder(1, lambda: write_files(pair.out, {"my_notes.txt": b"precious"}))
    with refused(OutputError, "output-not-replaceable" if overwrite else "output-exists") as caught:
        merge(recipe, pair.out, overwrite=overwrite, progress=recorder)
    assert snapshot(pair.out) == (OLD if overwrite else {}) | {"my_notes.txt": b"precious"}
    assert kept_pieces(caught.value) == (2, 2)
    (pair.out / "my_notes.txt").unlink()
    assert merge(recipe, pair.out, overwrite=overwrite).resumed_pieces == 2


@pytest.mark.parametrize("name", ["vocabulary.json", "extra.txt", "modeling_x.py", "chat_templates/tools.jinja"])
def test_overwrite_replaces_every_file_that_a_merge_wrote(pair: Pair, name: str) -> None:
    write_files(pair.folder / "post", {name: b"x", "LICENSE.txt": b"free"})
    recipe = pair.recipe(restore=[2, 3], max_shard_size="2KB")
    merge(recipe, pair.out, allow_code=True)
    merge(pair.recipe(restore=[1, 2]), pair.out, overwrite=True)
    assert (pair.out / name).exists() == (name != "modeling_x.py")


def test_overwrite_replaces_what_checkpoints_have(pair: Pair) -> None:
    names = (
        "generation_config.json tokenizer_config.json special_tokens_map.json vocab.json merges.txt README.md LICENSE"
    )
    names += " model-00001-of-00002.safetensors model.safetensors.index.json pytorch_model-00001-of-00002.bin"
    names += " preprocessor_config.json tokenizer.model modeling_llama.py .gitattributes .cache/huggingface/x.lock"
    write_files(pair.out, OLD | dict.fromkeys(names.split(), b"x"))
    merge(pair.recipe(restore=[2, 3]), pair.out, overwrite=True)
    assert read_back(pair.out).keys() == pair.post.keys()


def test_a_target_that_a_shard_of_a_source_links_into_is_refused(pair: Pair) -> None:
    shard = "model-00001-of-00002.safetensors"
    write_files(pair.out, OLD)
    (pair.folder / "post" / shard).rename(pair.out / shard)
    (pair.folder / "post" / shard).symlink_to(pair.out / shard)
    with refused(OutputError, "output-overlaps"):
        merge(pair.recipe(restore=[2, 3]), pair.out, overwrite=True)


def test_a_replaced_checkpoint_that_cannot_be_removed_is_reported_and_the_merge_is_complete(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(pair.out, OLD)
    rmtree = shutil.rmtree

    def stubborn(path: Path) -> None:
        if (path / "model.safetensors").exists() and (path / "model.safetensors").read_bytes() == OLD_WEIGHTS:
            raise PermissionError(13, "Permission denied", str(path))
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", stubborn)
    recorder = Recorder()
    merge(pair.recipe(restore=[2, 3]), pair.out, overwrite=True, progress=recorder)
    (kept,) = leftovers(pair.out)
    assert [str(pair.folder / kept) in text for text in recorder.said] == [True]
    assert read_back(pair.out).keys() == pair.post.keys()
    assert (pair.out / MANIFEST_NAME).exists()
