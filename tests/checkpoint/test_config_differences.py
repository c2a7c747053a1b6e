"""Configs are compared by what they mean, in the words of transformers 4 and 5."""

from typing import Any

import pytest

from slrmerge.checkpoint.config_differences import compare_configs

LLAMA = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MISTRAL = {**LLAMA, "model_type": "mistral"}
GEMMA = {**LLAMA, "model_type": "gemma"}


@pytest.mark.parametrize(
    ("pre", "post"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 500000, "rope_type": "default"}}),
        ({}, {"rope_theta": 10000}),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32}}, {
            "rope_scaling": YARN
        }),
        ({"rope_theta": 1e6, "rope_scaling": YARN}, {"rope_parameters": {**YARN, "rope_theta": 1e6}}),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": None}, "max_position_embeddings": 32}, {
            "rope_scaling": {"type": "yarn", "factor": 4}, "max_position_embeddings": 32
        }),
        ({"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8}}, {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000},
            }
        }),
        ({"rope_scaling": None}, {"rope_scaling": {"type": "mrope"}}),
        ({"partial_rotary_factor": 1.0}, {}),
        ({"text_config": {"rope_theta": 1e6}}, {"rope_theta": 1e6}),
        ({"hidden_act": "swish"}, {"hidden_activation": "silu"}),
        ({"rms_norm_eps": 1e-6}, {}),
        ({"attention_bias": False, "mlp_bias": None}, {}),
        ({"num_key_value_heads": 4, "head_dim": 8}, {}),
        ({"sliding_window": 4096, "use_sliding_window": False}, {"sliding_window": None}),
        ({"sliding_window_pattern": 2}, {"layer_types": ["sliding_attention", "full_attention"] * 2}),
        ({"embedding_multiplier": 1.0, "pretraining_tp": 1}, {}),
        ({"eos_token_id": 1, "bos_token_id": [3], "use_cache": True, "vocab_size": 9, "transformers_version": "4"}, {}),
        ({"_name_or_path": "x", "dtype": "bfloat16", "max_position_embeddings": 9, "attention_dropout": 0.1}, {}),
        ({"quantization_config": {"bits": 4}, "vision_config": {"a": 1}, "architectures": ["A"], "auto_map": {}}, {}),
    ],
)  # fmt: skip
def test_equal_meanings_are_no_difference(pre: dict[str, Any], post: dict[str, Any]) -> None:
    assert compare_configs({**LLAMA, **pre}, {**LLAMA, **post}) == []
    assert compare_configs({**LLAMA, **post}, {**LLAMA, **pre}) == []


