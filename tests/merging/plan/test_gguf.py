"""What a GGUF pair's tensors come from, and what is refused: by name, and everything at once."""

from pathlib import Path
from typing import Any

import pytest

from slrmerge.checkpoint.opening import open_pair
from slrmerge.checkpoint.pair import ModelPair
from slrmerge.errors import Problem
from slrmerge.merging.plan.gguf import plan_gguf_tensors
from slrmerge.merging.plan.model import PlannedTensor
from slrmerge.merging.plan.tensors import PlannedTensors
from slrmerge.recipe.load import as_recipe
from tests.gguf_files import HIDDEN, VOCABULARY, shapes, write_gguf

Q, UP = "blk.1.attn_q.weight", "blk.2.ffn_up.weight"


def pair_of(folder: Path, pre: dict[str, Any] | None = None, post: dict[str, Any] | None = None) -> ModelPair:
    """A pair of files in Q8_0, unless `pre` and `post` say otherwise."""
    sides = {"pre": pre or {}, "post": post or {}}
    return open_pair(*(write_gguf(folder / f"{side}.gguf", side, **options) for side, options in sides.items()))


def planned(pair: ModelPair, **content: Any) -> PlannedTensors:
    recipe = as_recipe({"pretrained": "a", "posttrained": "b", **content})
    alphas, problems = recipe.resolve(pair)
    assert problems == []
    return plan_gguf_tensors(recipe, pair, alphas)


def refusals(pair: ModelPair, **content: Any) -> dict[str, str]:
    """The places of problems, with their codes."""
    problems = planned(pair, **content).problems
    assert all(problem.what and problem.where for problem in problems)
    return {problem.where: problem.code for problem in problems}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_a_restoration_copies_layers_and_keeps_the_rest(tmp_path: Path, kind: str) -> None:
    pair = pair_of(tmp_path, {"kind": kind}, {"kind": kind})
    found = planned(pair, restore=[1, 2])
    assert (found.problems, found.notes) == ([], [])
    assert [tensor.name for tensor in found.tensors] == list(pair.posttrained)
    for tensor in found.tensors:
        restored = tensor.name.startswith(("blk.1.", "blk.2."))
        sides = (tensor.name, None) if restored else (None, tensor.name)
        info = pair.posttrained[tensor.name]
        assert tensor == PlannedTensor(tensor.name, info, float(restored), "copy", *sides)


def test_a_soup_of_floats_is_blended(tmp_path: Path) -> None:
    pair = pair_of(tmp_path, {"kind": "F16"}, {"kind": "F16"})
    assert {tensor.kind for tensor in planned(pair, alpha=0.5, blend="slerp").tensors} == {"slerp"}


def test_a_soup_of_quantized_tensors_is_refused_for_all_at_once(tmp_path: Path) -> None:
    assert set(refusals(pair_of(tmp_path), alpha=0.5).values()) == {"quantized-blend"}
    names = {"token_embd.weight", "output.weight", *(f"blk.*.{x} (4 tensors)" for x in INNER)}
    assert refusals(pair_of(tmp_path), alpha=0.5).keys() == names


INNER = ("attn_q.weight", "ffn_up.weight", "ffn_down.weight")


def test_a_soup_of_the_floating_tensors_of_quantized_files_is_blended(tmp_path: Path) -> None:
    found = planned(pair_of(tmp_path), tensors=[{"match": "*_norm.weight", "alpha": 0.5}])
    assert found.problems == []
    assert {tensor.name for tensor in found.tensors if tensor.kind == "linear"} == {
        name for name in shapes() if name.endswith("_norm.weight")
    }


def test_different_types_are_refused_by_name_where_they_matter(tmp_path: Path) -> None:
    kinds = {Q: "Q4_0", UP: "F16", "token_embd.weight": "Q4_0"}
    pair = pair_of(tmp_path, {"kinds": kinds})
    assert refusals(pair, restore=[1, 2]) == {Q: "different-types", UP: "different-types"}
    whats = [problem.what for problem in planned(pair, restore=[1, 2]).problems]
    assert whats == ["is Q4_0 pre-trained and Q8_0 post-trained", "is F16 pre-trained and Q8_0 post-trained"]
    assert refusals(pair, restore=[3, 3]) == {}


def test_floats_of_different_types_are_refused_too(tmp_path: Path) -> None:
    pair = pair_of(tmp_path, {"kind": "BF16"}, {"kind": "F16"})
    assert set(refusals(pair, restore=[0, 0]).values()) == {"different-types"}
    assert all("--outtype" in problem.remedy for problem in planned(pair, restore=[0, 0]).problems)


def test_a_vocabulary_of_another_size_matters_only_where_its_tensors_are_restored(tmp_path: Path) -> None:
    pair = pair_of(tmp_path, {"more": {"token_embd.weight": (VOCABULARY + 1, HIDDEN)}})
    assert refusals(pair, restore=[0, 3]) == {}
    embeddings = {"match": "token_embd.weight", "alpha": 1}
    assert refusals(pair, tensors=[embeddings]) == {"token_embd.weight": "different-shapes"}


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    pair = pair_of(tmp_path, {"architecture": "qwen2"})
    assert refusals(pair, restore=[0, 1]) == {str(pair.pretrained): "different-architectures"}


