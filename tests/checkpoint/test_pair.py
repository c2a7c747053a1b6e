"""Checkpoints and pairs are opened from whatever names them."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.layers import LayerStack
from slrmerge.checkpoint.location import Repository
from slrmerge.checkpoint.pair import ModelPair, open_checkpoint, open_pair, require_layers, require_same_depth
from slrmerge.checkpoint.safetensors import open_folder
from slrmerge.errors import CheckpointError, HubError, OptionError, PlanError
from slrmerge.io.progress import Progress
from tests.checkpoint import read
from tests.checkpoints import llama_config, llama_tensors, random_tensor, write_checkpoint
from tests.problems import refused

PRE, POST = llama_tensors("pre"), llama_tensors("post")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return write_checkpoint(tmp_path / "pre", PRE), write_checkpoint(tmp_path / "post", POST, shards=3)


@pytest.fixture
def pair(folders: tuple[Path, Path]) -> ModelPair:
    return open_pair(*folders)


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


def test_a_pair_has_its_sides_in_order(pair: ModelPair, folders: tuple[Path, Path]) -> None:
    assert [(side, checkpoint.folder) for side, checkpoint in pair.items()] == [
        ("pretrained", folders[0]),
        ("posttrained", folders[1]),
    ]
    assert pair["pretrained"] is pair.pretrained
    assert pair["posttrained"] is pair.posttrained
    assert pair.stack == require_layers(pair) == LayerStack("model.layers", 6)
    assert not pair.is_remote
    assert pair.download(Progress()) == pair
    assert repr(pair) == f"<ModelPair {folders[0]} → {folders[1]}>"


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


def test_a_pickled_pair_is_equal_and_readable(pair: ModelPair) -> None:
    copy = pickle.loads(pickle.dumps(pair))
    assert copy == pair
    with copy.open() as readers:
        readers.check_unchanged()
        assert {name: read(readers.pretrained, name) for name in PRE} == {name: t.data for name, t in PRE.items()}
        assert {name: read(readers.posttrained, name) for name in POST} == {name: t.data for name, t in POST.items()}
        readers.check_unchanged()
        readers.cancel()


def test_pairs_are_equal_if_both_sides_are(pair: ModelPair, folders: tuple[Path, Path]) -> None:
    assert pair == open_pair(*folders)
    assert pair != open_pair(*reversed(folders))


def test_both_readers_of_a_pair_are_closed(pair: ModelPair) -> None:
    with pytest.raises(KeyboardInterrupt), pair.open() as readers:
        raise KeyboardInterrupt
    for reader in (readers.pretrained, readers.posttrained):
        with pytest.raises(ValueError):
            read(reader, "model.norm.weight")


def with_layers(folder: Path, layers: int) -> Checkpoint:
    return open_folder(write_checkpoint(folder, llama_tensors(folder, layers=layers), llama_config(layers=layers)))


def test_models_of_different_depth_are_a_problem(tmp_path: Path) -> None:
    short, long = (with_layers(tmp_path / str(layers), layers) for layers in (4, 6))
    (problem,) = require_same_depth(ModelPair(short, long))
    assert (problem.code, problem.where) == ("different-depth", str(short))
    assert list(require_same_depth(ModelPair(long, with_layers(tmp_path / "other", 6)))) == []


def test_a_pair_without_identifiable_layers_is_refused(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    flat = open_folder(write_checkpoint(tmp_path / "flat", {"w": random_tensor("F32", (2,), 0)}, {}))
    with refused(PlanError, "no-layers") as caught:
        require_layers(ModelPair(open_folder(folders[0]), flat))
    assert caught.value.problems[0].where == str(flat)
