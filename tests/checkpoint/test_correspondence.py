"""Which pre-trained tensor each post-trained one was trained from, in the names that people's checkpoints have."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slrmerge.checkpoint.buffers import is_constant
from slrmerge.checkpoint.correspondence import Correspondence
from slrmerge.checkpoint.fused import fusion, is_regrouped
from slrmerge.checkpoint.header import TensorInfo
from slrmerge.checkpoint.pair import ModelPair
from slrmerge.checkpoint.safetensors import open_folder
from tests.checkpoints import Tensor, llama_config, llama_tensors, random_tensor, write_checkpoint

Rename = Callable[[str], str]


def renamed(tensors: Mapping[str, Tensor], rename: Rename) -> dict[str, Tensor]:
    return {rename(name): tensor for name, tensor in tensors.items()}


def replacing(start: str, other: str) -> Rename:
    return lambda name: other + name.removeprefix(start) if name.startswith(start) else name


def wrapped(wrapper: str) -> Rename:
    return lambda name: wrapper + name


def pair_of(folder: Path, pre: Mapping[str, Tensor], post: Mapping[str, Tensor], *configs: Any) -> ModelPair:
    pre_config, post_config = configs or (llama_config(), llama_config())
    return ModelPair(
        open_folder(write_checkpoint(folder / "pre", pre, pre_config)),
        open_folder(write_checkpoint(folder / "post", post, post_config)),
    )


def zeros(*names: str, shape: tuple[int, ...] = (4, 2)) -> dict[str, Tensor]:
    return {name: random_tensor("BF16", shape, name) for name in names}


def layers(prefix: str, *inner: str, count: int = 6) -> list[str]:
    return [f"{prefix}.{k}.{name}" for k in range(count) for name in inner or ("mlp.weight",)]


NAMINGS: dict[str, Rename] = {
    "plain": lambda name: name,
    "bare": replacing("model.", ""),
    "transformer": replacing("model.", "transformer."),
    "vision-language, transformers 4": lambda name: "language_model." + name,
    "vision-language, transformers 5": replacing("model.", "model.language_model."),
    "text model": replacing("model.", "model.text_model."),
    "torch.compile": wrapped("_orig_mod."),
    "data parallel": wrapped("module."),
    "compiled data parallel": wrapped("module._orig_mod."),
    "peft": wrapped("base_model.model."),
    "fsdp": wrapped("_fsdp_wrapped_module."),
    "compiled layers": lambda name: name.replace(".mlp.", "._orig_mod.mlp."),
    "checkpointed layers": lambda name: name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    "another prefix": replacing("model.", "someones_model."),
    "an unknown wrapper": wrapped("student."),
    "lightning": wrapped("_forward_module.module."),
    "language": replacing("model.", "language.model."),
}

UNKNOWN = {"another prefix", "an unknown wrapper"}


SIDES = [
    (pre, post)
    for pre in NAMINGS
    for post in NAMINGS
    if pre == post or not {pre, post} <= UNKNOWN  # one module that is not known, on one side
]


@pytest.mark.parametrize(("pre", "post"), SIDES)
def test_a_tensor_corresponds_to_itself_under_any_prefix(tmp_path: Path, pre: str, post: str) -> None:
    tensors = llama_tensors("any", layers=2)
    config = llama_config(layers=2)
    pair = pair_of(tmp_path, renamed(tensors, NAMINGS[pre]), renamed(tensors, NAMINGS[post]), config, config)
    found = pair.correspondence
    assert found.twins == {NAMINGS[post](name): NAMINGS[pre](name) for name in tensors}
    assert not found.by_tie
    assert found.differing_layers is None
    assert bool(found.note) == (pre != post)
    assert "\n" not in found.note


WRAPPERS = ["_orig_mod.", "module.", "base_model.model.", "_fsdp_wrapped_module.", "module.module."]


@given(st.sampled_from(sorted(NAMINGS)), st.lists(st.sampled_from(WRAPPERS), max_size=3), st.booleans())
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_wrapping_either_side_changes_no_twin(
    tmp_path_factory: pytest.TempPathFactory, naming: str, wrappers: list[str], swapped: bool
) -> None:
    tensors, config = llama_tensors("any", layers=1), llama_config(layers=1)
    own = NAMINGS[naming]
    around = wrapped("".join(wrappers))
    sides: tuple[Rename, Rename] = (own, lambda name: around(own(name)))
    pre, post = reversed(sides) if swapped else sides
    pair = pair_of(tmp_path_factory.mktemp("pair"), renamed(tensors, pre), renamed(tensors, post), config, config)
    assert pair.correspondence.twins == {post(name): pre(name) for name in tensors}


@pytest.mark.parametrize("prefix", ["bert.", ""])
@pytest.mark.parametrize("swapped", [False, True])
def test_norms_correspond_under_the_names_that_the_first_checkpoints_of_bert_have(
    tmp_path: Path, prefix: str, swapped: bool
) -> None:
    norms = [f"{name}.LayerNorm" for name in ("embeddings", *layers("encoder.layer", "output", count=2))]
    old, new = ([f"{prefix}{norm}.{part}" for norm in norms for part in parts] for parts in (OLD_NORM, NEW_NORM))
    new = [name.removeprefix(prefix) for name in new]
    pre, post = (new, old) if swapped else (old, new)
    found = pair_of(tmp_path, zeros(*pre), zeros(*post), *[{"num_hidden_layers": 2}] * 2).correspondence
    assert found.twins == dict(zip(post, pre, strict=True))
    assert found.note


OLD_NORM, NEW_NORM = ("gamma", "beta"), ("weight", "bias")


def test_a_pair_with_the_same_names_has_nothing_to_note(tmp_path: Path) -> None:
    pair = pair_of(tmp_path, llama_tensors("pre"), llama_tensors("post"))
    assert pair.correspondence.twins == {name: name for name in pair.posttrained}
    assert pair.correspondence.note == ""
    assert pickle.loads(pickle.dumps(pair)).correspondence == pair.correspondence


def test_towers_of_both_sides_correspond_by_their_names_without_prefixes(tmp_path: Path) -> None:
    text = layers("language_model.model.layers")
    pre = zeros(*text, *layers("vision_tower.vision_model.encoder.layers", count=2), "multi_modal_projector.w.weight")
    post = zeros(
        *(name.replace("language_model.model", "model.language_model") for name in text),
        *layers("model.vision_tower.encoder.layers", count=2),
        "model.multi_modal_projector.w.weight",
    )
    pair = pair_of(tmp_path, pre, post)
    assert pair.correspondence.twins["model.vision_tower.encoder.layers.1.mlp.weight"] == (
        "vision_tower.vision_model.encoder.layers.1.mlp.weight"
    )
    assert len(pair.correspondence.twins) == len(post)


def test_the_norm_of_another_part_is_not_the_decoders(tmp_path: Path) -> None:
    """Both post-trained names are `norm.weight` without prefixes, and only one is in the layers' own module."""
    pre = zeros(*layers("model.layers"), "model.norm.weight")
    post = zeros(*layers("model.language_model.layers"), "model.language_model.norm.weight", "model.norm.weight")
    twins = pair_of(tmp_path, pre, post).correspondence.twins
    assert set(twins) == set(layers("model.language_model.layers"))


