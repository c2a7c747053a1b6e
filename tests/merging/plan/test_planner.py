"""What a plan refuses or notes about a whole pair: configs, empty tensors, shard sizes, tokenizers, idle rules, NaN."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from slrmerge import merge
from slrmerge.errors import PlanError
from slrmerge.merging.plan.planner import plan as make_plan
from slrmerge.merging.plan.tokenizer import highest_token_id
from tests.checkpoints import Tensor, llama_config, llama_tensors, random_tensor, write_checkpoint
from tests.merging.faults import write_files
from tests.merging.plan import plan_of, write_pair
from tests.problems import refused


def test_a_config_difference_comes_first_with_both_values(tmp_path: Path) -> None:
    configs = {"pre_config": llama_config(rope_theta=5e5), "post_config": llama_config(rope_theta=1e6)}
    write_pair(tmp_path, llama_tensors("pre"), llama_tensors("post"), **configs)
    first = plan_of(tmp_path, restore=[1, 2]).notes[0]
    assert "500000.0" in first
    assert "1000000.0" in first


@pytest.mark.parametrize(("key", "value"), [("num_attention_heads", 4), ("num_key_value_heads", 1), ("head_dim", 2)])
def test_other_heads_in_equal_shapes_are_refused(tmp_path: Path, key: str, value: int) -> None:
    heads = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4}
    configs = {"pre_config": llama_config(**heads | {key: value}), "post_config": llama_config(**heads)}
    write_pair(tmp_path, llama_tensors("pre"), llama_tensors("post"), **configs)
    with refused(PlanError, "different-heads"):
        plan_of(tmp_path, restore=[1, 2])
    assert plan_of(tmp_path, alpha=0).kinds.keys() == {"copy"}


@pytest.mark.parametrize("side", ["pre", "post"])
def test_tensors_that_zero3_left_empty_are_refused_alone(tmp_path: Path, side: str) -> None:
    sides = {each: llama_tensors(each) for each in ("pre", "post")}
    sides[side] |= {name: Tensor("BF16", (0,), b"") for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight")}
    write_pair(tmp_path, sides["pre"], sides["post"])
    with refused(PlanError, "empty-tensor") as caught:
        plan_of(tmp_path, alpha=0.5)
    assert {problem.where for problem in caught.value.problems} == {
        "lm_head.weight",
        "model.layers.1.mlp.up_proj.weight",
    }


@pytest.mark.parametrize(("size", "fits"), [("5B", False), (127, False), (16, False), (256, True), ("5GB", True)])
def test_a_limit_below_most_tensors_is_refused(tmp_path: Path, size: object, fits: bool) -> None:
    write_pair(tmp_path, llama_tensors("pre"), llama_tensors("post"))
    if fits:
        assert plan_of(tmp_path, restore=[1, 2], max_shard_size=size).shards
    else:
        with refused(PlanError, "shard-size-too-small"):
            plan_of(tmp_path, restore=[1, 2], max_shard_size=size)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize("name", ["NOTICE: read me.txt", "c:tokenizer.json", "chat_templates/a\\b.jinja", "LICENSE\\x"])
def test_a_name_that_a_manifest_cannot_have_is_refused_on_the_side_that_it_is_copied_from(
    tmp_path: Path, name: str
) -> None:
    write_pair(tmp_path, llama_tensors("pre"), llama_tensors("post"))
    write_files(tmp_path / "pre", {name: b"{}"})
    assert plan_of(tmp_path, restore=[1, 2]).files
    write_files(tmp_path / "post", {name: b"{}"})
    with refused(PlanError, "invalid-name") as caught:
        plan_of(tmp_path, restore=[1, 2])
    assert caught.value.problems[0].where == name


def tokenizer(tokens: int, added: int | None = None, *, unigram: bool = False) -> str:
    vocabulary = [[f"t{i}", 0.0] for i in range(tokens)] if unigram else {f"t{i}": i for i in range(tokens)}
    extra = [] if added is None else [{"id": added, "content": "<x>"}]
    return json.dumps({"model": {"vocab": vocabulary}, "added_tokens": extra})


@pytest.mark.parametrize(
    ("files", "highest"),
    [
        ({"tokenizer.json": tokenizer(16)}, 15),
        ({"tokenizer.json": tokenizer(16, 20)}, 20),
        ({"tokenizer.json": tokenizer(17, unigram=True)}, 16),
        ({"vocab.json": '{"a": 3}', "added_tokens.json": '{"b": 30}'}, 30),
        ({"tokenizer.json": "{}"}, None),
        ({"tokenizer.json": "not JSON"}, None),
        ({"tokenizer.json": '{"model": [], "added_tokens": [7, {"id": "x"}]}'}, None),
        ({}, None),
    ],
)
def test_a_tokenizer_past_the_rows_of_the_embedding_is_noted(
    tmp_path: Path, files: dict[str, str], highest: int | None
) -> None:
    write_checkpoint(tmp_path / "pre", llama_tensors("pre"), side_files=files)
    write_checkpoint(tmp_path / "post", llama_tensors("post"), side_files={"tokenizer.json": tokenizer(16)})
    recipe = {"pretrained": str(tmp_path / "pre"), "posttrained": str(tmp_path / "post"), "restore": [1, 2]}
    plan = make_plan({**recipe, "tokenizer": "pretrained"})
    assert highest_token_id(plan.pair.pretrained) == highest
    noted = [note for note in plan.notes if "tokenizer" in note]
    assert len(noted) == (highest is not None and highest >= 16)
    assert all(f"{highest}" in note and "16 rows" in note for note in noted)
    assert not [note for note in make_plan(recipe).notes if "tokenizer" in note]


@pytest.mark.parametrize(
    ("rules", "noted"),
    [
        ({"alpha": 0.5}, True),
        ({"tensors": [{"match": "*embed_tokens*", "alpha": 1}]}, True),
        ({"tensors": [{"match": "*embed_tokens*", "alpha": 1}, {"match": "lm_head*", "alpha": 1}]}, True),
        ({"alpha": 1, "tokenizer": "pretrained"}, False),
        ({"restore": [1, 2], "tokenizer": "pretrained"}, True),
        ({"alpha": 0.5, "tokenizer": "pretrained"}, True),
        ({"restore": [1, 2]}, False),
        ({"restore": [1, 2], "tensors": [{"match": "model.norm.weight", "alpha": 0.5}]}, False),
    ],
)
def test_rows_of_other_tokens_are_noted_where_they_are_mixed(
    tmp_path: Path, rules: dict[str, Any], noted: bool
) -> None:
    first, second = tokenizer(16), json.dumps({"model": {"vocab": {f"other{k}": k for k in range(16)}}})
    for name, post, differs in (("other", second, noted), ("same", first, False)):
        folder = tmp_path / name
        write_checkpoint(folder / "pre", llama_tensors("pre"), side_files={"tokenizer.json": first})
        write_checkpoint(folder / "post", llama_tensors("post"), side_files={"tokenizer.json": post})
        made = make_plan({"pretrained": str(folder / "pre"), "posttrained": str(folder / "post"), **rules})
        assert bool([note for note in made.notes if "tokenizers differ" in note]) == differs


@pytest.mark.parametrize(
    ("rules", "idle"),
    [
        ({"alpha": 0}, 1),
        ({"alpha": 1}, 1),
        ({"restore": [1, 2], "layers": [{"range": [0, 5], "alpha": 0.5}]}, ["$.restore"]),
        ({"restore": [1, 2], "tensors": [{"match": "lm_head.*", "alpha": 0}]}, ["$.tensors[0]"]),
        ({"alpha": 0.5, "tensors": [{"match": "*", "alpha": 1}, {"match": "*", "alpha": 0.1}]}, [
            "$.alpha", "$.tensors[0]"
        ]),
        ({"alpha": 0, "restore": [1, 2]}, ["$.alpha"]),
        ({"alpha": 0.5, "restore": [1, 2]}, []),
        ({"restore": [1, 2]}, []),
    ],
)  # fmt: skip
def test_rules_without_effect_are_noted(tmp_path: Path, rules: dict[str, Any], idle: int | list[str]) -> None:
    write_pair(tmp_path, llama_tensors("pre"), llama_tensors("post"))
    notes = plan_of(tmp_path, **rules).notes
    assert len(notes) == idle if isinstance(idle, int) else [note.split()[0] for note in notes] == idle


@pytest.mark.parametrize("blend", ["linear", "slerp"])
def test_nan_in_a_blend_is_named_by_its_tensors_and_nothing_else(tmp_path: Path, blend: str) -> None:
    pre, post = llama_tensors("pre", dtype="F32"), llama_tensors("post", dtype="F32")
    norm, up = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"

    def damaged(tensor: Tensor, value: float) -> Tensor:
        return tensor._replace(data=struct.pack("<f", value) + tensor.data[4:])

    pre |= {up: damaged(pre[up], float("nan")), norm: damaged(pre[norm], float("inf"))}
    post |= {norm: damaged(post[norm], float("-inf")), "lm_head.weight": damaged(post["lm_head.weight"], float("inf"))}
    write_pair(tmp_path, pre, post)
    sides = {"pretrained": str(tmp_path / "pre"), "posttrained": str(tmp_path / "post"), "blend": blend}
    noted = [note for note in merge({**sides, "alpha": 0.5}, tmp_path / "out", fsync=False).notes if "NaN" in note]
    assert len(noted) == 1
    assert norm in noted[0]
    assert up in noted[0]
    assert "embed_tokens" not in noted[0]
    assert not merge({**sides, "restore": [3, 4]}, tmp_path / "fine", fsync=False).notes


def test_duplicate_keys_in_a_config_are_read_as_every_loader_reads_them(tmp_path: Path) -> None:
    write_pair(tmp_path, llama_tensors("pre"), llama_tensors("post"))
    (tmp_path / "post/config.json").write_text('{"num_hidden_layers": 9, "num_hidden_layers": 6}')
    plan = plan_of(tmp_path, restore=[1, 2])
    assert plan.pair.posttrained.config == {"num_hidden_layers": 6}


def test_tensors_of_whole_numbers_may_be_empty(tmp_path: Path) -> None:
    pre, post = (llama_tensors(side) | {"model.g_idx": random_tensor("I32", (0,), side)} for side in ("pre", "post"))
    write_pair(tmp_path, pre, post)
    assert plan_of(tmp_path, restore=[1, 2]).kinds == {"copy": len(post)}


@pytest.mark.parametrize(("rules", "noted"), [({"restore": [1, 1]}, 1), ({"restore": [3, 3]}, 1), ({"alpha": 0.5}, 0)])
@pytest.mark.parametrize(("model_type", "block"), [("zamba", "shared_transf"), ("zamba2", "shared_transformer")])
def test_a_block_that_layers_share_is_noted_where_they_differ(
    tmp_path: Path, model_type: str, block: str, rules: dict[str, Any], noted: int
) -> None:
    for side in ("pre", "post"):
        tensors = llama_tensors(side)
        for layer in (1, 3):
            tensors[f"model.layers.{layer}.mamba_decoder.in_proj.weight"] = random_tensor("BF16", (8, 8), side)
        tensors[f"model.layers.1.{block}.o_proj.weight"] = random_tensor("BF16", (8, 8), side)
        write_checkpoint(tmp_path / side, tensors, llama_config(model_type=model_type))
    notes = make_plan({"pretrained": str(tmp_path / "pre"), "posttrained": str(tmp_path / "post"), **rules}).notes
    assert sum(block in note for note in notes) == noted


@pytest.mark.parametrize(
    ("name", "rules", "noted"),
    [
        ("model.queries.{}", {"restore": [1, 1]}, 1),
        ("model.gates.{}.weight", {"restore": [1, 1]}, 1),
        ("model.queries.{}", {"alpha": 0.5}, 0),
        ("model.vision.queries.{}", {"restore": [1, 1]}, 0),
    ],
)
def test_a_list_with_a_tensor_for_each_layer_is_noted(
    tmp_path: Path, name: str, rules: dict[str, Any], noted: int
) -> None:
    for side in ("pre", "post"):
        lists = {name.format(layer): random_tensor("BF16", (8,), side) for layer in range(6)}
        write_checkpoint(tmp_path / side, llama_tensors(side) | lists, llama_config())
    notes = make_plan({"pretrained": str(tmp_path / "pre"), "posttrained": str(tmp_path / "post"), **rules}).notes
    assert sum("numbered like the layers" in note for note in notes) == noted


@pytest.mark.parametrize(
    ("config", "noted"),
    [
        ({}, 1),
        ({"tie_word_embeddings": False}, 1),
        ({"tie_word_embeddings": True}, 0),
        ({"model_type": "gemma"}, 0),
        ({"model_type": "of-its-own-code"}, 0),
        ({"architectures": ["LlamaModel"]}, 0),
    ],
)
def test_a_head_that_is_neither_stored_nor_tied_is_noted(tmp_path: Path, config: dict[str, Any], noted: int) -> None:
    write_checkpoint(tmp_path / "pre", llama_tensors("pre"), llama_config() | config)
    write_checkpoint(tmp_path / "post", llama_tensors("post", tied=True), llama_config() | config)
    recipe = {"pretrained": str(tmp_path / "pre"), "posttrained": str(tmp_path / "post"), "restore": [1, 2]}
    assert sum("stores no head" in note for note in make_plan(recipe).notes) == noted
