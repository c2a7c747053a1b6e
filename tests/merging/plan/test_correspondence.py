"""Pairs whose names, ties, constants, towers and vocabularies differ: planned right, or refused for the reason."""

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slrmerge.checkpoint.vocabulary import MAX_TOKENIZER_BYTES
from slrmerge.errors import CheckpointError, PlanError
from slrmerge.merging.plan.model import PlannedTensor
from slrmerge.merging.plan.planner import plan as make_plan
from slrmerge.merging.plan.planner import plan_merge
from slrmerge.merging.plan.tensors import plan_tensor_alphas
from tests.checkpoints import Tensor, llama_config, llama_tensors, random_tensor
from tests.merging.plan import plan_of, write_pair
from tests.problems import refused
from tests.streams import tensor_bytes

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYERS = range(6)


def tensors(seed: str, *names: str, dtype: str = "BF16", shape: tuple[int, ...] = (2, 3)) -> dict[str, Tensor]:
    return {name: random_tensor(dtype, shape, f"{seed}/{name}") for name in names}


def in_layers(*inner: str) -> list[str]:
    return [f"model.layers.{k}.{name}" for k in LAYERS for name in inner]


def planned(folder: Path, **content: Any) -> dict[str, PlannedTensor]:
    return {tensor.name: tensor for tensor in plan_of(folder, **content).tensors()}


def refusals(folder: Path, *codes: str, **content: Any) -> list[str]:
    with refused(PlanError, *codes) as caught:
        plan_of(folder, **content)
    return [problem.where for problem in caught.value.problems]


def to_gemma(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1)


RENAMES: list[Callable[[str], str]] = [
    lambda name: name.removeprefix("model."),
    lambda name: f"_orig_mod.{name}",
    lambda name: f"base_model.model.{name}",
    to_gemma,
]


@pytest.mark.parametrize("rename", RENAMES)
@pytest.mark.parametrize("content", [{"restore": [1, 2]}, {"alpha": 1.0}])
def test_renaming_either_side_changes_no_byte(
    tmp_path: Path, rename: Callable[[str], str], content: dict[str, Any]
) -> None:
    pre, post = llama_tensors("pre"), llama_tensors("post")
    write_pair(tmp_path / "same", pre, post)
    expected = tensor_bytes(plan_of(tmp_path / "same", **content))
    write_pair(tmp_path / "pre", {rename(name): tensor for name, tensor in pre.items()}, post)
    assert tensor_bytes(plan_of(tmp_path / "pre", **content)) == expected
    write_pair(tmp_path / "post", pre, {rename(name): tensor for name, tensor in post.items()})
    plan = plan_of(tmp_path / "post", **content)
    assert tensor_bytes(plan) == {rename(name): data for name, data in expected.items()}
    assert sum("matched" in note for note in plan.notes) == 1


def test_rules_name_post_trained_names(tmp_path: Path) -> None:
    pre, post = llama_tensors("pre"), {to_gemma(name): tensor for name, tensor in llama_tensors("post").items()}
    write_pair(tmp_path, pre, post)
    found = planned(tmp_path, tensors=[{"match": "model.language_model.norm.weight", "alpha": 1}])
    assert [name for name, tensor in found.items() if tensor.alpha] == ["model.language_model.norm.weight"]
    refusals(tmp_path, "pattern-matches-nothing", tensors=[{"match": "model.norm.weight", "alpha": 1}])


def test_a_mergekit_config_merges_layers_under_other_names(tmp_path: Path) -> None:
    pre, post = llama_tensors("pre"), {to_gemma(name): tensor for name, tensor in llama_tensors("post").items()}
    write_pair(tmp_path, pre, post)
    sides = {side: str(tmp_path / side) for side in ("pre", "post")}
    ranges = (("post", [0, 2]), ("pre", [2, 4]), ("post", [4, 6]))
    slices = [{"sources": [{"model": sides[side], "layer_range": part}]} for side, part in ranges]
    made = plan_merge({"merge_method": "passthrough", "base_model": sides["post"], "slices": slices})
    restored = {tensor.name: tensor.pretrained for tensor in made.tensors() if tensor.pretrained}
    assert restored == {to_gemma(name): name for name in pre if name.startswith(("model.layers.2.", "model.layers.3."))}


def test_layers_under_an_incompatible_name_are_one_problem(tmp_path: Path) -> None:
    pre = {name.replace("model.layers", "transformer.h"): tensor for name, tensor in llama_tensors("pre").items()}
    pre |= {f"someones.{name}": pre.pop(name) for name in ("model.norm.weight", EMBED)}
    write_pair(tmp_path, pre, llama_tensors("post"))
    for content in ({"restore": [1, 2]}, {"alpha": 0.5}):
        assert refusals(tmp_path, "different-layers", **content) == [str(tmp_path / "pre")]