@pytest.mark.parametrize(
    ("pre", "post", "found"),
    [
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 1e4}}, ("rope_theta", 5e5, 1e4)),
        ({"rope_theta": 5e5}, {}, ("rope_theta", 5e5, 1e4)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_scaling": {"type": "linear", "factor": 4}}, (
            "factor", 2, 4,
        )),
        ({"rope_local_base_freq": 1e4}, {"rope_local_base_freq": 2e4}, ("rope_theta of sliding_attention", 1e4, 2e4)),
        ({"rotary_pct": 0.25}, {"partial_rotary_factor": 0.5}, ("partial_rotary_factor", 0.25, 0.5)),
        ({"rms_norm_eps": 1e-5}, {}, ("norm_epsilon", 1e-5, 1e-6)),
        ({"hidden_act": "gelu"}, {}, ("activation", "gelu", "silu")),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, {"model_type": "gemma3_text"}, (
            "final_logit_softcapping", 30.0, None,
        )),
        ({"model_type": "someones", "final_logit_softcapping": 30.0}, {"model_type": "someones"}, (
            "final_logit_softcapping", 30.0, None,
        )),
        ({"attention_bias": True}, {}, ("attention_bias", True, None)),
        ({"sliding_window": 512}, {"sliding_window": 1024}, ("sliding_window", 512, 1024)),
        ({"layer_types": ["full_attention"] * 4}, {"sliding_window_pattern": 2}, (
            "layer_types", ["full_attention"] * 4, ["sliding_attention", "full_attention"] * 2,
        )),
        ({"logit_scale": 0.0625}, {"logit_scale": 0.25}, ("logit_scale", 0.0625, 0.25)),
        ({"model_type": "granite", "residual_multiplier": 0.22}, {"model_type": "granite"}, (
            "residual_multiplier", 0.22, 1.0,
        )),
        ({"num_attention_heads": 8, "head_dim": 8, "num_key_value_heads": 4}, {}, ("num_attention_heads", 8, 4)),
        ({"n_head_kv": 2}, {}, ("num_key_value_heads", 2, 4)),
        ({"num_experts_per_tok": 2}, {"num_experts_per_tok": 4}, ("num_experts_per_tok", 2, 4)),
        ({"text_config": {"norm_eps": 1e-5}}, {}, ("norm_epsilon", 1e-5, 1e-6)),
        ({"someones_flag": True}, {"someones_flag": False}, ("someones_flag", True, None)),
        ({"model_type": "bailing_hybrid", "moe_renormalize": False}, {"model_type": "bailing_hybrid"}, (
            "norm_topk_prob", None, True,
        )),
        ({"model_type": "inkling_text", "unpadded_vocab_size": 7}, {"model_type": "inkling_text"}, (
            "unpadded_vocab_size", 7, None,
        )),
        ({"model_type": "roberta", "is_decoder": True}, {"model_type": "roberta"}, ("is_decoder", True, None)),
        ({"model_type": "modernbert-decoder", "classifier_activation": "relu"}, {"model_type": "modernbert-decoder"}, (
            "classifier_activation", "relu", "gelu",
        )),
        ({"model_type": "phimoe", "router_jitter_noise": 0.1}, {"model_type": "phimoe"}, (
            "router_jitter_noise", 0.1, 0.01,
        )),
        ({"model_type": "gemma", "hidden_act": "relu"}, {"model_type": "gemma", "hidden_act": "gelu"}, (
            "activation", "relu", "gelu_pytorch_tanh",
        )),
        ({"model_type": "gemma2", "hidden_activation": "relu", "hidden_act": "gelu"}, {"model_type": "gemma2"}, (
            "activation", "relu", "gelu_pytorch_tanh",
        )),
    ],
)  # fmt: skip
def test_real_differences_have_both_values(
    pre: dict[str, Any], post: dict[str, Any], found: tuple[str, Any, Any]
) -> None:
    assert compare_configs({**LLAMA, **pre}, {**LLAMA, **post}) == [found]
    assert compare_configs({**LLAMA, **post}, {**LLAMA, **pre}) == [(found[0], found[2], found[1])]


def test_the_part_of_an_omni_model_that_writes_is_compared() -> None:
    sides = ({"thinker_config": {"text_config": {"num_attention_heads": heads}}} for heads in (4, 8))
    assert "num_attention_heads" in {difference.setting for difference in compare_configs(*sides)}


def test_sections_about_parts_of_a_layer_are_compared_where_both_have_the_key() -> None:
    pre = {"attn_config": {"clip_qkv": None, "attn_pdrop": 0.1, "alibi": True}, "ffn_config": {"moe_top_k": 4}}
    post = {"attn_config": {"clip_qkv": 6.0, "attn_pdrop": 0.0}, "ffn_config": {"moe_top_k": 2, "x": 1}}
    expected = [("attn_config.clip_qkv", None, 6.0), ("ffn_config.moe_top_k", 4, 2)]
    assert compare_configs({"model_type": "dbrx", **pre}, {"model_type": "dbrx", **post}) == expected


@pytest.mark.parametrize("other", [None, {"rope_theta": 8e7}])
def test_the_rope_of_each_kind_of_attention_is_compared(other: dict[str, float] | None) -> None:
    pre, post = ({"indexed_attention": other, "sliding_attention": {"rope_theta": theta}} for theta in (1e4, 2e4))
    expected = [("rope_theta of sliding_attention", 1e4, 2e4)]
    assert compare_configs({**LLAMA, "rope_parameters": pre}, {**LLAMA, "rope_parameters": post}) == expected


