"""Side files are a checkpoint's own regular files: links that lead elsewhere, and what is not a file, are refused."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from slrmerge import merge
from slrmerge.checkpoint.files import LocalFile, open_within
from slrmerge.checkpoint.safetensors import open_folder
from slrmerge.checkpoint.side_files import local_side_files
from slrmerge.errors import CheckpointError, SourceChangedError
from slrmerge.merging.executor import execute
from tests.checkpoints import llama_tensors, write_checkpoint
from tests.conftest import Pair
from tests.merging.faults import leftovers
from tests.problems import refused

pytestmark = pytest.mark.skipif("os.name == 'nt'")

Make = Callable[[Path], object]

NAMES = ["NOTICE", "LICENSE.key", "README.md", "vocab.txt", "modeling_x.py", "chat_templates/x.jinja", "tokenizer.json"]
READ_FIRST = ["config.json", "model.safetensors.index.json"]
SHARD = "model-00001-of-00002.safetensors"


def replaced(folder: Path, name: str) -> Path:
    """The path of a file that is no longer there."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    return path


def secret(folder: Path) -> Path:
    (folder / "id_rsa").write_text("{}")
    return folder / "id_rsa"


def elsewhere(folder: Path) -> Path:
    """Another checkpoint in the Hub's cache, with a file."""
    blob = folder / "models--org--other" / "blobs" / "1234"
    blob.parent.mkdir(parents=True)
    blob.write_text("{}")
    return blob


OUTSIDE: dict[str, Callable[[Path], Path | str]] = {
    "a file beside the checkpoint": secret,
    "the same by a relative path": lambda folder: f"../{secret(folder).name}",
    "through a folder": lambda folder: f"../post/../{secret(folder).name}",
    "through another link": lambda folder: chained(folder),
    "another repository in the cache": elsewhere,
    "the environment": lambda _: "/proc/self/environ",
    "a device": lambda _: "/dev/zero",
    "a hidden file of the folder": lambda folder: hidden(folder),
}


def chained(folder: Path) -> str:
    (folder / "post" / "hop").symlink_to(secret(folder))
    return "hop"


def hidden(folder: Path) -> Path:
    path = folder / "post" / ".git" / "config"
    path.parent.mkdir()
    path.write_text("{}")
    return path


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", [*NAMES, *READ_FIRST])
@pytest.mark.parametrize("case", OUTSIDE)
def test_a_link_that_leads_out_of_the_checkpoint_is_refused_before_anything_is_written(
    pair: Pair, case: str, name: str
) -> None:
    path = replaced(pair.folder / "post", name)
    target = OUTSIDE[case](pair.folder)
    if isinstance(target, str) and "/" in name and not target.startswith("/"):
        target = f"../{target}"
    path.symlink_to(target)
    with refused(CheckpointError, "link-outside") as caught:
        merge(pair.recipe(restore=[2, 3]), pair.out, allow_code=True)
    assert caught.value.problems[0].where == str(path)
    assert (pair.out.exists(), leftovers(pair.out)) == (False, [])


def test_a_folder_of_templates_outside_the_checkpoint_is_refused(pair: Pair) -> None:
    (pair.folder / "private").mkdir()
    (pair.folder / "private" / "x.jinja").write_text("mine")
    (pair.folder / "post" / "chat_templates").symlink_to(pair.folder / "private")
    with refused(CheckpointError, "link-outside"):
        pair.open()


def test_links_within_the_checkpoint_are_followed(pair: Pair) -> None:
    post = pair.folder / "post"
    (post / "texts").mkdir()
    (post / "texts" / "licence").write_text("free")
    (post / "LICENSE").symlink_to("texts/licence")
    (post / "chat_templates").symlink_to("texts")
    (post / "texts" / "x.jinja").symlink_to(post / "LICENSE")
    (pair.folder / "link").symlink_to(post)
    merge(pair.recipe(posttrained="./link", restore=[2, 3]), pair.out)
    assert (pair.out / "LICENSE").read_text() == (pair.out / "chat_templates" / "x.jinja").read_text() == "free"
    assert not (pair.out / "LICENSE").is_symlink()