def test_layers_that_cannot_be_told_from_others_are_never_to_be_kept(tmp_path: Path) -> None:
    post = tensors("post", *(f"{part}.layers.{k}.mlp.weight" for part in ("one", "two") for k in LAYERS))
    write_pair(tmp_path, tensors("pre", *in_layers("mlp.weight")), post)
    with refused(PlanError, "not-in-pretrained") as caught:
        planned(tmp_path, alpha=0.5)
    assert not any("alpha: 0" in problem.remedy for problem in caught.value.problems)


MASKS = [f"model.layers.{k}.attn.bias" for k in LAYERS]


@pytest.mark.parametrize("dtype", ["BOOL", "U8", "F32"])
@pytest.mark.parametrize("content", [{"restore": [1, 2]}, {"alpha": 1.0}])
def test_causal_masks_of_one_side_are_no_obstacle(tmp_path: Path, dtype: str, content: dict[str, Any]) -> None:
    config = llama_config(max_position_embeddings=4)
    masks = tensors("mask", *MASKS, dtype=dtype, shape=(1, 1, 4, 4))
    plain = [llama_tensors(side) for side in ("pre", "post")]
    write_pair(tmp_path / "pre", plain[0] | masks, plain[1], pre_config=config, post_config=config)
    assert planned(tmp_path / "pre", **content).keys() == plain[1].keys()
    write_pair(tmp_path / "post", plain[0], plain[1] | masks, pre_config=config, post_config=config)
    found = planned(tmp_path / "post", **content)
    assert all(found[name][2:6] == (0.0, "copy", None, name) for name in MASKS)


@pytest.mark.parametrize("shape", [(8,), (1, 1, 8, 4), (1, 2, 4, 4), (4, 4)])
def test_a_bias_that_is_no_mask_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    config = llama_config(max_position_embeddings=4)
    post = llama_tensors("post") | tensors("post", *MASKS, dtype="F32", shape=shape)
    write_pair(tmp_path, llama_tensors("pre"), post, pre_config=config, post_config=config)
    assert refusals(tmp_path, "not-in-pretrained", restore=[1, 2]) == ["model.layers.*.attn.bias (2 tensors)"]


def test_constants_of_another_length_are_kept(tmp_path: Path) -> None:
    sides = [
        llama_tensors(side) | tensors(side, *MASKS, dtype="BOOL", shape=(1, 1, size, size))
        for side, size in (("pre", 4), ("post", 8))
    ]
    write_pair(tmp_path, *sides)
    assert planned(tmp_path, restore=[0, 5])[MASKS[1]][2:6] == (0.0, "copy", None, MASKS[1])


def test_the_tower_of_a_vision_model_is_kept_in_a_soup_with_a_text_model(tmp_path: Path) -> None:
    tower = [f"model.visual.blocks.{k}.attn.weight" for k in range(2)] + ["model.multi_modal_projector.up.weight"]
    post = {to_gemma(name): tensor for name, tensor in llama_tensors("post").items()} | tensors("post", *tower)
    write_pair(tmp_path, llama_tensors("pre"), post)
    found = planned(tmp_path, alpha=1.0)
    assert {name for name, tensor in found.items() if tensor.alpha == 0} == set(tower)


@pytest.mark.parametrize("part", ["model.layers.6.", "mtp.layers.0.", "model.mtp_block.0.", "model.mtp."])
def test_layers_that_draft_tokens_are_kept_in_a_soup_with_a_model_without_them(tmp_path: Path, part: str) -> None:
    draft = [f"{part}{name}.weight" for name in ("eh_proj", "embed_tokens", "self_attn.q_proj", "shared_head.head")]
    post = llama_tensors("post") | tensors("post", *draft)
    write_pair(tmp_path / "without", llama_tensors("pre"), post)
    found = planned(tmp_path / "without", alpha=0.5)
    assert {name for name, tensor in found.items() if tensor.alpha == 0} == set(draft)
    pre = llama_tensors("pre") | tensors("pre", f"{part}eh_proj.weight")
    write_pair(tmp_path / "other", pre, post)
    assert len(refusals(tmp_path / "other", "not-in-pretrained", alpha=0.5)) == len(draft) - 1


