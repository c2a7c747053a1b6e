"""Quantized pairs: what may be restored where the format is known, and where it is not."""

import json
from pathlib import Path
from typing import Any

import pytest

from slrmerge.checkpoint.quantized import Quantization
from tests.checkpoints import Tensor, llama_config, llama_tensors, random_tensor, write_checkpoint
from tests.merging.plan import plan_of
from tests.merging.plan.test_tensors import by_name, refusals
from tests.streams import tensor_bytes

Parts = dict[str, tuple[str, tuple[int, ...]]]

UNKNOWN: dict[str, Parts] = {
    "hqq": {"W_q": ("U8", (8, 4)), "scale": ("F16", (8, 1)), "zero": ("F16", (8, 1)), "nbits": ("I32", ())},
    "exl2": {"q_weight": ("I32", (4, 8)), "q_scale": ("I32", (2, 1)), "q_scale_max": ("F16", (2,))},
    "exl3": {"trellis": ("I16", (2, 2, 4)), "suh": ("F16", (8,)), "svh": ("F16", (8,))},
    "quanto": {"weight._data": ("I8", (8, 8)), "weight._scale": ("F16", (8, 1))},
    "quip": {"Qidxs": ("I64", (8, 1)), "SU": ("F16", (8,)), "SV": ("F16", (8,))},
    "torchao": {"_weight_qdata": ("I8", (8, 8)), "_weight_scale": ("F16", (8,))},
    "tomorrow": {"weight": ("U16", (8, 8)), "table": ("F16", (16,))},
}


def quantized(parts: Parts, seed: str) -> dict[str, Tensor]:
    """A Llama-like model whose projections have `parts` instead of a weight."""
    made: dict[str, Tensor] = {}
    for name, tensor in llama_tensors(seed).items():
        module = name.removesuffix(".weight")
        if module.endswith("_proj"):
            own = {f"{module}.{part}": random_tensor(*kind, f"{seed}{module}{part}") for part, kind in parts.items()}
            made |= own
        else:
            made[name] = tensor
    return made


def write(folder: Path, name: str, *configs: dict[str, Any] | None, side_files: dict[str, str] | None = None) -> None:
    """A pair in a format, with the quantization section of each side's config."""
    for side, section in zip(("pre", "post"), configs, strict=True):
        config = llama_config(quantization_config=section) if section is not None else llama_config()
        write_checkpoint(folder / side, quantized(UNKNOWN[name], side), config, side_files=side_files)


@pytest.mark.parametrize("says", [True, False], ids=["method", "layout alone"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_format_allows_whole_layers_and_nothing_else(tmp_path: Path, name: str, says: bool) -> None:
    config = {"quant_method": name} if says else None
    write(tmp_path, name, config, config)
    plan = plan_of(tmp_path, restore=[1, 2])
    pre, post = (quantized(UNKNOWN[name], side) for side in ("pre", "post"))
    assert {tensor.kind for tensor in plan.tensors()} == {"copy"}
    assert tensor_bytes(plan) == {
        name: (pre if name.startswith(("model.layers.1.", "model.layers.2.")) else post)[name].data for name in post
    }
    assert len(refusals(tmp_path, "unknown-quantization", alpha=0.5)) > 3
    norms = [{"match": "*.input_layernorm.weight", "alpha": 0.5}]
    layer = "model.layers.*.input_layernorm.weight (6 tensors)"
    assert refusals(tmp_path, "unknown-quantization", tensors=norms) == [layer]
    assert refusals(tmp_path, "unknown-quantization", tensors=[{"match": "lm_head.*", "alpha": 1}]) == [
        "lm_head.weight"
    ]
    attention = [{"range": [1, 2], "alpha": 1, "modules": ["self_attn"]}]
    assert all("self_attn" in place for place in refusals(tmp_path, "unknown-quantization", layers=attention))
    assert refusals(tmp_path, "unknown-quantization", restore=[1, 2], dtype="float32") == [str(tmp_path / "post")]
    assert plan_of(tmp_path, alpha=0).kinds == {"copy": len(post)}


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ({"meta": {"tool": "a"}}, {"meta": {"tool": "b"}}),
        ({"version": "0.1.1"}, {"version": "0.2"}),
        ({"timestamp": "2024-01-01"}, {}),
        ({"calibration": {"rows": 100}}, {"calibration": {"rows": 115}}),
        ({"skip": ["a", "b"]}, {"skip": ["b", "a"]}),
        ({"group_size": None}, {}),
        ({"autoround_version": "0.5.1"}, {"autoround_version": "main"}),
    ],
)
def test_bookkeeping_is_no_difference(tmp_path: Path, own: dict[str, Any], other: dict[str, Any]) -> None:
    method = {"quant_method": "hqq", "bits": 8}
    write(tmp_path, "hqq", {**method, **own}, {**method, **other})
    assert plan_of(tmp_path, restore=[1, 2]).kinds == {"copy": len(quantized(UNKNOWN["hqq"], "post"))}