def test_weights_may_be_links_to_regular_files_anywhere(pair: Pair) -> None:
    (pair.folder / "post" / SHARD).rename(pair.folder / "big")
    (pair.folder / "post" / SHARD).symlink_to("../big")
    assert len(pair.open().posttrained) == len(pair.post)


# the Hub's cache, as its client lays it out

XET = "ab" + 62 * "0"


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A snapshot in the Hub's cache, whose tokenizer is a blob in the store that repositories share."""
    repository, store = tmp_path / "hub" / "models--org--name", tmp_path / "hub" / "blobs"
    folder = write_checkpoint(repository / "snapshots" / ("0" * 40), llama_tensors(0), side_files={})
    for path in (repository / "blobs", store / "ab"):
        path.mkdir(parents=True)
    (store / ".huggingface-shared-blobs").write_text("1\n")
    (store / "ab" / XET).write_text("tokens")
    (store / "ab" / f"{XET}.refs").write_text("models--org--name/blobs/1234\n")
    (repository / "blobs" / "1234").symlink_to(f"../../blobs/ab/{XET}")
    (repository / "blobs" / "5678").write_text("free")
    (folder / "tokenizer.json").symlink_to("../../blobs/1234")
    (folder / "LICENSE").symlink_to("../../blobs/5678")
    return folder


def test_a_snapshot_in_the_hubs_cache_has_the_blobs_of_its_repository(snapshot: Path) -> None:
    files = open_folder(snapshot).side_files
    assert {name: file.fetch().read_text() for name, file in files.items() if name != "config.json"} == {
        "tokenizer.json": "tokens",
        "LICENSE": "free",
    }


@pytest.mark.parametrize("refs", ["", "models--org--other/blobs/1234\n", "../models--org--name/blobs/1\n", "\xff\n"])
def test_a_shared_blob_of_another_repository_is_refused(snapshot: Path, refs: str) -> None:
    blob = snapshot.parents[2] / "blobs" / "ab" / f"{XET}.refs"
    blob.write_bytes(refs.encode("latin-1"))
    with refused(CheckpointError, "link-outside"):
        open_folder(snapshot)


def test_a_shared_blob_without_a_record_is_refused(snapshot: Path) -> None:
    (snapshot.parents[2] / "blobs" / "ab" / f"{XET}.refs").unlink()
    with refused(CheckpointError, "link-outside"):
        open_folder(snapshot)


def test_a_link_to_another_file_of_the_hubs_cache_is_refused(snapshot: Path) -> None:
    (snapshot / "NOTICE").symlink_to("../../../blobs/.huggingface-shared-blobs")
    with refused(CheckpointError, "link-outside"):
        open_folder(snapshot)


def test_blobs_that_are_a_link_are_not_the_repositorys(snapshot: Path, tmp_path: Path) -> None:
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(tmp_path / "home")
    blobs.symlink_to(tmp_path / "home")
    (snapshot / "tokenizer.json").unlink()
    with refused(CheckpointError, "link-outside"):
        open_folder(snapshot)


# files that are there and are not files


def a_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the paths of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


NOT_FILES: dict[str, tuple[Make, str]] = {
    "a broken link": (lambda path: path.symlink_to("missing"), "broken-link"),
    "a FIFO": (os.mkfifo, "not-a-file"),
    "a folder": (Path.mkdir, "not-a-file"),
    "a socket": (a_socket, "not-a-file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "unreadable"),
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "README.md", "chat_templates/x.jinja", "config.json"])
@pytest.mark.parametrize("case", NOT_FILES)
def test_a_side_file_that_is_not_a_file_is_refused_not_left_out(pair: Pair, case: str, name: str) -> None:
    make, code = NOT_FILES[case]
    make(replaced(pair.folder / "post", name))
    with refused(CheckpointError, code):
        merge(pair.recipe(restore=[2, 3]), pair.out)
    assert not pair.out.exists()


def test_templates_that_are_not_in_a_folder_are_refused(pair: Pair) -> None:
    (pair.folder / "post" / "chat_templates").symlink_to("missing")
    with refused(CheckpointError, "not-a-folder"):
        pair.open()


def add_module(folder: Path, name: str = "1_Pooling") -> Path:
    (folder / "modules.json").write_text(json.dumps([{"path": name, "type": "x.Pooling"}]))
    return folder / name