def test_the_embedding_of_a_layer_that_drafts_tokens_does_not_hide_a_tie(tmp_path: Path) -> None:
    draft, config = ["model.layers.6.embed_tokens.weight"], llama_config(tie_word_embeddings=True)
    sides = [llama_tensors(side) | tensors(side, *draft) for side in ("pre", "post")]
    write_pair(tmp_path, *sides, pre_config=config, post_config=config)
    found = planned(tmp_path, tensors=[{"match": "lm_head.weight", "alpha": 1}])
    assert {name for name, tensor in found.items() if tensor.alpha} == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("module", ["score", "model.aligner.linear_1", "language_projection", "encoder.layers.0.attn"])
def test_a_module_that_only_the_post_trained_side_has_is_kept(tmp_path: Path, module: str) -> None:
    post = llama_tensors("post") | tensors("post", f"{module}.weight")
    write_pair(tmp_path / "new", llama_tensors("pre"), post)
    assert planned(tmp_path / "new", alpha=0.5)[f"{module}.weight"][2:6] == (0.0, "copy", None, f"{module}.weight")


def test_a_module_that_the_pre_trained_side_may_have_under_another_name_is_not_kept(tmp_path: Path) -> None:
    post = {name.replace("model.norm", "model.final_layernorm"): each for name, each in llama_tensors("post").items()}
    write_pair(tmp_path, llama_tensors("pre"), post)
    assert refusals(tmp_path, "not-in-pretrained", alpha=0.5) == ["model.final_layernorm.weight"]


def test_a_tower_that_the_pre_trained_side_has_under_other_names_is_not_kept_silently(tmp_path: Path) -> None:
    pre = llama_tensors("pre") | tensors("pre", "vision_tower.one.weight")
    write_pair(tmp_path, pre, llama_tensors("post") | tensors("post", "vision_tower.two.weight"))
    assert refusals(tmp_path, "not-in-pretrained", alpha=1.0) == ["vision_tower.two.weight"]


def experts(seed: str, *, fused: bool) -> dict[str, Tensor]:
    inner = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    parts = [f"mlp.experts.{e}.{part}_proj.weight" for e in range(2) for part in ("gate", "up", "down")]
    return llama_tensors(seed) | tensors(seed, *in_layers(*(inner if fused else parts)))


def heads(seed: str, *, fused: bool) -> dict[str, Tensor]:
    plain = {name: tensor for name, tensor in llama_tensors(seed).items() if ".self_attn." not in name}
    parts = ["self_attn.qkv_proj.weight"] if fused else [f"self_attn.{part}_proj.weight" for part in "qkv"]
    return plain | tensors(seed, *in_layers(*parts))


@pytest.mark.parametrize(("make", "inner"), [(experts, "mlp.experts"), (heads, "self_attn.qkv_proj")])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("content", [{"restore": [1, 2]}, {"alpha": 0.5}])
def test_what_is_fused_on_one_side_only_is_named_once(
    tmp_path: Path, make: Callable[..., dict[str, Tensor]], inner: str, fused: bool, content: dict[str, Any]
) -> None:
    write_pair(tmp_path, make("pre", fused=fused), make("post", fused=not fused))
    places = refusals(tmp_path, "fused-differently", **content)
    assert all(inner in place for place in places)


@pytest.mark.parametrize(
    ("rename", "model_type", "may_be_renamed"),
    [
        (lambda name: name.replace("mlp.up_proj", "ffn.w1"), "llama", True),
        (lambda name: name.replace("model.layers", "encoder.blocks"), "llama", True),
        (lambda name: name.replace("mlp.up_proj", "ffn.w1"), "mistral", False),
        (lambda name: "" if "mlp.up_proj" in name else name, "llama", False),
    ],
)
def test_layers_of_one_type_under_other_names_are_to_be_saved_alike(
    tmp_path: Path, rename: Callable[[str], str], model_type: str, may_be_renamed: bool
) -> None:
    pre = {rename(name): each for name, each in llama_tensors("pre").items() if rename(name)}
    write_pair(tmp_path, pre, llama_tensors("post"), pre_config=llama_config(model_type=model_type))
    with pytest.raises(PlanError) as caught:
        plan_of(tmp_path, restore=[1, 2])
    assert {"save_original_format" in problem.remedy for problem in caught.value.problems} == {may_be_renamed}


def test_a_side_that_alone_is_quantized_is_named_and_nothing_else(tmp_path: Path) -> None:
    packed = in_layers("mlp.experts.up_blocks", "mlp.experts.up_scales")
    pre = llama_tensors("pre") | tensors("pre", *packed, dtype="U8")
    write_pair(tmp_path, pre, llama_tensors("post") | tensors("post", *in_layers("mlp.experts.up")))
    assert refusals(tmp_path, "quantized-one-side", restore=[1, 2]) == [str(tmp_path / "pre")]


