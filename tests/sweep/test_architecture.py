"""Which models a sweep takes, and in whole sentences why it does not take the others."""

from pathlib import Path
from typing import Any

import pytest
import torch

from slrmerge.errors import UnsupportedModelError
from slrmerge.hub import open_checkpoint
from slrmerge.sweep.architecture import REMEDY, head_name, is_tied, model_without_weights
from slrmerge.sweep.model import StagedModel
from tests.checkpoints import llama_config, llama_tensors, random_tensor, write_checkpoint
from tests.sweep.models import (
    ARCHITECTURES,
    LAYERS,
    POST,
    config_of,
    edit_config,
    prompts,
    random_model,
    sweeper,
)


def build(folder: Path) -> Any:
    return model_without_weights(open_checkpoint(folder), dtype=torch.float32, attention="eager")


def stage(folder: Path) -> StagedModel:
    return StagedModel(open_checkpoint(folder), dtype=torch.float32, device=torch.device("cpu"))


def write_model(folder: Path, architecture: str, **more: Any) -> Path:
    random_model(config_of(architecture, **more), seed=0).save_pretrained(folder)
    return folder


def refusal(folder: Path) -> str:
    """The message, each line of which names the folder and ends with the remedy; without both."""
    with pytest.raises(UnsupportedModelError) as caught:
        stage(folder)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{folder}: ") and line.endswith(f"; {REMEDY}") for line in lines)
    return "\n".join(line[len(f"{folder}: ") : -len(f"; {REMEDY}")] for line in lines)


BY_CONFIG: dict[str, tuple[str, dict[str, Any], str]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4}, "is a mixture of experts (mixtral), which has not been tried"),
    "qwen3-moe": ("qwen3_moe", {"num_experts": 4}, "is a mixture of experts (qwen3_moe), which has not been tried"),
    "linear attention": (
        "qwen3_next",
        {"num_experts": 0, "layer_types": ["linear_attention", "full_attention"] * 2},
        "has layers that are not plain attention: linear_attention (qwen3_next)",
    ),
    "linear attention and experts": (
        "qwen3_next",
        {"num_experts": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
        (
            "is a mixture of experts (qwen3_next), which has not been tried\n"
            "has layers that are not plain attention: linear_attention (qwen3_next)"
        ),
    ),
    "chunked attention": (
        "llama4_text",
        {"num_local_experts": 1, "layer_types": ["chunked_attention", "full_attention"] * 2},
        "has layers that are not plain attention: chunked_attention (llama4_text)",
    ),
    "no attention": ("mamba", {}, "has layers that are not plain attention: linear_attention (mamba)"),
    "shared keys and values": (
        "gemma3n_text",
        {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "has layers that share keys and values (gemma3n_text), so they do not stand alone",
    ),
    "encoder and decoder": ("t5", {"num_layers": LAYERS}, "is an encoder-decoder model"),
}


@pytest.mark.parametrize(("architecture", "more", "what"), BY_CONFIG.values(), ids=BY_CONFIG)
def test_what_the_config_rules_out_is_refused_by_name(
    tmp_path: Path, architecture: str, more: dict[str, Any], what: str
) -> None:
    config = config_of(architecture, **more).to_dict()
    write_checkpoint(tmp_path / "post", llama_tensors("post", layers=LAYERS), config)
    assert refusal(tmp_path / "post") == what


def test_a_config_with_a_word_for_a_number_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "post", "llama")
    edit_config(tmp_path / "post", rms_norm_eps="very small")
    assert refusal(tmp_path / "post").startswith("transformers does not read its config (")


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "post", "llama")
    edit_config(tmp_path / "post", quantization_config={"quant_method": "fp8"})
    assert refusal(tmp_path / "post") == "is quantised"


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    config = config_of("qwen3_moe", num_experts=4, quantization_config={"quant_method": "fp8"}).to_dict()
    write_checkpoint(tmp_path / "post", llama_tensors("post", layers=LAYERS), config)
    expected = "is quantised\nis a mixture of experts (qwen3_moe), which has not been tried"
    assert refusal(tmp_path / "post") == expected


def test_custom_code_is_refused_and_not_run(tmp_path: Path) -> None:
    code = "raise SystemExit('this was run')\n"
    config = {**llama_config(layers=LAYERS), "model_type": "house_made"}
    config |= {"auto_map": {"AutoConfig": "house.HouseConfig", "AutoModelForCausalLM": "house.HouseForCausalLM"}}
    post = write_checkpoint(
        tmp_path / "post", llama_tensors("post", layers=LAYERS), config, side_files={"house.py": code}
    )
    said = refusal(post)
    assert said.startswith("transformers does not read its config (The repository ")
    assert "custom code" in said
    assert "\n" not in said