def test_a_restored_layer_must_be_whole(tmp_path: Path) -> None:
    more = {"more": {"blk.1.attn_q.bias": (HIDDEN,)}}
    pair = pair_of(tmp_path, more)
    assert refusals(pair, restore=[1, 1]) == {"blk.1.attn_q.bias": "different-architectures"}
    assert refusals(pair, restore=[2, 2]) == {}
    assert planned(pair, restore=[2, 2]).notes != []
    pair = pair_of(tmp_path, post=more)
    assert refusals(pair, restore=[1, 1]) == {"blk.1.attn_q.bias": "not-in-pretrained"}
    assert not any("alpha: 0" in problem.remedy for problem in planned(pair, restore=[1, 1]).problems)
    for sides in ((more, {}), ({}, more)):  # the architecture is known to be the same: names depend on the converter
        pair = pair_of(tmp_path, *sides)
        assert all("same release" in problem.remedy for problem in planned(pair, restore=[1, 1]).problems)
    assert refusals(pair, restore=[2, 2]) == {}


def test_layers_that_draft_tokens_are_kept_in_a_soup_with_a_model_without_them(tmp_path: Path) -> None:
    draft, values = {"blk.4.nextn.eh_proj.weight": (HIDDEN, HIDDEN)}, {"llama.nextn_predict_layers": 1}
    mtp = {"kind": "F16", "layers": 5, "more": draft, "values": values}
    found = planned(pair_of(tmp_path, {"kind": "F16"}, mtp), alpha=0.5)
    assert found.problems == []
    assert all((tensor.alpha == 0) == tensor.name.startswith("blk.4.") for tensor in found.tensors)
    pair = pair_of(tmp_path, {**mtp, "more": {}}, mtp)
    assert refusals(pair, alpha=0.5) == {"blk.4.nextn.eh_proj.weight": "not-in-pretrained"}


@pytest.mark.parametrize("key", ["head_count", "head_count_kv", "key_length"])
def test_layers_with_other_heads_are_refused(tmp_path: Path, key: str) -> None:
    sides = ({"values": {f"llama.attention.{key}": count}} for count in (4, 8))
    pair = pair_of(tmp_path, *sides)
    assert refusals(pair, restore=[1, 1]) == {str(pair.pretrained): "different-heads"}


def test_a_tied_pre_trained_head_is_its_embeddings(tmp_path: Path) -> None:
    pair = pair_of(tmp_path, {"tied": True})
    found = planned(pair, tensors=[{"match": "output.weight", "alpha": 1}])
    (head,) = (tensor for tensor in found.tensors if tensor.name == "output.weight")
    assert (head.kind, head.pretrained, head.posttrained) == ("copy", "token_embd.weight", None)
    assert len(found.notes) == 1


def test_embeddings_that_are_the_post_trained_head_too_are_not_taken_from_an_untied_model(tmp_path: Path) -> None:
    pair = pair_of(tmp_path, post={"tied": True})
    embeddings = {"match": "token_embd.weight", "alpha": 1}
    assert refusals(pair, tensors=[embeddings]) == {"token_embd.weight": "tied-differently"}
    assert refusals(pair, restore=[0, 3]) == {}


def test_both_tied_is_one_tensor(tmp_path: Path) -> None:
    pair = pair_of(tmp_path, {"tied": True}, {"tied": True})
    assert refusals(pair, tensors=[{"match": "token_embd.weight", "alpha": 1}]) == {}


@pytest.mark.parametrize("sides", [("pre",), ("post",), ("pre", "post")], ids="-".join)
def test_rotary_constants_are_the_post_trained_sides(tmp_path: Path, sides: tuple[str, ...]) -> None:
    constants = {"more": {"rope_freqs.weight": (16,)}}
    pair = pair_of(tmp_path, *(constants if side in sides else {} for side in ("pre", "post")))
    found = planned(pair, tensors=[{"match": "*.weight", "alpha": 1}])
    assert found.problems == []
    kept = [tensor.name for tensor in found.tensors if tensor.posttrained]
    assert kept == (["rope_freqs.weight"] if "post" in sides else [])
    assert len(found.notes) == (len(sides) == 1)


def test_integers_are_kept_in_a_soup_and_restored_by_name(tmp_path: Path) -> None:
    kind = {"kind": "F32", "more": {"ids": (8,)}, "kinds": {"ids": "I32"}}
    pair = pair_of(tmp_path, kind, kind)
    for alpha, side in ((0.5, "posttrained"), (1, "pretrained")):
        (ids,) = (tensor for tensor in planned(pair, alpha=alpha).tensors if tensor.name == "ids")
        assert (ids.kind, getattr(ids, side)) == ("copy", "ids")


def test_key_values_that_differ_are_noted_with_both_values(tmp_path: Path) -> None:
    pair = pair_of(tmp_path, post={"values": {"llama.rope.freq_base": 5e5}})
    (note,) = planned(pair, restore=[0, 0]).notes
    assert "llama.rope.freq_base (10000 and 500000)" in note


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ({"dtype": "float32"}, "gguf-dtype"),
        ({"max_shard_size": "1GB"}, "gguf-shard-size"),
        ({"tokenizer": "pretrained"}, "gguf-tokenizer"),
        ({"vocabulary": "shared"}, "gguf-vocabulary"),
    ],
)
def test_keys_of_a_recipe_that_have_no_meaning_are_refused(tmp_path: Path, content: dict[str, Any], code: str) -> None:
    assert refusals(pair_of(tmp_path), restore=[0, 0], **content) == {f"recipe: $.{next(iter(content))}": code}


def test_a_mergekit_config_is_refused(tmp_path: Path) -> None:
    pair = pair_of(tmp_path)
    models = [{"model": str(side), "parameters": {"weight": 0.5}} for _, side in pair.items()]
    recipe = as_recipe({"merge_method": "linear", "models": models, "dtype": "float32"})
    alphas, _ = recipe.resolve(pair)
    problems: list[Problem] = plan_gguf_tensors(recipe, pair, alphas).problems
    assert "gguf-mergekit" in [problem.code for problem in problems]
