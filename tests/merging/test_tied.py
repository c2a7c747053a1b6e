"""Heads that a config ties to the embedding: whether they are one shows in their values only."""

from pathlib import Path
from typing import Any

import pytest

from slrmerge.errors import CheckpointError
from slrmerge.merging.executor import merge
from tests.checkpoints import Tensor, llama_config, llama_tensors, read_back, write_checkpoint

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def make_pair(
    folder: Path, *, post_head: bool = True, pre_head: bool = True, pre_tied: bool = False, differs: bool = True
) -> Path:
    """A pair whose post-trained config ties head and embedding."""
    for side, has_head, tied in (("pre", pre_head, pre_tied), ("post", post_head, True)):
        tensors: dict[str, Tensor] = llama_tensors(side, tied=not has_head)
        if side == "post" and has_head and not differs:
            tensors[HEAD] = tensors[EMBEDDING]
        write_checkpoint(folder / side, tensors, llama_config(tie_word_embeddings=tied))
    return folder


def merged(folder: Path, **rules: Any) -> dict[str, Tensor]:
    merge({"pretrained": str(folder / "pre"), "posttrained": str(folder / "post"), **rules}, folder / "out")
    return read_back(folder / "out")


@pytest.mark.parametrize("rules", [
    {"alpha": 0.5}, {"alpha": 1}, {"tensors": [{"match": HEAD, "alpha": 1}]},
    {"tensors": [{"match": EMBEDDING, "alpha": 1}]},
])  # fmt: skip
def test_a_head_that_is_not_the_embedding_it_is_tied_to_is_refused(tmp_path: Path, rules: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        merged(make_pair(tmp_path), **rules)
    (problem,) = caught.value.problems
    assert (problem.code, problem.where) == ("tied-but-different", str(tmp_path / "post" / "config.json"))
    assert not (tmp_path / "out").exists()


def test_a_head_that_no_rule_names_may_differ(tmp_path: Path) -> None:
    assert merged(make_pair(tmp_path), restore=[1, 2])[HEAD] == llama_tensors("post")[HEAD]


def test_a_head_that_is_the_embedding_is_blended_as_one(tmp_path: Path) -> None:
    tensors = merged(make_pair(tmp_path, differs=False), alpha=0.5)
    assert tensors[HEAD] == tensors[EMBEDDING]


def test_two_heads_that_are_tied_alike_are_blended_each_by_itself(tmp_path: Path) -> None:
    assert merged(make_pair(tmp_path, pre_tied=True), alpha=1)[HEAD] == llama_tensors("pre")[HEAD]


@pytest.mark.parametrize("sides", [{"pre_head": False, "pre_tied": True}, {"post_head": False}])
def test_a_head_that_one_side_does_not_store_is_not_compared(tmp_path: Path, sides: dict[str, bool]) -> None:
    tensors = merged(make_pair(tmp_path, **sides), alpha=1)
    assert tensors.get(HEAD, tensors[EMBEDDING]) == llama_tensors("pre")[EMBEDDING]
