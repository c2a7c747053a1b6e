"""A checkpoint opens from whatever names it, and a pair with the problems of both sides."""

from pathlib import Path
from typing import Any

import pytest

from slrmerge.checkpoint.location import Repository
from slrmerge.checkpoint.opening import open_checkpoint, open_pair
from slrmerge.checkpoint.safetensors import open_folder
from slrmerge.errors import CheckpointError, HubError, OptionError
from tests.checkpoints import llama_tensors, write_checkpoint
from tests.problems import refused

PRE, POST = llama_tensors("pre"), llama_tensors("post")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return write_checkpoint(tmp_path / "pre", PRE), write_checkpoint(tmp_path / "post", POST, shards=3)


def test_a_checkpoint_opens_from_a_string_a_path_or_itself(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Named:
        def __fspath__(self) -> str:
            return str(folders[0])

    expected = open_folder(folders[0])
    assert [open_checkpoint(source) for source in (folders[0], str(folders[0]), Named())] == [expected] * 3
    assert open_checkpoint(expected) is expected
    monkeypatch.chdir(folders[0].parent)
    relative = open_checkpoint("pre")
    assert (relative.folder, relative.reference) == (Path("pre"), expected.reference)


@pytest.mark.parametrize("value", [None, 3, ["pre"], b"pre"])
def test_a_value_that_names_no_checkpoint_is_refused(value: Any, folders: tuple[Path, Path]) -> None:
    for open_it in (lambda: open_checkpoint(value), lambda: open_pair(folders[0], value)):
        with refused(OptionError, "wrong-type"):
            open_it()


def test_a_repository_that_is_not_cached_is_refused_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for source in ("org/name@main", Repository("org/name", "main")):
        with refused(HubError, "not-cached") as caught:
            open_checkpoint(source, local_files_only=True)
        assert caught.value.problems[0].where == "org/name@main"


def test_the_problems_of_both_sides_are_reported_at_once(folders: tuple[Path, Path]) -> None:
    pre, post = folders
    gone = sorted(post.glob("*.safetensors"))
    for shard in gone:
        shard.unlink()
    with refused(CheckpointError, "no-checkpoint", "shard-missing") as caught:
        open_pair(pre.parent / "missing", post)
    assert [problem.where for problem in caught.value.problems] == [str(pre.parent / "missing"), *map(str, gone)]


def test_a_checkpoint_is_not_paired_with_itself(folders: tuple[Path, Path]) -> None:
    pre = folders[0]
    (pre.parent / "link").symlink_to(pre)
    for other in (pre, str(pre), pre.parent / "link", open_folder(pre)):
        with refused(CheckpointError, "same-checkpoint"):
            open_pair(pre, other)
