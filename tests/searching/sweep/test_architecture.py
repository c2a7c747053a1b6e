"""Which models a sweep supports, and why it refuses the others."""

from pathlib import Path
from typing import Any

import pytest
import torch

from slrmerge.checkpoint.pair import open_checkpoint
from slrmerge.errors import UnsupportedModelError
from slrmerge.searching.sweep.architecture import head_name, is_tied, model_without_weights
from slrmerge.searching.sweep.model import StagedModel
from tests.checkpoints import llama_config, llama_tensors, random_tensor, write_checkpoint
from tests.problems import refused
from tests.searching.sweep.models import (
    ARCHITECTURES,
    LAYERS,
    POST,
    alphas_of,
    config_of,
    contexts,
    edit_config,
    local_scorer,
    random_model,
)


def build(folder: Path) -> Any:
    return model_without_weights(open_checkpoint(folder), dtype=torch.float32, attention="eager")


def stage(folder: Path) -> StagedModel:
    return StagedModel(open_checkpoint(folder), dtype=torch.float32, device=torch.device("cpu"))


def write_model(folder: Path, architecture: str, **more: Any) -> Path:
    random_model(config_of(architecture, **more), seed=0).save_pretrained(folder)
    return folder


def assert_refused(folder: Path, *codes: str) -> list[str]:
    """The model in `folder` is refused with problems of these codes; returns what they say."""
    with refused(UnsupportedModelError, *codes) as caught:
        stage(folder)
    assert {problem.where for problem in caught.value.problems} == {str(folder)}
    return [problem.what for problem in caught.value.problems]


BY_CONFIG: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4}, ["mixture-of-experts"]),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 4}, ["mixture-of-experts"]),
    "linear attention": (
        "qwen3_next",
        {"num_experts": 0, "layer_types": ["linear_attention", "full_attention"] * 2},
        ["unsupported-layer-type"],
    ),
    "linear attention and experts": (
        "qwen3_next",
        {"num_experts": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
        ["mixture-of-experts", "unsupported-layer-type"],
    ),
    "chunked attention": (
        "llama4_text",
        {"num_local_experts": 1, "layer_types": ["chunked_attention", "full_attention"] * 2},
        ["unsupported-layer-type"],
    ),
    "no attention": ("mamba", {}, ["unsupported-layer-type"]),
    "shared keys and values": (
        "gemma3n_text",
        {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
        ["shared-keys-and-values"],
    ),
    "encoder and decoder": ("t5", {"num_layers": LAYERS}, ["encoder-decoder"]),
}


@pytest.mark.parametrize(("architecture", "more", "codes"), BY_CONFIG.values(), ids=BY_CONFIG)
def test_unsupported_configs_are_refused(
    tmp_path: Path, architecture: str, more: dict[str, Any], codes: list[str]
) -> None:
    config = config_of(architecture, **more).to_dict()
    write_checkpoint(tmp_path / "post", llama_tensors("post", layers=LAYERS), config)
    assert_refused(tmp_path / "post", *codes)


def test_a_config_with_a_word_for_a_number_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "post", "llama")
    edit_config(tmp_path / "post", rms_norm_eps="very small")
    assert_refused(tmp_path / "post", "config-not-readable")


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "post", "llama")
    edit_config(tmp_path / "post", quantization_config={"quant_method": "fp8"})
    assert_refused(tmp_path / "post", "quantised-model")


def test_all_problems_of_a_config_are_reported_at_once(tmp_path: Path) -> None:
    config = config_of("qwen3_moe", num_experts=4, quantization_config={"quant_method": "fp8"}).to_dict()
    write_checkpoint(tmp_path / "post", llama_tensors("post", layers=LAYERS), config)
    assert_refused(tmp_path / "post", "quantised-model", "mixture-of-experts")


def test_custom_code_is_refused_and_not_run(tmp_path: Path) -> None:
    code = "raise SystemExit('this was run')\n"
    config = {**llama_config(layers=LAYERS), "model_type": "house_made"}
    config |= {"auto_map": {"AutoConfig": "house.HouseConfig", "AutoModelForCausalLM": "house.HouseForCausalLM"}}
    post = write_checkpoint(
        tmp_path / "post", llama_tensors("post", layers=LAYERS), config, side_files={"house.py": code}
    )
    (what,) = assert_refused(post, "config-not-readable")
    assert "custom code" in what
    assert "\n" not in what


def test_a_model_type_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    config = {**llama_config(layers=LAYERS), "model_type": "house_made"}
    post = write_checkpoint(tmp_path / "post", llama_tensors("post", layers=LAYERS), config)
    (what,) = assert_refused(post, "config-not-readable")
    assert "model type" in what
    assert "\n" not in what