@pytest.mark.parametrize(
    ("pre", "post"),
    [
        ("model.encoder.layers", "model.decoder.layers"),
        ("layers", "encoder.layers"),
        ("layers", "vision_tower.layers"),
        ("transformer.h", "model.layers"),
        ("talker.model.layers", "model.layers"),
        ("draft.layers", "layers"),
        ("some.thing.layers", "layers"),
        ("one.layers", "other.layers"),
    ],
)
def test_layers_that_may_mean_something_else_do_not_correspond(tmp_path: Path, pre: str, post: str) -> None:
    found = pair_of(tmp_path, zeros(*layers(pre), "norm.weight"), zeros(*layers(post), "norm.weight")).correspondence
    assert found.differing_layers == (pre, post)
    assert found.twins == {"norm.weight": "norm.weight"}


def test_names_that_would_match_twice_match_nothing(tmp_path: Path) -> None:
    pre = zeros(*layers("model.layers"), "transformer.norm.weight", "language_model.norm.weight")
    found = pair_of(tmp_path, pre, zeros(*layers("model.layers"), "model.norm.weight")).correspondence
    assert "model.norm.weight" not in found.twins


def test_a_stack_of_the_same_name_takes_precedence(tmp_path: Path) -> None:
    both = zeros(*layers("tower.layers"), *layers("model.layers"))
    pair = pair_of(tmp_path, both, both, {}, llama_config())
    assert pair.correspondence.twins == {name: name for name in both}


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def ties(
    folder: Path, pre: list[str], post: list[str], pre_config: Any = None, post_config: Any = None
) -> Correspondence:
    stack = layers("model.layers")
    return pair_of(
        folder,
        zeros(*stack, *pre),
        zeros(*stack, *post),
        llama_config(**pre_config or {}),
        llama_config(**post_config or {}),
    ).correspondence


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "unknown"},
        {"tie_word_embeddings": True},
        {"text_config": {"tie_word_embeddings": True}},
        {"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": False},
        {"model_type": "gemma2"},
    ],
)
def test_a_head_that_is_not_stored_is_the_embedding(tmp_path: Path, config: dict[str, Any]) -> None:
    found = ties(tmp_path, [EMBED], [EMBED, HEAD], config, {"tie_word_embeddings": False})
    assert (found.twins[HEAD], found.by_tie) == (EMBED, {HEAD})
    assert found.tied == []