@pytest.mark.parametrize(
    ("own", "other", "key"),
    [
        ({"bits": 8}, {"bits": 4}, "bits"),
        ({"bits": 8}, {}, "bits"),
        ({"version": "gemm"}, {"version": "gemv"}, "version"),
        ({"quant_type": {"default": {"_version": 1}}}, {"quant_type": {"default": {"_version": 2}}}, "_version"),
        ({"skip": ["a"]}, {"skip": ["a", "b"]}, "skip"),
        ({"weights": {"group_size": 64}}, {"weights": {"group_size": 128}}, "weights.group_size"),
    ],
)
def test_a_difference_that_affects_the_numbers_is_refused_by_its_key(
    tmp_path: Path, own: dict[str, Any], other: dict[str, Any], key: str
) -> None:
    method = {"quant_method": "hqq"}
    write(tmp_path, "hqq", {**method, **own}, {**method, **other})
    with pytest.raises(Exception, match=f"differently: .*{key} is") as caught:
        plan_of(tmp_path, restore=[1, 2])
    assert [problem.code for problem in caught.value.problems] == ["different-quantization"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("method", "own", "other", "same"),
    [
        ("gptq", {}, {"checkpoint_format": "gptq", "pack_dtype": "int32", "dynamic": {}, "lm_head": None}, True),
        ("gptq", {}, {"checkpoint_format": "gptq_v2"}, False),
        ("gptq", {}, {"sym": False}, False),
        ("bitsandbytes", {"load_in_4bit": True}, {"load_in_4bit": True, "_load_in_4bit": True}, True),
        ("bitsandbytes", {"llm_int8_skip_modules": None}, {"llm_int8_skip_modules": []}, True),
        ("bitsandbytes", {"bnb_4bit_quant_storage": "uint8"}, {}, True),
        ("bitsandbytes", {"bnb_4bit_quant_storage": "bfloat16"}, {}, False),
        ("awq", {"zero_point": False}, {}, False),
        ("gptq", {"quant_method": "gptq"}, {}, True),  # in a file of its own
    ],
)
def test_a_key_that_a_release_does_not_write_means_the_default_of_its_method(
    method: str, own: dict[str, Any], other: dict[str, Any], same: bool
) -> None:
    sides = (Quantization(method, config, {}, "") for config in (own, other))
    assert (next(sides).difference(next(sides)) == "") == same


@pytest.mark.parametrize("file", ["quantize_config.json", "hf_quant_config.json"])
def test_a_file_beside_the_config_is_read_where_the_config_says_nothing(tmp_path: Path, file: str) -> None:
    for side, bits in (("pre", 4), ("post", 8)):
        beside = {file: json.dumps({"quantization": {"quant_algo": "X", "bits": bits}})}
        write_checkpoint(tmp_path / side, quantized(UNKNOWN["hqq"], side), llama_config(), side_files=beside)
    assert refusals(tmp_path, "different-quantization", restore=[1, 2]) == [str(tmp_path / "pre")]


def test_a_dtype_of_a_layer_that_differs_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "hqq", {"quant_method": "hqq"}, {"quant_method": "hqq"})
    pre = quantized(UNKNOWN["hqq"] | {"scale": ("BF16", (8, 1))}, "pre")
    (tmp_path / "pre").rename(tmp_path / "old")
    write_checkpoint(tmp_path / "pre", pre, llama_config(quantization_config={"quant_method": "hqq"}))
    assert all(".scale" in place for place in refusals(tmp_path, "different-quantization", restore=[1, 2]))


@pytest.mark.parametrize("side", ["pre", "post"])
def test_a_format_that_only_one_side_has_is_refused_by_name(tmp_path: Path, side: str) -> None:
    for each in ("pre", "post"):
        tensors = quantized(UNKNOWN["hqq"], each) if each == side else llama_tensors(each)
        config = llama_config(**({"quantization_config": {"quant_method": "hqq"}} if each == side else {}))
        write_checkpoint(tmp_path / each, tensors, config)
    assert refusals(tmp_path, "quantized-one-side", restore=[1, 2]) == [str(tmp_path / side)]
    assert plan_of(tmp_path, alpha=0).kinds.keys() == {"copy"}


