"""torch's dtypes for those of the safetensors format."""

import torch

from slrmerge.checkpoint.header import TensorInfo
from slrmerge.errors import Problem, UnsupportedModelError

_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16",
    "I32": "int32", "U32": "uint32", "I64": "int64", "U64": "uint64",
    "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, own) for name, own in _NAMES.items() if hasattr(torch, own)}
"""Those of this torch: 2.6 has no F8_E8M0."""


def dtype_of(name: str, info: TensorInfo) -> torch.dtype:
    """The dtype of a stored tensor. Raises UnsupportedModelError for one that torch has not."""
    if info.dtype not in _DTYPES:
        what, remedy = f"is stored as {info.dtype}, with which torch does not compute", "search the unquantized models"
        raise UnsupportedModelError(Problem("unknown-dtype", name, what, remedy))
    return _DTYPES[info.dtype]
