"""Tiny configs of every type of causal and image-text model in transformers, by the settings that they have."""

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from slrmerge.searching.sweep.trie import Context
from tests.searching.sweep.models import transformers_log_probs

LAYERS = 4

_SIZES: dict[str, Any] = {
    # width
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim_model", "embedding_size", "emb_dim", "lru_width",
                     "word_embed_proj_dim", "attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "d_inner",
                     "dim_ff", "dff"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank",
                     "qk_head_dim"), 16),
    "shared_intermediate_size": 32, "vocab_size": 97, "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    # depth
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers",
                     "encoder_layers", "num_encoder_layers"), LAYERS), "first_k_dense_replace": 1,
    # heads
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "attention_head_size", "qk_rope_head_dim", "qk_nope_head_dim",
                     "v_head_dim", "linear_key_head_dim", "linear_value_head_dim", "rotary_dim",
                     "query_pre_attn_scalar"), 8),
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2), "n_group": 1, "topk_group": 1,
    # recurrences
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8), "mamba_n_groups": 1, "n_groups": 1,
    **dict.fromkeys(("mamba_d_conv", "mamba_dt_rank", "conv_kernel"), 4), "mamba_expand": 2, "expand": 2,
    # positions
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len",
                     "original_max_position_embeddings"), 128),
    **dict.fromkeys(("sliding_window", "window_size", "sliding_window_size", "attention_window_size", "local_attention",
                     "attention_chunk_size"), 6), "sliding_window_pattern": 2,
    # tokens
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
    "tie_word_embeddings": False, "type_vocab_size": 2,
}  # fmt: skip
"""What makes a model small, by the names of settings in configs."""

_ONLY_WHERE_SET = ("sliding_window", "window_size", "attention_window_size", "q_lora_rank")
"""Settings that stay None where they are None by default."""

_VISION: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "out_hidden_size", "hidden_dim", "projection_dim", "vision_output_dim",
                     "projector_input_dim", "projector_output_dim", "image_size", "window_size", "output_hidden_size",
                     "output_proj_dims", "image_emb_dim", "width"), 32),
    **dict.fromkeys(("intermediate_size", "mlp_dim", "mlp_hidden_size"), 64),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads", "attention_heads",
                     "default_output_length", "num_image_tokens"), 4),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers"), 2), "num_global_layers": 1, "patch_size": 16,
    "num_channels": 3, "in_channels": 3, "head_dim": 8, "global_head_dim": 8, "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0], "num_position_embeddings": 16, "rms_norm_eps": 1e-6,
}  # fmt: skip

_SLIDING = ["sliding_attention", "full_attention"] * 2
_LINEAR = ["linear_attention", "full_attention"] * 2

SETTINGS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2, "num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere": {"logit_scale": 1.0}, "cohere2": {"logit_scale": 1.0},
    "dots1": {"layer_types": _SLIDING, "n_shared_experts": 1},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": _SLIDING, "activation_sparsity_pattern": [0.0] * 4,
                     "laurel_rank": 8},
    "gemma4_text": {"num_experts": None, "enable_moe_block": False, "num_kv_shared_layers": 0, "layer_types": _SLIDING,
                    "global_head_dim": 8, "top_k_experts": None, "hidden_size_per_layer_input": 0},
    "glm4_moe": {"first_k_dense_replace": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"num_layers_per_stack": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"] * 2, "no_rope_layers": [1, 0, 1, 0],
                    "interleave_moe_layer_step": 2, "moe_layers": [1, 3], "intermediate_size_mlp": 64},
    "longcat_flash": {"num_layers": 4, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "qwen3_next": {"layer_types": _LINEAR},
    "qwen3_5_text": {"layer_types": _LINEAR}, "qwen3_5_moe_text": {"layer_types": _LINEAR},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local"] * 4, "feed_forward_size": 64},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "attention_hidden_size": 64, "attention_head_dim": 16,
              "use_mamba_kernels": False, "n_mamba_heads": 2, "num_key_value_heads": 4},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"] * 2, "layers_block_type": ["mamba", "hybrid"] * 2,
               "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "hybrid_layer_ids": [1, 3],
               "num_mem_blocks": 1, "attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What types need besides the sizes."""

