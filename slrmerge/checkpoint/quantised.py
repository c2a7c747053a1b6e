"""Quantised modules and how to recognise them.

A packed weight and its scales are one value in several tensors: a merge takes all of them from one side, or none.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from slrmerge.checkpoint.header import TensorInfo

COMPANION_SUFFIXES = frozenset({
    "qweight", "qzeros", "scales", "g_idx",  # GPTQ, AWQ
    "absmax", "quant_map", "nested_absmax", "nested_quant_map",  # bitsandbytes 4 bit
    "SCB", "weight_format",  # bitsandbytes 8 bit
    "weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale", "weight_zero_point",  # fp8, compressed-tensors
    "weight_packed", "weight_shape",
})  # fmt: skip
"""Last components of names that occur in quantised modules only."""

LOW_BIT_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})

_PACKED_SUFFIXES = ("_blocks", "_scales")  # mxfp4
_WEIGHT_STATES = ("absmax", "quant_map", "nested_", "quant_state.")  # bitsandbytes: `<module>.weight.absmax`


def quantisation_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantisation section of a config, or None."""
    for key in ("quantization_config", "compression_config"):
        if isinstance(config.get(key), dict):
            return dict(config[key])
    return None


def quantised_groups(tensors: Iterable[tuple[str, TensorInfo]]) -> dict[str, str]:
    """Every tensor of a quantised module, mapped to the name of that module."""
    own = {name: _module(name, info) for name, info in tensors}
    modules = set(own.values()) - {""}
    groups: dict[str, str] = {}
    for name, module in own.items() if modules else ():
        parent = name.rpartition(".")[0]
        if module:
            groups[name] = module
        elif name in modules:  # mxfp4: `w` beside `w_scales`
            groups[name] = name
        elif parent in modules:
            groups[name] = parent
    return groups


def _module(name: str, info: TensorInfo) -> str:
    """The quantised module that a tensor's own name or dtype reveals, or an empty string."""
    owner, marker, state = name.partition(".weight.")
    if marker and state.startswith(_WEIGHT_STATES):
        return owner
    parent, _, last = name.rpartition(".")
    if last.endswith(_PACKED_SUFFIXES):
        return name.rpartition("_")[0]
    return parent if last in COMPANION_SUFFIXES or info.dtype in LOW_BIT_DTYPES else ""