def test_a_model_type_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    config = {**llama_config(layers=LAYERS), "model_type": "house_made"}
    post = write_checkpoint(tmp_path / "post", llama_tensors("post", layers=LAYERS), config)
    said = refusal(post)
    assert said.startswith(
        "transformers does not read its config (The checkpoint you are trying to load has model type "
    )
    assert "\n" not in said


def test_tensors_that_the_model_needs_and_the_checkpoint_lacks_are_named(tmp_path: Path) -> None:
    tensors = llama_tensors("post", layers=LAYERS, hidden=32, vocabulary=97)
    tensors["model.norm.weight"] = random_tensor("BF16", (31,), "odd")
    post = write_checkpoint(tmp_path / "post", tensors, config_of("llama", intermediate_size=64).to_dict())
    layer = "LlamaForCausalLM needs model.layers.0"
    with pytest.raises(UnsupportedModelError) as caught:
        stage(post)
    missing = len([*_llama_names()]) - len(tensors)
    keys = LAYERS  # have another shape, for there are fewer groups than heads
    assert str(caught.value).splitlines() == [
        f"{post}: {layer}.self_attn.k_proj.weight of shape [16, 32], the checkpoint has [32, 32]; {REMEDY}",
        f"{post}: {layer}.self_attn.v_proj.weight of shape [16, 32], the checkpoint has no such tensor; {REMEDY}",
        f"{post}: {layer}.self_attn.o_proj.weight of shape [32, 32], the checkpoint has no such tensor; {REMEDY}",
        f"{post}: and {missing + keys + 1 - 3} more",
    ]


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
    expected = "LlamaForCausalLM needs model.embed_tokens.weight of shape [16, 8], the checkpoint has no such tensor"
    assert refusal(post) == expected


INNER = {
    "attention that is not exchangeable": (
        "gptj",
        {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "rotary_dim": 8, "n_positions": 64},
    ),
    "positions that are not rotary": ("gpt2", {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}),
    "attention twice in a layer": ("diffllama", {}),
    "no causal mask": ("bert", {}),
    "layers that are not told all": ("stablelm", {}),
    "alibi": ("bloom", {"n_layer": LAYERS, "n_head": 4}),
    "attention sinks": ("granite_swa", {"sliding_window": 6, "layer_types": ["sliding_attention"] * LAYERS}),
}


@pytest.mark.parametrize(("architecture", "more"), INNER.values(), ids=INNER)
def test_a_model_of_another_make_is_refused_and_never_crashes(
    tmp_path: Path, architecture: str, more: dict[str, Any]
) -> None:
    write_model(tmp_path / "pre", architecture, **more)
    write_model(tmp_path / "post", architecture, **more)
    with pytest.raises(UnsupportedModelError) as caught, sweeper(tmp_path) as ready:
        ready.check(prompts()[:2], POST)
    assert str(caught.value).endswith(f"; {REMEDY}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_hold_nothing_and_buffers_are_real(tmp_path: Path, architecture: str) -> None:
    post = write_model(tmp_path / "post", architecture)
    built, loaded = build(post), random_model(config_of(architecture), seed=0)
    assert {parameter.device.type for parameter in built.parameters()} == {"meta"}
    assert not built.training
    buffers = dict(built.named_buffers())
    assert buffers.keys() == dict(loaded.named_buffers()).keys()
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffers[name], buffer)


def test_building_leaves_torch_as_it_was(tmp_path: Path) -> None:
    before = torch.nn.Module.register_parameter
    build(write_model(tmp_path / "post", "llama"))
    assert torch.nn.Module.register_parameter is before
    edit_config(tmp_path / "post", hidden_act="no such thing")
    with pytest.raises(UnsupportedModelError) as caught:
        build(tmp_path / "post")
    assert str(caught.value) == f"{tmp_path / 'post'}: transformers cannot build it ('no such thing'); {REMEDY}"
    assert torch.nn.Module.register_parameter is before


@pytest.mark.parametrize(("tied", "stored"), [(True, False), (False, True)])
def test_a_head_is_the_embedding_where_the_config_ties_them_and_none_is_stored(
    tmp_path: Path, tied: bool, stored: bool
) -> None:
    post = write_model(tmp_path / "post", "llama", tie_word_embeddings=tied)
    checkpoint, model = open_checkpoint(post), build(post)
    assert ("lm_head.weight" in checkpoint) == stored
    assert head_name(model) == "lm_head.weight"
    assert is_tied(checkpoint, model) == tied
    assert stage(post).head_name == ("model.embed_tokens.weight" if tied else "lm_head.weight")


def test_buffers_that_the_checkpoint_stores_are_refused(tmp_path: Path) -> None:
    """Apertus keeps constants of its activation so, which transformers loads; the self-check would not see it."""
    post = write_model(tmp_path / "post", "apertus")
    what = "ApertusForCausalLM keeps model.layers.0.mlp.act_fn.beta as a buffer, which a sweep does not load"
    assert refusal(post) == what