def bitsandbytes(seed: str, state_bytes: int) -> dict[str, Tensor]:
    return quantized(
        {
            "weight": ("U8", (32, 1)),
            "weight.absmax": ("U8", (4,)),
            "weight.nested_absmax": ("F32", (1,)),
            "weight.quant_state.bitsandbytes__nf4": ("U8", (state_bytes,)),
        },
        seed,
    )


def test_lists_in_a_quantized_module_that_is_copied_whole_may_have_any_length(tmp_path: Path) -> None:
    config = llama_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    pre, post = bitsandbytes("pre", 81), bitsandbytes("post", 80)
    write_checkpoint(tmp_path / "pre", pre, config)
    write_checkpoint(tmp_path / "post", post, config)
    plan = plan_of(tmp_path, restore=[1, 2])
    state = "model.layers.{}.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    assert [by_name(plan)[state.format(k)].info.shape for k in range(4)] == [(80,), (81,), (81,), (80,)]
    assert tensor_bytes(plan)[state.format(1)] == pre[state.format(1)].data
    packed = bitsandbytes("pre", 81)
    packed |= {name: random_tensor("U8", (16, 1), name) for name in packed if name.endswith("up_proj.weight")}
    (tmp_path / "pre").rename(tmp_path / "old")
    write_checkpoint(tmp_path / "pre", packed, config)
    assert refusals(tmp_path, "different-shapes", restore=[1, 2]) == ["model.layers.*.mlp.up_proj.weight (2 tensors)"]


@pytest.mark.parametrize(
    "name",
    ["model.embeddings.position_ids", "model.layers.0.self_attn.bias", "model.layers.0.relative_position_index", "ids"],
)
def test_whole_numbers_that_are_no_weights_do_not_make_a_model_quantized(tmp_path: Path, name: str) -> None:
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, llama_tensors(side) | {name: random_tensor("I64", (2, 3), side)})
    assert by_name(plan_of(tmp_path, alpha=0.5))["lm_head.weight"].alpha == 0.5


AWQ: Parts = {"qweight": ("I32", (8, 1)), "qzeros": ("I32", (1, 1)), "scales": ("F16", (1, 8))}
PACKED: Parts = {"weight_packed": ("I32", (8, 1)), "weight_scale": ("F16", (8, 1)), "weight_shape": ("I64", (2,))}
NVFP4: Parts = {"weight": ("U8", (8, 4)), "weight_scale": ("F8_E4M3", (8, 1)), "weight_scale_2": ("F32", ())}
FP8: Parts = {"weight": ("F8_E4M3", (8, 8)), "weight_scale": ("F32", (8, 1))}
IN_LAYER = [
    {"layers": [{"range": [1, 2], "alpha": 1, "modules": ["self_attn"]}]},
    {"layers": [{"range": [1, 2], "alpha": 0.5, "modules": ["input_layernorm"]}]},
    {"restore": [1, 2], "tensors": [{"match": "*.input_layernorm.weight", "alpha": 0}]},
]


@pytest.mark.parametrize("content", IN_LAYER)
@pytest.mark.parametrize(
    ("parts", "config", "shares_scales"),
    [
        (AWQ, {"quant_method": "awq", "bits": 4}, True),
        (AWQ, {"quant_method": "gptq", "bits": 4}, False),
        (PACKED, {"quant_method": "compressed-tensors", "format": "pack-quantized"}, True),
        (FP8, {"quant_method": "compressed-tensors", "format": "float-quantized"}, False),
        (FP8, {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, True),
        (NVFP4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, True),
        (FP8, {"quant_method": "modelopt", "quant_algo": "FP8"}, False),
        (FP8, {"quant_method": "fp8"}, False),
    ],
)
def test_layers_whose_tensors_share_factors_are_taken_whole(
    tmp_path: Path, parts: Parts, config: dict[str, Any], shares_scales: bool, content: dict[str, Any]
) -> None:
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, quantized(parts, side), llama_config(quantization_config=config))
    plan_of(tmp_path, restore=[1, 2])
    plan_of(tmp_path, tensors=[{"match": "model.norm.weight", "alpha": 0.5}])
    if shares_scales:
        assert refusals(tmp_path, "quantized-layer-split", **content)[0].startswith("model.layers.")
    else:
        plan_of(tmp_path, **content)