def test_a_lora_that_is_not_merged_is_named(tmp_path: Path) -> None:
    inner = "self_attn.q_proj.lora_A.default.weight"
    write_pair(tmp_path, llama_tensors("pre"), llama_tensors("post") | tensors("post", *in_layers(inner)))
    assert refusals(tmp_path, "lora-not-merged", restore=[1, 2]) == [f"model.layers.*.{inner} (2 tensors)"]


def test_the_same_elements_in_other_groups_are_copied(tmp_path: Path) -> None:
    names = in_layers("conv.weight")
    pre = llama_tensors("pre") | tensors("pre", *names, shape=(4, 1, 3))
    write_pair(tmp_path, pre, llama_tensors("post") | tensors("post", *names, shape=(4, 3)))
    plan = plan_of(tmp_path, restore=[1, 1])
    assert tensor_bytes(plan)[names[1]] == pre[names[1]].data
    assert next(tensor for tensor in plan.tensors() if tensor.name == names[1]).info.shape == (4, 3)


TIED = llama_config(tie_word_embeddings=True)


def tied_pair(folder: Path) -> None:
    post = llama_tensors("post", tied=True)
    write_pair(folder, llama_tensors("pre", tied=True), post | {HEAD: post[EMBED]}, pre_config=TIED, post_config=TIED)


@pytest.mark.parametrize("named", [EMBED, HEAD])
def test_a_rule_that_changes_one_of_two_tied_tensors_changes_both(tmp_path: Path, named: str) -> None:
    tied_pair(tmp_path)
    plan = plan_of(tmp_path, restore=[1, 2], tensors=[{"match": named, "alpha": 0.25}])
    found = {tensor.name: tensor for tensor in plan.tensors()}
    assert found[EMBED][2:5] == found[HEAD][2:5] == (0.25, "linear", EMBED)
    assert any(EMBED in note and HEAD in note for note in plan.notes)


@pytest.mark.parametrize(("named", "alpha"), [(HEAD, 0.5), (EMBED, 0.0)])
def test_a_tied_head_is_kept_only_with_its_embedding(tmp_path: Path, named: str, alpha: float) -> None:
    tied_pair(tmp_path)
    plan = plan_of(tmp_path, alpha=0.5, tensors=[{"match": named, "alpha": 0}])
    found = {tensor.name: tensor for tensor in plan.tensors()}
    assert found[EMBED].alpha == found[HEAD].alpha == alpha
    stated = any(f"{alpha:g}" in note for note in plan.notes if EMBED in note and HEAD in note)
    assert stated == (alpha > 0)


def test_a_mergekit_config_that_parts_tied_tensors_is_refused(tmp_path: Path) -> None:
    tied_pair(tmp_path)
    sides = {side: str(tmp_path / side) for side in ("pre", "post")}
    slices = [
        {"sources": [{"model": sides[side], "layer_range": part}]} for side, part in (("pre", [0, 2]), ("post", [2, 6]))
    ]
    with refused(PlanError, "tied-tensors"):
        plan_merge({"merge_method": "passthrough", "base_model": sides["post"], "slices": slices})


def tokenizer(*tokens: str) -> str:
    return json.dumps({"model": {"vocab": {token: number for number, token in enumerate(tokens)}}})