@pytest.mark.parametrize("config", [{"tie_word_embeddings": False}, {"model_type": "llama"}])
def test_a_head_that_is_missing_from_an_untied_model_is_not_its_embedding(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    found = ties(tmp_path, [EMBED], [EMBED, HEAD], config)
    assert HEAD not in found.twins
    assert found.embeddings.head == HEAD


def test_a_head_of_another_width_is_not_the_embedding(tmp_path: Path) -> None:
    stack = zeros(*layers("model.layers"))
    post = stack | zeros(EMBED) | zeros(HEAD, shape=(4, 3))
    assert HEAD not in pair_of(tmp_path, stack | zeros(EMBED), post).correspondence.twins


@pytest.mark.parametrize(
    ("pre", "post"),
    [
        ([HEAD], [EMBED]),
        ([EMBED], [HEAD]),
        (["model.shared.weight"], ["model.decoder.embed_tokens.weight"]),
        (["model.encoder.embed_tokens.weight"], ["model.shared.weight"]),
        (["shared.weight"], ["encoder.embed_tokens.weight"]),
        (["gpt_neox.embed_in.weight"], ["gpt_neox.embed_in.weight", "embed_out.weight"]),
        (["wte.weight"], ["transformer.wte.weight", HEAD]),
        (
            ["bert.embeddings.word_embeddings.weight"],
            ["embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"],
        ),
        (["model.decoder.embed_tokens.weight"], ["model.decoder.embed_tokens.weight", "proj_out.weight"]),
        (["biogpt.embed_tokens.weight"], ["biogpt.embed_tokens.weight", "output_projection.weight"]),
        (["model.embeddings.tok_embeddings.weight"], ["model.embeddings.tok_embeddings.weight", "decoder.weight"]),
        (["rwkv.embeddings.weight"], ["rwkv.embeddings.weight", "head.weight"]),
        (["transformer.w.weight"], ["transformer.w.weight", HEAD]),
        (["transformer.tokens_embed.weight"], ["transformer.tokens_embed.weight", HEAD]),
    ],
)
def test_one_tensor_is_found_under_whichever_of_its_names_is_stored(
    tmp_path: Path, pre: list[str], post: list[str]
) -> None:
    unknown = {"model_type": "unknown"}
    found = ties(tmp_path, pre, post, unknown, unknown)
    assert found.twins.keys() >= set(post)
    assert {found.twins[name] for name in post} == set(pre)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"tie_word_embeddings": True}, [EMBED, HEAD]),
        ({"text_config": {"tie_word_embeddings": True}}, [EMBED, HEAD]),
        ({"model_type": "gpt2"}, ["wte.weight", HEAD]),
        ({"model_type": "t5"}, ["shared.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight", HEAD]),
        ({}, ["model.shared.weight", "model.encoder.embed_tokens.weight"]),
        ({}, ["cls.predictions.bias", "cls.predictions.decoder.bias"]),
    ],
)
def test_stored_tensors_that_a_loader_makes_one_are_tied(
    tmp_path: Path, config: dict[str, Any], names: list[str]
) -> None:
    (group,) = ties(tmp_path, names, names, config, config).tied
    assert set(group) == set(names)
    assert group[0] == names[0]


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({}, [EMBED, HEAD]),
        ({"tie_word_embeddings": False, "model_type": "gemma"}, [EMBED, HEAD]),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, [EMBED, HEAD]),
        (
            {"share_encoder_decoder_embeddings": False},
            ["model.shared.weight", "model.decoder.embed_tokens.weight"],
        ),
        ({"tie_word_embeddings": True}, [EMBED]),
    ],
)
def test_tensors_that_a_loader_keeps_apart_are_not_tied(
    tmp_path: Path, config: dict[str, Any], names: list[str]
) -> None:
    assert ties(tmp_path, names, names, config, config).tied == []


