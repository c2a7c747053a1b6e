"""Models that cannot be searched are refused before anything is written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from slrmerge.checkpoint.opening import open_checkpoint, open_pair
from slrmerge.errors import PlanError, UnsupportedModelError
from slrmerge.searching.run import search
from slrmerge.searching.scorer import LocalScorer
from tests.checkpoints import llama_tensors, write_checkpoint
from tests.gguf_files import write_gguf
from tests.merging.faults import leftovers
from tests.problems import refused
from tests.searching.pairs import SmallPair, hurried, make_model


def without_template(pair: SmallPair) -> None:
    (pair.folder / "post" / "chat_template.jinja").unlink()


def with_experts(pair: SmallPair) -> None:
    path = pair.folder / "post" / "config.json"
    values = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4}
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}))


def without_tokenizer(pair: SmallPair) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (pair.folder / "post" / name).unlink()


@hurried
@pytest.mark.parametrize("spoil", [without_template, with_experts, without_tokenizer])
def test_an_unsupported_model_is_refused_before_anything_is_written(
    small: SmallPair, spoil: Callable[[SmallPair], None]
) -> None:
    spoil(small)
    with pytest.raises(UnsupportedModelError) as caught:
        small.run()
    assert {problem.where for problem in caught.value.problems} == {str(small.folder / "post")}
    assert leftovers(small.out) == []
    assert not small.out.exists()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, llama_tensors(side))
    with refused(UnsupportedModelError, "no-tokenizer") as caught:
        SmallPair(tmp_path).run()
    assert caught.value.problems[0].where == str(tmp_path / "post")


def test_weights_without_decoder_layers_are_refused(tmp_path: Path) -> None:
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, {"w": llama_tensors(side)["lm_head.weight"]}, {"model_type": "llama"})
    assert open_checkpoint(tmp_path / "post").stack is None
    with refused(PlanError, "no-layers"):
        SmallPair(tmp_path).run()


def test_sides_of_different_depth_are_refused(made_pair: Path, tmp_path: Path) -> None:
    shutil.copytree(made_pair / "post", tmp_path / "post")
    make_model(tmp_path / "pre", seed=1, layers=3)
    with refused(PlanError, "different-depth"):
        SmallPair(tmp_path).run()


@hurried
def test_a_model_without_probability_on_valid_answers_is_refused(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = small.search()
    count = len(ready.prepared.candidates), len(ready.prepared.prompts)
    monkeypatch.setattr(LocalScorer, "score", lambda *_: np.full((*count, 26), -np.inf))
    with refused(UnsupportedModelError, "no-valid-answers") as caught:
        ready.run(small.out)
    assert caught.value.problems[0].where == str(small.folder / "post")
    assert not small.out.exists()


@hurried
def test_a_recipe_that_does_not_fit_is_refused_before_anything_is_written(small: SmallPair) -> None:
    with refused(PlanError, "layer-out-of-range"):
        small.search(small.recipe(restore=[1, 9])).run(small.out)
    assert leftovers(small.out) == []


def test_gguf_files_are_not_searched(tmp_path: Path) -> None:
    pair = open_pair(write_gguf(tmp_path / "pre.gguf", "pre"), write_gguf(tmp_path / "post.gguf", "post"))
    with refused(UnsupportedModelError, "gguf") as caught:
        search(pair, tmp_path / "search")
    assert caught.value.problems[0].remedy
    assert not (tmp_path / "search").exists()
