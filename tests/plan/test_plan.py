"""The plan as a value: pure, comparable, and known before a byte of weights is read."""

import json
import os
from pathlib import Path

import pytest

from slrmerge.errors import PlanError
from slrmerge.hub import open_pair
from slrmerge.plan import plan_merge
from tests.checkpoints import llama_config, llama_tensors, random_tensor, safetensors_bytes, write_checkpoint
from tests.conftest import Pair
from tests.plan import plan_of, write_pair


def test_planning_reads_no_weights(pair: Pair) -> None:
    recipe = pair.recipe(alpha=0.5, restore=[1, 2], dtype="float32")
    expected = pair.plan(alpha=0.5, restore=[1, 2], dtype="float32")
    opened = open_pair(*recipe.sources())
    weights = list(pair.folder.glob("*/*.safetensors"))
    assert len(weights) == 3
    for path in weights:
        path.unlink()
    plan = plan_merge(recipe, opened)
    assert plan.to_dict() == expected.to_dict()
    assert plan.fingerprint() == expected.fingerprint()


def test_planning_changes_nothing_on_disk(pair: Pair) -> None:
    recipe = pair.recipe(restore=[1, 2])
    before = {path: path.stat().st_mtime_ns for path in pair.folder.rglob("*")}
    plan_merge(recipe, open_pair(*recipe.sources())).to_dict()
    assert {path: path.stat().st_mtime_ns for path in pair.folder.rglob("*")} == before


def test_the_same_inputs_give_equal_plans(pair: Pair) -> None:
    one, two = pair.plan(restore=[1, 2], alpha=0.3), pair.plan(restore=[1, 2], alpha=0.3)
    assert one == two
    assert one.fingerprint() == two.fingerprint()


@pytest.mark.parametrize(
    "other", [{"restore": [1, 3]}, {"alpha": 0.1}, {"dtype": "float16"}, {"max_shard_size": "1KB"}], ids=str
)
def test_another_recipe_gives_another_plan_and_fingerprint(pair: Pair, other: dict[str, object]) -> None:
    one, two = pair.plan(restore=[1, 2]), pair.plan(**{"restore": [1, 2], **other})
    assert one != two
    assert one.fingerprint() != two.fingerprint()


@pytest.mark.parametrize("file", ["pre/model.safetensors", "post/model-00002-of-00002.safetensors"])
def test_the_fingerprint_changes_with_a_source_files_time(pair: Pair, file: str) -> None:
    before = pair.plan(restore=[1, 2]).fingerprint()
    status = (pair.folder / file).stat()
    os.utime(pair.folder / file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert pair.plan(restore=[1, 2]).fingerprint() != before


def test_the_fingerprint_changes_with_a_source_files_size(pair: Pair) -> None:
    path = pair.folder / "pre/model.safetensors"
    before, status = pair.plan(restore=[1, 2]).fingerprint(), path.stat()
    path.write_bytes(safetensors_bytes(pair.pre, {"format": "pt", "more": "text"}))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    assert pair.plan(restore=[1, 2]).fingerprint() != before


def test_the_fingerprint_changes_with_a_file_put_in_anothers_place(pair: Pair) -> None:
    path = pair.folder / "pre/model.safetensors"
    before, status = pair.plan(restore=[1, 2]).fingerprint(), path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.replace(path)
    assert pair.plan(restore=[1, 2]).fingerprint() != before


def test_a_plan_can_be_printed_as_json(pair: Pair) -> None:
    plan = pair.plan(restore=[1, 2])
    content = json.loads(json.dumps(plan.to_dict()))
    assert content["recipe"] == {"pretrained": "./pre", "posttrained": "./post", "restore": [[1, 2]]}
    assert content["tensors"]["model.layers.1.mlp.up_proj.weight"] == {
        "file": "model.safetensors",
        "dtype": "BF16",
        "shape": [16, 8],
        "alpha": 1.0,
        "kind": "copy",
        "pretrained": "model.layers.1.mlp.up_proj.weight",
        "posttrained": None,
    }
    assert content["tensors"].keys() == pair.post.keys()
    assert content["output_bytes"] == sum(content["shards"].values()) + sum(content["files"].values())


def test_a_restoration_reads_one_side_a_tensor_and_a_soup_both(pair: Pair) -> None:
    total = sum(len(tensor.data) for tensor in pair.post.values())
    assert (pair.plan(restore=[1, 2]).read_bytes, pair.plan(restore=[1, 2]).needs_arithmetic) == (total, False)
    assert (pair.plan(alpha=0.5).read_bytes, pair.plan(alpha=0.5).needs_arithmetic) == (2 * total, True)
    cast = pair.plan(restore=[1, 2], dtype="float32")
    assert (cast.read_bytes, cast.needs_arithmetic) == (total, True)


def test_configs_that_differ_are_noted_but_for_what_means_nothing(tmp_path: Path) -> None:
    write_pair(
        tmp_path,
        llama_tensors("pre"),
        llama_tensors("post"),
        pre_config=llama_config(
            eos_token_id=1, rope_theta=5, dtype="float32", transformers_version="4", use_cache=True
        ),
        post_config=llama_config(eos_token_id=2, max_position_embeddings=9, _name_or_path="x", rope_theta=5),
    )
    assert plan_of(tmp_path, restore=[1, 2]).notes == (
        "the configs differ, the post-trained one counts: eos_token_id, max_position_embeddings",
    )


def test_everything_that_does_not_fit_comes_in_one_go_and_names_the_recipe_file(tmp_path: Path) -> None:
    pre, post = llama_tensors("pre"), llama_tensors("post")
    pre["model.norm.weight"] = random_tensor("BF16", (9,), "pre")
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "post", post)
    pair = Pair(tmp_path, pre, post)
    with pytest.raises(PlanError) as caught:
        pair.plan(restore=[[0, 1], [4, 6]], alpha=1, layers=[{"range": [0, 9], "alpha": 1}])
    where = tmp_path / "recipe.yaml"
    assert str(caught.value).splitlines()[:2] == [
        f"{where}: $.restore[1]: 6 is past the last layer (5); use 0–5",
        f"{where}: $.layers[0].range: 9 is past the last layer (5); use 0–5",
    ]
    assert "model.norm.weight: has shape [9] pre-trained and [8] post-trained; " in str(caught.value)


def test_models_of_different_depth_are_two_models(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "pre", llama_tensors("pre", layers=8), llama_config(layers=8))
    write_checkpoint(tmp_path / "post", llama_tensors("post", layers=6))
    with pytest.raises(PlanError) as caught:
        plan_of(tmp_path, restore=[1, 2])
    said = "8 layers pre-trained and 6 post-trained: these are two models; name the model it was trained from"
    assert str(caught.value) == f"{tmp_path}/pre: {said}"