def test_what_is_tied_now_was_trained_from_the_embedding(tmp_path: Path) -> None:
    found = ties(tmp_path, [EMBED, HEAD], [EMBED, HEAD], {"tie_word_embeddings": False}, {"tie_word_embeddings": True})
    assert found.twins[HEAD] == found.twins[EMBED] == EMBED


def info(dtype: str, *shape: int) -> TensorInfo:
    return TensorInfo(dtype, shape, 0, 0)


@pytest.mark.parametrize(
    ("name", "tensor", "constant"),
    [
        ("h.0.attn.bias", info("BOOL", 1, 1, 32, 32), True),
        ("h.0.attn.bias", info("U8", 1, 1, 32, 32), True),
        ("h.0.attn.bias", info("F32", 1, 1, 32, 32), True),
        ("h.0.attn.bias", info("F32", 1, 1, 16, 16), False),
        ("h.0.attn.bias", info("F32", 32, 32), False),
        ("h.0.attn.bias", info("F32", 32), False),
        ("h.0.attn.bias", info("F32", 1, 4, 32, 32), False),
        ("h.0.attn.bias", info("BOOL", 32), False),
        ("h.0.attn.bias", info("U8", 1, 1), False),
        ("h.0.attn.c_attn.bias", info("BOOL", 1, 1, 32, 32), False),
        ("gpt_neox.layers.0.attention.bias", info("BOOL", 1, 1, 32, 32), True),
        ("h.0.attn.causal_mask", info("BOOL", 1, 1, 32, 32), True),
        ("h.0.mlp.bias", info("BOOL", 1, 1, 32, 32), False),
        ("h.0.attn.masked_bias", info("F32"), True),
        ("h.0.attn.masked_bias", info("F32", 8), False),
        ("layers.0.self_attn.rotary_emb.inv_freq", info("F32", 16), True),
        ("layers.0.self_attn.rotary_emb.inv_freq", info("F32", 4, 16), False),
        ("layers.0.self_attn.rotary_emb.cos_cached", info("F32", 1, 1, 32, 16), True),
        ("rotary_emb.sin_cached", info("F16", 32, 16), True),
        ("freqs_cis", info("C64", 32, 8), True),
        ("freqs_cis", info("F32", 32, 8, 2), True),
        ("layers.0.cos_cached", info("I32", 32, 16), False),
        ("embeddings.position_ids", info("I64", 1, 512), True),
        ("embeddings.position_embeddings.weight", info("F32", 32, 8), False),
    ],
)
def test_constants_are_told_from_weights_by_name_shape_and_dtype(name: str, tensor: TensorInfo, constant: bool) -> None:
    assert is_constant(name, tensor, {"n_positions": 32}) == constant


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ((4, 6), (4, 6), True),
        ((4, 6), (24,), True),
        ((4, 1, 6), (4, 6), True),
        ((2, 3, 4), (6, 4), True),
        ((2, 3, 4), (2, 12), True),
        ((), (1, 1), True),
        ((4, 6), (6, 4), False),
        ((2, 3, 4), (2, 4, 3), False),
        ((6, 4), (2, 2, 6), False),
        ((4, 6), (4, 5), False),
        ((4,), (4, 2), False),
        ((0, 3), (0,), False),
    ],
)
def test_shapes_that_differ_in_grouping_only_have_the_same_elements(
    first: tuple[int, ...], second: tuple[int, ...], same: bool
) -> None:
    assert is_regrouped(first, second) == is_regrouped(second, first) == same


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", ("experts", True)),
        ("model.layers.0.mlp.experts.down_proj", ("experts", True)),
        ("model.layers.0.mlp.experts.3.gate_proj.weight", ("experts", False)),
        ("model.layers.0.self_attn.qkv_proj.weight", ("queries, keys and values", True)),
        ("transformer.h.0.attn.c_attn.bias", ("queries, keys and values", True)),
        ("model.layers.0.self_attn.k_proj.weight", ("queries, keys and values", False)),
        ("model.layers.0.mlp.gate_up_proj.weight", ("gate and up projections", True)),
        ("model.layers.0.mlp.up_proj.weight", ("gate and up projections", False)),
        ("model.layers.0.mlp.down_proj.weight", None),
        ("model.layers.0.input_layernorm.weight", None),
    ],
)
def test_names_say_what_is_fused(name: str, found: tuple[str, bool] | None) -> None:
    assert fusion(name) == found
