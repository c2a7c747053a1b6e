"""Quantized modules and how to recognize them.

A packed weight and its scales are one value in several tensors: a merge takes all of them from one side, or none. Where
the format is not known, neither is which tensors those are: a merge takes whole layers or nothing.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.files import unreadable
from slrmerge.checkpoint.header import FLOATING, TensorInfo
from slrmerge.errors import CheckpointError, Problem
from slrmerge.io.files import read_file
from slrmerge.io.strict_json import InvalidJsonError, parse_json

COMPANION_SUFFIXES = frozenset({
    "qweight", "qzeros", "scales", "g_idx",  # GPTQ, AWQ
    "absmax", "quant_map", "nested_absmax", "nested_quant_map",  # bitsandbytes 4 bit
    "SCB", "weight_format",  # bitsandbytes 8 bit
    "weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale", "weight_zero_point",  # fp8, compressed-tensors
    "weight_packed", "weight_shape",
    "k_scale", "v_scale", "kv_scale",  # of keys and values that are cached in fp8
})  # fmt: skip
"""Last components of names that occur in quantized modules only."""

LOW_BIT_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})

_PACKED_SUFFIXES = ("_blocks", "_scales")  # mxfp4
_WEIGHT_STATES = ("absmax", "quant_map", "nested_", "quant_state.")  # bitsandbytes: `<module>.weight.absmax`


KNOWN_METHODS = frozenset({
    "gptq", "awq", "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "fp8", "fbgemm_fp8", "compressed-tensors",
    "mxfp4", "modelopt",
})  # fmt: skip
"""Values of `quant_method` whose tensors `COMPANION_SUFFIXES` and `LOW_BIT_DTYPES` recognize completely."""

QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json")
"""Files beside a config that says nothing of quantization itself: old GPTQ and AWQ, ModelOpt, EXL3."""

_MAX_BYTES = 50_000_000
_CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
_METHOD_KEYS = ("quant_method", "quant_algo", "quant_type", "mode")

_BOOKKEEPING = frozenset({
    "meta", "metadata", "producer", "quantizer", "calibration", "calibration_dataset", "dataset", "nsamples", "seqlen",
    "batch_size", "iters", "damp_percent", "damp_auto_increment", "true_sequential", "model_name_or_path",
    "model_file_base_name", "tensor_storage", "author", "comment", "description", "date", "time", "timestamp",
    "created", "created_at", "quantized_at", "use_exllama", "exllama_config", "backend", "bnb_4bit_compute_dtype",
    "_load_in_4bit", "_load_in_8bit",  # the same as the keys without the underscore
})  # fmt: skip
"""Keys that say who quantized a model, when and with what data, or choose a kernel: not what its numbers mean."""

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "bitsandbytes": {
        "load_in_4bit": False, "load_in_8bit": False, "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
    },
    "gptq": {"checkpoint_format": "gptq", "lm_head": False, "pack_dtype": "int32", "static_groups": False, "sym": True},
}  # fmt: skip
"""What an absent key means: releases of a program write different ones."""

_VERSION = re.compile(r"v?\d+(\.\d+)+\S*")
"""A release, such as 0.9.4; AWQ's `version: gemm` and torchao's `_version: 2` name layouts."""

_BUFFERS = frozenset({
    "position_ids", "token_type_ids", "relative_position_index", "num_batches_tracked", "bias", "masked_bias",
    "causal_mask", "attention_mask", "tid2eid",
})  # fmt: skip
_BUFFER_SUFFIXES = ("_ids", "_index", "_mask")
"""Last components of the names of integer tensors that are not weights, and suffixes of such components."""


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized.

    `modules` maps the tensors of recognized modules to those modules. `unknown` says why the format is not known, or
    is empty.
    """

    method: str
    config: Mapping[str, Any]
    modules: Mapping[str, str]
    unknown: str

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Quantization | None":
        """What the config, the files beside it, and the tensors' names and dtypes say; None for a plain model.

        Raises CheckpointError where a file beside the config is not JSON, and HubError.
        """
        modules = quantized_groups(checkpoint)
        packed = _packed_tensor(checkpoint, modules)
        config = quantization_config(checkpoint.config)
        if config is None and (modules or packed):
            config = _config_beside(checkpoint)
        method = _method(config or {}) or ("mlx" if isinstance(checkpoint.config.get("quantization"), dict) else "")
        unknown = f"{packed} is {checkpoint[packed].dtype}" if packed else ""
        if method and method not in KNOWN_METHODS:
            unknown = method
        if not (modules or unknown):
            return None  # nothing is packed, whatever the config says
        return cls(method, config or {}, modules, unknown)

    @property
    def shares_scales(self) -> bool:
        """Whether the tensors of a layer may share factors: what is taken from elsewhere has others.

        AWQ and SmoothQuant move factors between them, norms included. compressed-tensors does not say which of its
        modifiers ran; they are of no use for fp8. NVFP4's second scale must be the same for queries, keys and values:
        servers that fuse these take the largest.
        """
        says = json.dumps(self.config).lower()
        is_integer = self.method == "compressed-tensors" and self.config.get("format") != "float-quantized"
        return is_integer or any(word in f"{self.method} {says}" for word in ("awq", "smooth", "nvfp4"))

    @property
    def name(self) -> str:
        """The format in parentheses where the config names it, as in ` (mxfp4)`."""
        return f" ({self.method})" if self.method else ""

    def difference(self, other: "Quantization") -> str:
        """The first setting that differs from `other`'s and affects the numbers, with both values; or empty."""
        own, others = self._all_settings(), other._all_settings()
        for key in sorted(own.keys() | others.keys()):
            if own.get(key) != others.get(key):
                return f"{key} is {own.get(key, 'not set')} pre-trained, {others.get(key, 'not set')} post-trained"
        return ""

    def _all_settings(self) -> dict[str, str]:
        """The settings that affect the numbers, with the defaults of the method."""
        given = {key: value for key, value in self.config.items() if value is not None}
        return dict(_settings({"quant_method": self.method, **_DEFAULTS.get(self.method, {}), **given}))