def test_a_null_does_not_hide_the_same_setting_under_another_key() -> None:
    pre, post = ({"model_type": "cohere2_moe", "layer_norm_eps": eps, "rms_norm_eps": None} for eps in (1e-5, 1e-6))
    assert compare_configs(pre, post) == [("norm_epsilon", 1e-5, 1e-6)]


def test_an_absent_key_means_what_its_architecture_takes_it_for() -> None:
    assert compare_configs(MISTRAL, {**MISTRAL, "sliding_window": 4096}) == []
    assert compare_configs(MISTRAL, {**MISTRAL, "sliding_window": None}) == [("sliding_window", 4096, None)]
    assert compare_configs(GEMMA, {**GEMMA, "hidden_act": "gelu"}) == []  # what Gemma means by it
    assert compare_configs(GEMMA, {**GEMMA, "hidden_activation": "relu"}) == []  # Gemma 2's key
    assert compare_configs(GEMMA, {**GEMMA, "head_dim": 256}) == []
    assert [each.setting for each in compare_configs(GEMMA, {**GEMMA, "head_dim": 128})] == ["head_dim"]


LEGACY: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "head_dim": 8, "hidden_act": "silu", "use_sliding_window": False, "sliding_window": 4096, "num_experts": 4,
        "norm_topk_prob": True, "mlp_only_layers": [], "num_experts_per_tok": 2, "rope_theta": 1e6,
    },
    "gemma3_text": {"head_dim": 8, "sliding_window": 512, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    "granite": {"attention_multiplier": 0.0078, "logits_scaling": 8.0, "rope_theta": 1e7},
    "deepseek_v3": {
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "routed_scaling_factor": 2.5, "topk_group": 1,
        "n_routed_experts": 4, "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 16},
    },
    "gpt_neox": {"rotary_pct": 0.25, "rotary_emb_base": 10000, "hidden_act": "gelu"},
    "gpt_oss": {"sliding_window": 128, "rope_theta": 150000},
    "olmo3": {"sliding_window": 16, "rope_scaling": {**YARN, "attention_factor": 1.2}, "rope_theta": 5e5},
    "phi": {"partial_rotary_factor": 0.5, "hidden_act": "gelu_new"},
    "glm4": {"partial_rotary_factor": 0.5},
    "modernbert": {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0},
    "qwen2": {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28},
    "cohere2": {"logit_scale": 0.25, "sliding_window_pattern": 4},
}  # fmt: skip
"""Configs as they were written before transformers 5, which leave out or name otherwise what it writes."""


@pytest.mark.parametrize("model_type", LEGACY)
def test_a_config_and_what_transformers_writes_for_it_are_the_same(model_type: str) -> None:
    from transformers import AutoConfig

    legacy = {**LLAMA, "model_type": model_type, "num_attention_heads": 4, "max_position_embeddings": 64}
    legacy |= {"num_key_value_heads": 4, "intermediate_size": 64} | LEGACY[model_type]
    written = AutoConfig.for_model(**legacy).to_dict()
    assert compare_configs(legacy, written) == []
    assert compare_configs(written, legacy) == []


@pytest.mark.parametrize("value", [None, 7, "x", [], {}, [[1]], {"a": {"b": 1}}, {"": {}}, {"rope_type": []}, True])
def test_any_json_can_be_compared(value: Any) -> None:
    keys = ("rope_scaling", "rope_parameters", "rope_theta", "layer_types", "hidden_size", "num_attention_heads")
    for key in (*keys, "sliding_window_pattern", "hidden_act", "text_config", "model_type", "num_hidden_layers"):
        compare_configs({**LLAMA, key: value}, LLAMA)
        assert compare_configs({**LLAMA, key: value}, {**LLAMA, key: value}) == []