_AS_MANY_GROUPS = (
    "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa",
    "glm4_moe_lite", "minicpm3", "youtu",
)  # fmt: skip
"""Types with as many groups of keys as heads."""

_DECODERS_ON_REQUEST = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip
"""Types that are encoders by default."""

for _name in _AS_MANY_GROUPS:
    SETTINGS.setdefault(_name, {})["num_key_value_heads"] = 4
for _name in _DECODERS_ON_REQUEST:
    SETTINGS.setdefault(_name, {})["is_decoder"] = True

_MROPE = {"rope_type": "default", "rope_theta": 1e4}
TEXT_SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]}},
    "qwen2_5_vl": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]}},
    "qwen3_vl": {"rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1]}},
    "qwen3_vl_moe": {"rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1]}},
}
"""What the decoders of image-text models need besides."""

_TEXT_CONFIGS = ("text_config", "language_config", "llm_config")


def causal_types() -> list[str]:
    """The types of config that transformers' AutoModelForCausalLM knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(architecture: str, **more: Any) -> Any:
    """The config of a tiny model of this type, its vision tower included."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[architecture]
    settings = _settings(kind, _SIZES, {**SETTINGS.get(architecture, {}), **more})
    for name in kind.sub_configs if settings.keys().isdisjoint(kind.sub_configs) else ():
        if (part := getattr(kind(), name, None)) is None:
            continue
        if name in _TEXT_CONFIGS:
            inner = {**SETTINGS.get(part.model_type, {}), **TEXT_SETTINGS.get(architecture, {})}
            made = _settings(type(part), _SIZES, inner)
        else:
            made = _settings(type(part), _VISION, {})
        settings[name] = {**made, "model_type": part.model_type}
    fields = _fields(kind)
    for name in fields:
        if name.endswith(("token_id", "token_index")) and name.startswith(
            ("image", "video", "audio", "boi", "eoi", "vision")
        ):
            settings[name] = 96
    settings |= {name: 4 for name in ("mm_tokens_per_image", "image_seq_length") if name in fields}
    return kind(**settings)


def _settings(kind: Any, sizes: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The sizes that a config has, and more."""
    fields, defaults = _fields(kind), None
    if any(name in fields for name in _ONLY_WHERE_SET):
        defaults = kind()
    return {
        name: size
        for name, size in sizes.items()
        if name in fields and not (name in _ONLY_WHERE_SET and getattr(defaults, name, None) is None)
    } | more


def _fields(kind: Any) -> set[str]:
    if dataclasses.is_dataclass(kind):
        return {field.name for field in dataclasses.fields(kind)}
    return set(inspect.signature(kind.__init__).parameters)


def write_family(folder: Path, architecture: str, *, kind: str = "causal", dtype: torch.dtype = torch.float32) -> Path:
    """Two tiny models of a type, `folder/pre` and `folder/post`, as transformers writes them."""
    for seed, side in enumerate(("pre", "post")):
        torch.manual_seed(seed)
        model = auto_class(kind).from_config(small_config(architecture), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
            for name, buffer in model.named_buffers():
                if name.endswith("bias") and buffer.is_floating_point():  # by which experts are chosen
                    buffer.add_(torch.randn_like(buffer) * 0.05)
        model.to(dtype).save_pretrained(folder / side)
    return folder


def auto_class(kind: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if kind == "vision" else AutoModelForCausalLM


def mixed_by_hand(folder: Path, first: int, last: int, prefix: str) -> Path:
    """The post-trained model with these layers of the pre-trained one, tensor by tensor, without slrmerge."""
    pre, post = (load_file(folder / side / "model.safetensors") for side in ("pre", "post"))
    layers = tuple(f"{prefix}.{number}." for number in range(first, last + 1))
    out = folder / f"hybrid-{first}-{last}"
    copytree(folder / "post", out)
    tensors = {name: pre[name] if name.startswith(layers) else tensor for name, tensor in post.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def log_probs_of(folder: Path, contexts: Sequence[Context], *, kind: str = "causal") -> NDArray[np.float64]:
    """By transformers' own loader and forward, in fp32, one context at a time, shape (contexts, targets)."""
    return transformers_log_probs(folder, contexts, auto_class(kind))
