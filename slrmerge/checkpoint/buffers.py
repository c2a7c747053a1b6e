"""Constants that old checkpoints store and newer ones compute: causal masks, rotary frequencies, position ids."""

from collections.abc import Mapping
from typing import Any

from slrmerge.checkpoint.header import FLOATING, TensorInfo
from slrmerge.checkpoint.layers import text_sections

_CONSTANTS = {
    "inv_freq": 1, "original_inv_freq": 1, "cos_cached": 4, "sin_cached": 4, "freqs_cis": 3, "masked_bias": 0,
    "position_ids": 2, "token_type_ids": 2,
}  # fmt: skip
"""Last components of names, and the most dimensions that the constant has."""

_OTHER_DTYPES = {"position_ids": ("I64", "I32"), "token_type_ids": ("I64", "I32"), "freqs_cis": ("C64",)}
_MASK_OWNERS = frozenset({"attn", "attention", "self_attn"})
_MASKS = frozenset({"bias", "causal_mask"})
_POSITIONS_KEYS = ("n_positions", "n_ctx", "max_position_embeddings", "max_sequence_length", "seq_length")


def is_constant(name: str, info: TensorInfo, config: Mapping[str, Any]) -> bool:
    """Whether a tensor follows from the config. A learned bias is never taken for a mask: it is not a square."""
    *_, owner, last = ("", *name.split("."))
    if last in _CONSTANTS:
        has_dtype = info.dtype in FLOATING or info.dtype in _OTHER_DTYPES.get(last, ())
        is_single = last != "masked_bias" or info.shape in ((), (1,))
        return has_dtype and is_single and len(info.shape) <= max(_CONSTANTS[last], 1)
    return last in _MASKS and owner in _MASK_OWNERS and _is_mask(info, config)


def _is_mask(info: TensorInfo, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is a square of flags, or of floats over all positions that the config allows."""
    *leading, rows, columns = (0, 0, *info.shape)
    if not rows == columns > 1 or any(size > 1 for size in leading):
        return False
    positions = {section.get(key) for section in text_sections(config) for key in _POSITIONS_KEYS}
    return info.dtype in ("BOOL", "U8") or (info.dtype in FLOATING and len(info.shape) == 4 and rows in positions)
