"""What two configs disagree about, by meaning: only settings that change what the layers compute.

The same setting has other names in other architectures and releases of transformers, and an absent one has a default.
"""

import re
from collections.abc import Iterator, Mapping, Set
from typing import Any, NamedTuple, TypeGuard

from slrmerge.checkpoint.config_defaults import config_defaults
from slrmerge.checkpoint.layers import TEXT_CONFIG_KEYS, writing_part
from slrmerge.io.sizes import shorten

_SYNONYMS = {
    "n_head": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "n_head_kv": "num_key_value_heads",
    "d_head": "head_dim",
    "n_embd": "hidden_size",
    "d_model": "hidden_size",
    "layer_norm_eps": "norm_epsilon",
    "layer_norm_epsilon": "norm_epsilon",
    "rms_norm_eps": "norm_epsilon",
    "norm_eps": "norm_epsilon",
    "hidden_act": "activation",
    "activation_function": "activation",
    "hidden_activation": "activation",
    "num_experts_per_token": "num_experts_per_tok",
    "moe_top_k": "num_experts_per_tok",
    "moe_topk": "num_experts_per_tok",
    "moe_k": "num_experts_per_tok",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_shared_experts": "n_shared_experts",
    "route_scale": "routed_scaling_factor",
    "sliding_window_size": "sliding_window",
    "attention_window_size": "sliding_window",
}

_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_python": "gelu"}
"""Names of the same function."""

_ROPE_KEYS = frozenset({
    "rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "rotary_emb_base", "rotary_pct",
    "partial_rotary_factor", "global_rope_theta", "local_rope_theta",
})  # fmt: skip

_INCIDENTAL = re.compile(
    r"_.*|.*(_token_ids?|_token_index|_version|dropout|_pdrop|_dropout_prob|_loss_coef|_init)|init.*|output_.*"
    r"|unsloth.*|(torch_)?dtype|use_cache|vocab_size|(?!unpadded_).*_vocab_size|architectures|model_type|tie_.*|id2label|label2id"
    r"|num_labels|problem_type|finetuning_task|task_specific_params|tokenizer_class|auto_map|quantization(_config)?"
    r"|compression_config|pretraining_tp|torchscript|return_dict|gradient_checkpointing|attn_implementation|use_bfloat16"
    r"|max_position_embeddings|n_positions|n_ctx|(model_)?max_length|max_window_layers|summary_.*|num_hidden_layers"
    r"|n_layers?|num_layers|moe_layers|.*hidden_size|.*intermediate_size|seq_aux|ep_size|keys_to_ignore_at_inference"
    r"|(num_)?beams?|do_sample|temperature|top_[kp]|.*_penalty|use_flash_attn|license|text_config"
    r"|language_config|llm_config|sliding_window_pattern|layer_types|.*_config|torch_.*|add_.*|.*ffn_dim|d_ff|n_inner"
    r"|chunk_size_feed_forward|pruned_heads|prefix|use_return_dict|tf_legacy_loss|cross_attention_.*"
    r"|is_encoder_decoder|classifier_(?!activation).*|sparse_pred.*|mask_(time|feature)_.*|.*layerdrop|apply_spec_augment"
    r"|deterministic_.*|.*_aux_loss|num_(local_)?experts|n_routed_experts|moe_num_experts|num_mtp_layers"
    r"|num_nextn_predict_layers|mm_.*|image_.*|video_.*|(begin_)?suppress_tokens|(?!router_jitter).*_noise"
)
"""Keys that do not change what a layer computes, are compared by their shapes or in another place."""

_LAYER_SECTIONS = ("attn_config", "ffn_config")
"""Sections about parts of a layer, of MPT and DBRX."""

_HEAD_KEYS = ("num_attention_heads", "num_key_value_heads", "head_dim")


class Difference(NamedTuple):
    """A setting that differs, and its value on each side; None where it is off or not known."""

    setting: str
    pretrained: Any
    posttrained: Any

    def __str__(self) -> str:
        pre, post = ("not set" if value is None else shorten(value) for value in self[1:])
        return f"{self.setting} is {pre} pre-trained and {post} post-trained"

    @property
    def is_about_heads(self) -> bool:
        """Whether layers of equal shapes are cut into other attention heads: weights of the one mean nothing there."""
        return self.setting in _HEAD_KEYS