def of_sizes(folder: Path, pre: int, post: int, *tokenizers: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    sides = llama_tensors("pre", vocabulary=pre), llama_tensors("post", vocabulary=post)
    write_pair(folder, *sides)
    for side, text in zip(("pre", "post"), tokenizers, strict=False):
        (folder / side / "tokenizer.json").write_text(text)
    return sides


@pytest.mark.parametrize(("pre", "post"), [(16, 18), (18, 16)])
@pytest.mark.parametrize(("alpha", "blend"), [(0.5, "linear"), (0.5, "slerp"), (1.0, "linear")])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_shared_vocabulary_takes_the_rows_of_one_side_from_the_post_trained(
    tmp_path: Path, pre: int, post: int, alpha: float, blend: str, dtype: str
) -> None:
    sides = of_sizes(tmp_path, pre, post)
    rules = {"alpha": alpha, "blend": blend, "dtype": {"BF16": None, "F32": "float32"}[dtype]}
    plan = plan_of(tmp_path, vocabulary="shared", **rules)
    found = {tensor.name: tensor for tensor in plan.tensors()}
    assert {name for name, tensor in found.items() if tensor.rows is not None} == {EMBED, HEAD}
    assert found[EMBED].rows == 16
    assert sum("16 of" in note for note in plan.notes) == 1
    row_bytes = 8 * (2 if dtype == "BF16" else 4)
    written = tensor_bytes(plan)[EMBED]

    def wide(data: bytes) -> bytes:
        halves = [data[i : i + 2] for i in range(0, len(data), 2)]
        return data if dtype == "BF16" else b"".join(b"\0\0" + half for half in halves)

    assert len(written) == post * row_bytes
    assert written[16 * row_bytes :] == wide(sides[1][EMBED].data)[16 * row_bytes :]
    if alpha == 1:
        assert written[: 16 * row_bytes] == wide(sides[0][EMBED].data)[: 16 * row_bytes]
    else:
        same = llama_tensors("pre", vocabulary=16), llama_tensors("post", vocabulary=16)
        cut = [
            {**model, EMBED: Tensor("BF16", (16, 8), side[EMBED].data[:256])}
            for model, side in zip(same, sides, strict=True)
        ]
        write_pair(tmp_path / "cut", *cut)
        assert written[: 16 * row_bytes] == tensor_bytes(plan_of(tmp_path / "cut", **rules))[EMBED]


def test_vocabularies_of_different_size_are_refused_without_the_key(tmp_path: Path) -> None:
    of_sizes(tmp_path, 16, 18)
    assert refusals(tmp_path, "different-vocabularies", alpha=0.5) == [EMBED, HEAD]
    kept = [{"match": name, "alpha": 0} for name in (EMBED, HEAD)]
    assert planned(tmp_path, alpha=0.5, tensors=kept)[HEAD].alpha == 0
    assert planned(tmp_path, restore=[0, 5])[HEAD].alpha == 0


def test_rows_of_other_tokens_are_never_blended(tmp_path: Path) -> None:
    of_sizes(tmp_path, 16, 18, tokenizer("a", "b", "c"), tokenizer("a", "x", "c", "d"))
    assert refusals(tmp_path, "different-tokens", alpha=0.5, vocabulary="shared") == [EMBED, HEAD]


def test_rows_past_the_shorter_tokenizer_are_kept(tmp_path: Path) -> None:
    """The rows past the last token of a padded embedding mean nothing."""
    of_sizes(tmp_path, 16, 18, tokenizer("a", "b", "c"), tokenizer("a", "b", "c", "d"))
    assert planned(tmp_path, alpha=0.5, vocabulary="shared")[EMBED].rows == 3


def test_added_tokens_and_lists_of_pieces_count(tmp_path: Path) -> None:
    pieces = json.dumps({"model": {"vocab": [["a", 0.0], ["b", -1.0]]}, "added_tokens": [{"id": 2, "content": "c"}]})
    of_sizes(tmp_path, 16, 18, pieces, tokenizer("a", "b", "c", "d"))
    assert planned(tmp_path, alpha=0.5, vocabulary="shared")[EMBED].rows == 3


def test_a_tokenizer_that_is_not_json_is_refused(tmp_path: Path) -> None:
    of_sizes(tmp_path, 16, 18, "no", tokenizer("a"))
    with refused(CheckpointError, "invalid-json"):
        plan_of(tmp_path, alpha=0.5, vocabulary="shared")
    assert planned(tmp_path, restore=[1, 2])


def test_a_tokenizer_of_any_size_is_not_held(tmp_path: Path) -> None:
    of_sizes(tmp_path, 16, 18, tokenizer("a"), tokenizer("a"))
    os.truncate(tmp_path / "post" / "tokenizer.json", 3_000_000_000)
    tracemalloc.start()
    with refused(CheckpointError, "unreadable"):
        plan_of(tmp_path, alpha=0.5, vocabulary="shared")
    make_plan({"pretrained": str(tmp_path / "pre"), "posttrained": str(tmp_path / "post"), "restore": [1, 2]})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * MAX_TOKENIZER_BYTES


def test_tensors_of_a_search_are_planned_by_the_same_correspondence(tmp_path: Path) -> None:
    pre, post = llama_tensors("pre"), {to_gemma(name): tensor for name, tensor in llama_tensors("post").items()}
    write_pair(tmp_path, pre, post)
    pair = plan_of(tmp_path, restore=[1, 2]).pair
    found = plan_tensor_alphas([(name, 1.0) for name in post], pair, dtype=None)
    assert {tensor.name: tensor.pretrained for tensor in found.values()} == {to_gemma(name): name for name in pre}