def test_missing_tensors_and_other_shapes_are_named(tmp_path: Path) -> None:
    tensors = llama_tensors("post", layers=LAYERS, hidden=32, vocabulary=97)
    tensors["model.norm.weight"] = random_tensor("BF16", (31,), "odd")
    post = write_checkpoint(tmp_path / "post", tensors, config_of("llama", intermediate_size=64).to_dict())
    missing = len([*_llama_names()]) - len(tensors)
    keys = LAYERS  # have another shape, for there are fewer groups than heads
    first, second, third, rest = assert_refused(post, "parameter-mismatch")
    assert "model.layers.0.self_attn.k_proj.weight of shape [16, 32]" in first
    assert "model.layers.0.self_attn.v_proj.weight of shape [16, 32]" in second
    assert "model.layers.0.self_attn.o_proj.weight of shape [32, 32]" in third
    assert f" {missing + keys + 1 - 3} " in rest


def _llama_names() -> list[str]:
    return [name for name, _ in random_model(config_of("llama"), seed=0).named_parameters()]


def test_one_tensor_under_another_name_is_refused(tmp_path: Path) -> None:
    tensors = llama_tensors("post", layers=LAYERS, tied=True)
    del tensors["model.embed_tokens.weight"]
    assert "model.norm.weight" in tensors
    model = config_of("llama", hidden_size=8, intermediate_size=16, num_key_value_heads=4, vocab_size=16)
    for layer in range(LAYERS):
        start = f"model.layers.{layer}."
        tensors[start + "post_attention_layernorm.weight"] = random_tensor("BF16", (8,), layer)
        tensors[start + "mlp.gate_proj.weight"] = random_tensor("BF16", (16, 8), layer)
        for name in ("v", "o"):
            tensors[start + f"self_attn.{name}_proj.weight"] = random_tensor("BF16", (8, 8), layer)
    tensors["lm_head.weight"] = tensors["model.wte.weight"] = random_tensor("BF16", (16, 8), "embedding")
    post = write_checkpoint(tmp_path / "post", tensors, model.to_dict())
    (what,) = assert_refused(post, "parameter-mismatch")
    assert "model.embed_tokens.weight of shape [16, 8]" in what


INNER: dict[str, tuple[str, dict[str, Any], str]] = {
    "attention that cannot be replaced": (
        "gptj",
        {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "rotary_dim": 8, "n_positions": 64},
        "attention-not-replaceable",
    ),
    "positions that are not rotary": (
        "gpt2",
        {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
        "unsupported-layer-call",
    ),
    "attention twice in a layer": ("diffllama", {}, "attention-not-called-once"),
    "no causal mask": ("bert", {}, "unsupported-layer-call"),
    "layer arguments that attention does not get": ("stablelm", {}, "attention-arguments-lost"),
    "alibi": ("bloom", {"n_layer": LAYERS, "n_head": 4}, "unsupported-layer-call"),
    "attention sinks": (
        "granite_swa",
        {"sliding_window": 6, "layer_types": ["sliding_attention"] * LAYERS},
        "unknown-attention-argument",
    ),
}


@pytest.mark.parametrize(("architecture", "more", "code"), INNER.values(), ids=INNER)
def test_models_with_an_unsupported_forward_are_refused(
    tmp_path: Path, architecture: str, more: dict[str, Any], code: str
) -> None:
    write_model(tmp_path / "pre", architecture, **more)
    write_model(tmp_path / "post", architecture, **more)
    with refused(UnsupportedModelError, code), local_scorer(tmp_path) as scorer:
        scorer.check(alphas_of(scorer.pair, POST), contexts()[:2])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_are_on_meta_and_buffers_have_their_values(tmp_path: Path, architecture: str) -> None:
    post = write_model(tmp_path / "post", architecture)
    built, loaded = build(post), random_model(config_of(architecture), seed=0)
    assert {parameter.device.type for parameter in built.parameters()} == {"meta"}
    assert not built.training
    buffers = dict(built.named_buffers())
    assert buffers.keys() == dict(loaded.named_buffers()).keys()
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffers[name], buffer)


def test_parameters_are_made_as_usual_after_building(tmp_path: Path) -> None:
    build(write_model(tmp_path / "post", "llama"))
    assert torch.nn.Linear(1, 1).weight.device.type == "cpu"
    edit_config(tmp_path / "post", hidden_act="no such thing")
    with refused(UnsupportedModelError, "model-not-buildable"):
        build(tmp_path / "post")
    assert torch.nn.Linear(1, 1).weight.device.type == "cpu"


@pytest.mark.parametrize(("tied", "stored"), [(True, False), (False, True)])
def test_a_head_is_the_embedding_where_it_is_tied_and_not_stored(tmp_path: Path, tied: bool, stored: bool) -> None:
    post = write_model(tmp_path / "post", "llama", tie_word_embeddings=tied)
    checkpoint, model = open_checkpoint(post), build(post)
    assert ("lm_head.weight" in checkpoint) == stored
    assert head_name(model) == "lm_head.weight"
    assert is_tied(checkpoint, model) == tied
    assert stage(post).head_name == ("model.embed_tokens.weight" if tied else "lm_head.weight")


def test_buffers_that_the_checkpoint_stores_are_refused(tmp_path: Path) -> None:
    """Apertus keeps constants of its activation this way, which transformers loads; the check would not notice."""
    post = write_model(tmp_path / "post", "apertus")
    (what,) = assert_refused(post, "stored-buffer")
    assert "model.layers.0.mlp.act_fn.beta" in what