def compare_configs(pretrained: Mapping[str, Any], posttrained: Mapping[str, Any]) -> list[Difference]:
    """The settings of the decoder that differ, rope first."""
    pre, post = _decoder(pretrained), _decoder(posttrained)
    found = list(_rope_differences(pre, post))
    ours, theirs = _settings(pre), _settings(post)
    known = _known_settings(pre) if _model_type(pre) == _model_type(post) else None
    for key in sorted(ours.keys() | theirs.keys()):
        own, other = ours.get(key), theirs.get(key)
        if key in _HEAD_KEYS and (own is None or other is None):
            continue  # not derivable: an architecture of its own
        if known is not None and key not in known and (own is None or other is None):
            continue  # derived from other settings, or not a setting of this architecture at all
        if not _same(own, other):
            found.append(Difference(key, *(None if value is False else value for value in (own, other))))
    own_types, other_types = _layer_types(pre), _layer_types(post)
    if own_types and other_types and own_types != other_types:
        found.append(Difference("layer_types", own_types, other_types))
    return [*found, *_section_differences(pre, post)]


def _section_differences(pre: Mapping[str, Any], post: Mapping[str, Any]) -> Iterator[Difference]:
    """What sections about parts of a layer say in both configs, and not the same."""
    for name in _LAYER_SECTIONS:
        own, other = pre.get(name), post.get(name)
        if isinstance(own, dict) and isinstance(other, dict):
            for key in sorted(own.keys() & other.keys()):
                if not (_INCIDENTAL.fullmatch(key) or _same(own[key], other[key])):
                    yield Difference(f"{name}.{key}", own[key], other[key])


