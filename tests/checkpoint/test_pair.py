"""Two checkpoints and what they are together."""

import pickle
from pathlib import Path

import pytest

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.layers import LayerStack
from slrmerge.checkpoint.opening import open_pair
from slrmerge.checkpoint.pair import ModelPair, require_layers, require_same_depth
from slrmerge.checkpoint.safetensors import open_folder
from slrmerge.errors import PlanError
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
