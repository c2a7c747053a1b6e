"""Each family of quantized checkpoints is recognised by its names and dtypes, and plain models are left alone."""

from collections.abc import Mapping
from typing import Any

import pytest

from slrmerge.checkpoint.header import DTYPE_BITS, TensorInfo
from slrmerge.checkpoint.quantized import quantization_config, quantized_groups

Q = "model.layers.3.self_attn.q_proj"
EXPERTS = "model.layers.3.mlp.experts"
PLAIN = {
    "model.embed_tokens.weight": "BF16",
    "model.layers.3.input_layernorm.weight": "BF16",
    "model.layers.3.self_attn.q_norm.weight": "F32",
    "lm_head.weight": "BF16",
}

FAMILIES: dict[str, dict[str, dict[str, str]]] = {
    "GPTQ": {Q: {"qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32", "bias": "F16"}},
    "AWQ": {Q: {"qweight": "I32", "qzeros": "I32", "scales": "F16"}},
    "bitsandbytes 4 bit": {
        Q: {"weight": "U8", "weight.absmax": "F32", "weight.quant_map": "F32",
            "weight.quant_state.bitsandbytes__nf4": "U8", "bias": "BF16"},
    },
    "bitsandbytes 4 bit, nested": {
        Q: {"weight": "U8", "weight.absmax": "U8", "weight.quant_map": "F32", "weight.nested_absmax": "F32",
            "weight.nested_quant_map": "F32", "weight.quant_state.bitsandbytes__fp4": "U8"},
    },
    "bitsandbytes 8 bit": {Q: {"weight": "I8", "SCB": "F32", "weight_format": "U8", "bias": "F16"}},
    "fp8, per tensor": {Q: {"weight": "F8_E4M3", "weight_scale": "F32", "input_scale": "F32"}},
    "fp8, blocks": {Q: {"weight": "F8_E4M3", "weight_scale_inv": "F32"}},
    "fp8 without a scale": {Q: {"weight": "F8_E5M2"}},
    "int8, compressed-tensors": {Q: {"weight": "I8", "weight_scale": "BF16", "weight_zero_point": "I8"}},
    "int4, compressed-tensors": {Q: {"weight_packed": "I32", "weight_scale": "BF16", "weight_shape": "I64"}},
    "nvfp4": {Q: {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32", "input_scale": "F32"}},
    "mxfp4": {
        f"{EXPERTS}.gate_up_proj": {"_blocks": "U8", "_scales": "U8"},
        f"{EXPERTS}.down_proj": {"_blocks": "U8", "_scales": "U8"},
    },
    "mxfp4 with typed scales": {f"{EXPERTS}.down_proj": {"_blocks": "U8", "_scales": "F8_E8M0"}},
    "an fp8 cache": {"model.layers.3.self_attn": {"k_scale": "F32", "v_scale": "F32"}},
    "mxfp4 under the plain name": {f"{EXPERTS}.down_proj": {"": "U8", "_scales": "U8"}},
}  # fmt: skip


def infos(dtypes: Mapping[str, str]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(dtype, (8,), DTYPE_BITS[dtype], 0) for name, dtype in dtypes.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_tensors_of_a_quantized_module_are_grouped_and_nothing_else(family: str) -> None:
    wanted: dict[str, str] = {}
    dtypes = dict(PLAIN)
    for module, parts in FAMILIES[family].items():
        for part, dtype in parts.items():
            name = module + (part if part[:1] in ("", "_") else f".{part}")
            wanted[name], dtypes[name] = module, dtype
    assert quantized_groups(infos(dtypes)) == wanted
    assert quantized_groups(dict(reversed(infos(dtypes).items()))) == wanted


@pytest.mark.parametrize("dtype", [dtype for dtype, bits in DTYPE_BITS.items() if dtype[0] == "F" and bits < 16])
def test_every_low_bit_dtype_is_quantized(dtype: str) -> None:
    assert quantized_groups(infos(PLAIN | {f"{Q}.weight": dtype})) == {f"{Q}.weight": Q}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {f"{Q}.weight": "BF16", f"{Q}.bias": "BF16"},
        {"transformer.h.0.attn.bias": "BOOL", "transformer.h.0.attn.masked_bias": "F32"},
        {"model.layers.3.block_sparse_moe.experts.1.w2.weight": "BF16"},
        {f"{EXPERTS}.gate_up_proj": "BF16", f"{EXPERTS}.gate_up_proj_bias": "BF16"},
        {"logit_scale": "F32", "model.layers.3.mixer.A_log": "F32"},
    ],
    ids=["norms", "projections", "masks", "experts", "fused experts", "scalars"],
)
def test_plain_models_have_no_quantized_modules(more: dict[str, str]) -> None:
    assert quantized_groups(infos(PLAIN | more)) == {}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {"quant_method": "gptq", "bits": 4}),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, {"quant_method": "compressed-tensors"}),
        ({"quantization_config": None}, None),
        ({"quantization_config": "gptq"}, None),
        ({"model_type": "llama"}, None),
        ({}, None),
    ],
)
def test_what_the_config_says_of_quantization_is_read(
    config: Mapping[str, Any], found: Mapping[str, Any] | None
) -> None:
    assert quantization_config(config) == found