def _decoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the decoder: that of the whole model, with its section for text, where it has one, on top."""
    config = writing_part(config)
    section: Mapping[str, Any] = next(
        (config[key] for key in TEXT_CONFIG_KEYS if isinstance(config.get(key), dict)), {}
    )
    return {**config, **section}


def _model_type(config: Mapping[str, Any]) -> str:
    """The model type as the table of defaults has it, where it has: that of the decoder rather than of the whole."""
    model_type = str(config.get("model_type", ""))
    return next((each for each in (f"{model_type}_text", model_type) if each in config_defaults()), model_type)


def _known_settings(config: Mapping[str, Any]) -> Set[str] | None:
    """The settings that an architecture has, by one name each; None where it is not known."""
    defaults = config_defaults().get(_model_type(config))
    return None if defaults is None else {_SYNONYMS.get(key, key) for key in defaults}


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by one name each, those that are None left out, defaults filled in."""
    defaults = config_defaults().get(_model_type(config), {})
    has_activation = any(_SYNONYMS.get(key) == "activation" for key in defaults)
    found: dict[str, Any] = {}
    for key, value in [*defaults.items(), *config.items()]:
        name = _SYNONYMS.get(key, key)
        is_derived = value is None and (name in _HEAD_KEYS or key not in config)  # any other null turns a setting off
        is_derived = is_derived or (value is None and _has_synonym(config, key, name))
        is_ignored = has_activation and name == "activation" and key not in defaults  # Gemma 2 has a hidden_act too
        if not (is_derived or is_ignored or key in _ROPE_KEYS or _INCIDENTAL.fullmatch(key)):
            found[name] = value
    if _model_type(config) == "gemma" and found.get("activation") == "gelu":
        found["activation"] = "gelu_pytorch_tanh"  # what Gemma's first configs mean by it
    activation = found.get("activation")
    if isinstance(activation, str):
        found["activation"] = _ACTIVATIONS.get(activation, activation)
    if found.pop("use_sliding_window", None) is False:
        found["sliding_window"] = None
    if "qk_rope_head_dim" in config:  # attention over latents: heads have two other sizes
        found.pop("head_dim", None)
    heads = found.get("num_attention_heads")
    hidden = next((config[key] for key in ("hidden_size", "n_embd", "d_model") if type(config.get(key)) is int), None)
    if type(heads) is int and heads > 0:
        if "multi_query" not in config and "new_decoder_architecture" not in config:
            found.setdefault("num_key_value_heads", heads)
        if hidden and "qk_rope_head_dim" not in config:
            found.setdefault("head_dim", hidden // heads)
    return {key: value for key, value in found.items() if value is not None}


def _has_synonym(config: Mapping[str, Any], key: str, name: str) -> bool:
    """Whether a config has the setting under another key: Cohere's mixtures of experts have one of two norms."""
    return any(value is not None and other != key and _SYNONYMS.get(other) == name for other, value in config.items())


def _same(own: Any, other: Any) -> bool:
    """Whether two values mean the same; 0, an empty list and nothing are all off."""
    return own == other or (not own and not other)


def _layer_types(config: Mapping[str, Any]) -> list[Any] | None:
    """The attention of each layer, from `layer_types` or from the pattern that older configs give."""
    types, pattern, layers = (config.get(key) for key in ("layer_types", "sliding_window_pattern", "num_hidden_layers"))
    if isinstance(types, list):
        return types
    if type(pattern) is int and type(layers) is int and pattern > 0 and 0 < layers <= 10_000:
        return ["full_attention" if (k + 1) % pattern == 0 else "sliding_attention" for k in range(layers)]
    return None


def _rope_differences(pre: Mapping[str, Any], post: Mapping[str, Any]) -> Iterator[Difference]:
    own, other = _rope(pre), _rope(post)
    if own.keys() != other.keys():  # one side has a single rope, which its full attention uses
        own, other = _by_kind(own), _by_kind(other)
    for kind in sorted(own.keys() & other.keys()):
        ours, theirs = own[kind], other[kind]
        place = f" of {kind}" if kind else ""
        for key in sorted(ours.keys() | theirs.keys()):
            if not _same(ours.get(key), theirs.get(key)):
                yield Difference(f"{key}{place}", ours.get(key), theirs.get(key))


def _by_kind(rope: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rotary embedding for each kind of layer; sliding ones have the same base, and are not scaled."""
    whole = rope.get("")
    if whole is None:
        return rope
    base = {key: whole.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    return {"full_attention": whole, "sliding_attention": {**base, "rope_type": "default"}}


def _rope(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rotary embedding, for each kind of layer where they differ, else under an empty name."""
    default = config_defaults().get(_model_type(config), {}).get("rope_parameters") or {}
    parameters = config.get("rope_parameters")
    if _is_by_kind(parameters):
        return {
            kind: _rope_of(each, config, (default.get(kind) or {}) if _is_by_kind(default) else default)
            for kind, each in parameters.items()
            if isinstance(each, dict)
        }
    full: Mapping[str, Any] = default
    sliding: Mapping[str, Any] = {}
    if _is_by_kind(default):
        full, sliding = (default.get(kind) or {} for kind in ("full_attention", "sliding_attention"))
    scaling = parameters if isinstance(parameters, dict) else config.get("rope_scaling")
    if scaling is None and "rope_scaling" not in config:  # with the default's scaling, but not with its base
        scaling = {key: value for key, value in full.items() if key not in ("rope_theta", "partial_rotary_factor")}
    whole = _rope_of(scaling if isinstance(scaling, dict) else {}, config, full)
    locals_ = (config.get("rope_local_base_freq"), config.get("local_rope_theta"), sliding.get("rope_theta"))
    local = next((value for value in locals_ if value is not None), None)
    if local is None:
        return {"": whole}
    return {"full_attention": whole, "sliding_attention": _rope_of({"rope_theta": local}, config, {})}


def _is_by_kind(parameters: Any) -> TypeGuard[dict[str, Any]]:
    """Whether rope parameters are those of full, sliding or other attention, each by itself; None where it has none."""
    kinds = [key for key in parameters if key.endswith("_attention")] if isinstance(parameters, dict) else []
    return len(kinds) > 1 and all(isinstance(parameters[kind] or {}, dict) for kind in kinds)


def _rope_of(parameters: Mapping[str, Any], config: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    kind = parameters.get("rope_type", parameters.get("type")) or "default"
    kind = {"su": "longrope", "mrope": "default"}.get(kind, kind) if isinstance(kind, str) else kind
    thetas = [config.get(key) for key in ("rope_theta", "global_rope_theta", "rotary_emb_base")]
    thetas = [parameters.get("rope_theta"), *thetas, default.get("rope_theta")]
    theta = next((value for value in thetas if value is not None), None)
    partials = [parameters.get("partial_rotary_factor"), config.get("partial_rotary_factor"), config.get("rotary_pct")]
    partials.append(default.get("partial_rotary_factor"))
    partial = next((value for value in partials if value is not None), 1)
    found: dict[str, Any] = {
        "rope_theta": theta,
        "rope_type": kind,
        "partial_rotary_factor": None if partial == 1 else partial,
    }
    if kind != "default":
        rest = {key: each for key, each in parameters.items() if key not in ("type", *found) and each is not None}
        if kind in ("dynamic", "yarn", "longrope"):
            limits = (config.get("original_max_position_embeddings"), config.get("max_position_embeddings"))
            rest.setdefault("original_max_position_embeddings", next((each for each in limits if each), None))
        found |= rest
    elif "mrope_section" in parameters:
        found["mrope_section"] = parameters["mrope_section"]
    return found