class QuantizedPair(NamedTuple):
    """How each side of a pair is quantized; None where it is not."""

    pretrained: Quantization | None
    posttrained: Quantization | None

    @property
    def modules(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """The tensors of either side that belong to recognized modules → those modules."""
        pre, post = (side.modules if side else {} for side in self)
        return pre, post

    @property
    def unknown(self) -> str:
        """Why the format of one side is not known, or empty."""
        return next((side.unknown for side in self if side and side.unknown), "")


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization section of a config, or None."""
    for key in _CONFIG_KEYS:
        if isinstance(config.get(key), dict):
            return dict(config[key])
    return None


def quantized_groups(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Every tensor of a quantized module, mapped to the name of that module."""
    modules = {module for name, info in tensors.items() if (module := _module(name, info))}
    groups: dict[str, str] = {}
    for name, info in tensors.items() if modules else ():
        parent = name.rpartition(".")[0]
        if module := _module(name, info):
            groups[name] = module
        elif name in modules:  # mxfp4: `w` beside `w_scales`
            groups[name] = name
        elif parent in modules:
            groups[name] = parent
    return groups


def _module(name: str, info: TensorInfo) -> str:
    """The quantized module that a tensor's own name or dtype reveals, or an empty string."""
    owner, marker, state = name.partition(".weight.")
    if marker and state.startswith(_WEIGHT_STATES):
        return owner
    parent, _, last = name.rpartition(".")
    if last.endswith(_PACKED_SUFFIXES):
        return name.rpartition("_")[0]
    return parent if last in COMPANION_SUFFIXES or info.dtype in LOW_BIT_DTYPES else ""


def _method(config: Mapping[str, Any]) -> str:
    """The name of the format in a quantization section, in lower case; ModelOpt and AWQ name it deeper or otherwise."""
    nested = config.get("quantization")
    sections = (config, nested if isinstance(nested, dict) else {})
    found = next((str(each[key]) for each in sections for key in _METHOD_KEYS if isinstance(each.get(key), str)), "")
    if not found and "w_bit" in config:
        return "awq"
    if not found and "bits" in config and "desc_act" in config:
        return "gptq"
    return "modelopt" if nested and "producer" in config else found.lower()


def _config_beside(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """The first of `QUANTIZATION_FILES` that the checkpoint has."""
    for name in QUANTIZATION_FILES:
        if file := checkpoint.side_files.get(name):
            path = file.fetch()
            try:
                content = parse_json(read_file(path, _MAX_BYTES), allow_nan=True)
            except OSError as error:
                raise unreadable(path, error) from error
            except InvalidJsonError as error:
                what = f"invalid JSON ({error})"
                raise CheckpointError(Problem("invalid-json", str(path), what, "download it again")) from None
            return content if isinstance(content, dict) else None
    return None


def _packed_tensor(tensors: Mapping[str, TensorInfo], modules: Mapping[str, str]) -> str | None:
    """A matrix of whole numbers that no known format explains, and that takes the place of a weight."""
    for name, info in tensors.items():
        if info.dtype in FLOATING or info.dtype == "BOOL" or len(info.shape) < 2 or name in modules:
            continue
        parent, _, last = name.rpartition(".")
        weight = tensors.get(f"{parent}.weight")
        is_beside_weight = weight is not None and weight.dtype in FLOATING and len(weight.shape) > 1
        is_buffer = not parent or last in _BUFFERS or last.endswith(_BUFFER_SUFFIXES)
        if not (is_buffer or is_beside_weight):
            return name
    return None


def _settings(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """The settings that affect the numbers, flat, as canonical JSON; None and empty ones are the same as absent."""
    for key, value in config.items():
        is_version = isinstance(value, str) and _VERSION.fullmatch(value) and "version" in key.lower()
        is_version = is_version or (isinstance(value, str) and key.endswith("_version"))
        if value in (None, [], {}) or key in _BOOKKEEPING or is_version:
            continue
        if isinstance(value, dict):
            yield from _settings(value, f"{path}{key}.")
        elif isinstance(value, list) and all(isinstance(each, str) for each in value):
            yield path + key, json.dumps(sorted(value))  # names of modules, in any order
        else:
            yield path + key, json.dumps(value, sort_keys=True)