@pytest.mark.parametrize("kind", ["link to a folder", "link to a folder of the checkpoint", "file", "FIFO"])
def test_a_module_that_is_not_a_folder_is_refused(pair: Pair, kind: str) -> None:
    module = add_module(pair.folder / "post")
    if kind == "file":
        module.touch()
    elif kind == "FIFO":
        os.mkfifo(module)
    else:
        (inner := (pair.folder if kind == "link to a folder" else pair.folder / "post") / "other").mkdir()
        module.symlink_to(inner)
    with refused(CheckpointError, "not-a-folder"):
        pair.open()


def test_a_module_below_a_link_is_refused(pair: Pair) -> None:
    add_module(pair.folder / "post", "a/1_Pooling")
    (pair.folder / "other" / "1_Pooling").mkdir(parents=True)
    (pair.folder / "post" / "a").symlink_to(pair.folder / "other")
    with refused(CheckpointError, "not-a-folder"):
        pair.open()


def test_a_link_to_a_folder_inside_a_module_is_refused(pair: Pair) -> None:
    (module := add_module(pair.folder / "post")).mkdir()
    (module / "up").symlink_to("..")
    with refused(CheckpointError, "not-a-file"):
        pair.open()


@pytest.mark.parametrize("depth", [20, 21])
def test_a_module_may_have_folders_in_folders_up_to_a_depth(pair: Pair, depth: int) -> None:
    deep = add_module(pair.folder / "post").joinpath(*"a" * depth)
    deep.mkdir(parents=True)
    (deep / "config.json").touch()
    if depth == 20:
        assert (deep / "config.json").relative_to(pair.folder / "post").as_posix() in local_side_files(
            pair.folder / "post"
        )
    else:
        with refused(CheckpointError, "nested-too-deeply"):
            pair.open()


def test_all_problems_of_side_files_are_reported_together(pair: Pair) -> None:
    post = pair.folder / "post"
    (post / "NOTICE").symlink_to("missing")
    (post / "vocab.txt").symlink_to(secret(pair.folder))
    with refused(CheckpointError, "broken-link", "link-outside"):
        pair.open()


def test_other_folders_and_other_links_are_left_alone(pair: Pair) -> None:
    post = pair.folder / "post"
    for name in ("LICENSES", "onnx"):
        (post / name).mkdir()
    (post / "optimizer.pt").symlink_to(secret(pair.folder))
    assert local_side_files(post).keys() == {"config.json", "tokenizer.json"}


# what was checked is what is read


def test_a_file_replaced_by_a_link_after_planning_is_not_read(pair: Pair) -> None:
    plan = pair.plan(restore=[2, 3])
    path = replaced(pair.folder / "post", "tokenizer.json")
    path.symlink_to(secret(pair.folder))
    with refused(SourceChangedError, "source-changed"):
        execute(plan, pair.out)
    assert (pair.out.exists(), leftovers(pair.out)) == (False, [])


@pytest.mark.skipif("os.open not in os.supports_dir_fd")
@pytest.mark.parametrize("part", ["texts", "texts/licence"])
def test_what_is_exchanged_between_check_and_open_is_not_followed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    post = pair.folder / "post"
    (post / "texts").mkdir()
    (post / "texts" / "licence").write_text("free")
    (post / "LICENSE").symlink_to("texts/licence")
    (pair.folder / "private").mkdir()
    (pair.folder / "private" / "licence").write_text("mine")
    lstat = Path.lstat

    def exchange(path: Path) -> os.stat_result:
        """What the last check sees, before someone exchanges a folder or the file."""
        status = lstat(path)
        monkeypatch.undo()
        (post / part).rename(pair.folder / "before")
        (post / part).symlink_to(pair.folder / "private" / part.partition("/")[2])
        return status

    monkeypatch.setattr(Path, "lstat", exchange)
    with pytest.raises(OSError):
        open_within(post, "LICENSE")


def test_a_checked_file_is_recognized(pair: Pair) -> None:
    file = LocalFile.within(pair.folder / "post", "tokenizer.json")
    assert file == LocalFile.at(pair.folder / "post" / "tokenizer.json")
