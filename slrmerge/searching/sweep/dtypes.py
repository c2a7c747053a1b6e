"""torch's dtypes for those of the safetensors format."""

import torch

from slrmerge.checkpoint.header import TensorInfo
from slrmerge.errors import Problem, UnsupportedModelError

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip


def dtype_of(name: str, info: TensorInfo) -> torch.dtype:
    """The dtype of a stored tensor. Raises UnsupportedModelError for one that torch has not."""
    if info.dtype not in _DTYPES:
        what, remedy = f"is stored as {info.dtype}, with which torch does not compute", "search the unquantised models"
        raise UnsupportedModelError(Problem("unknown-dtype", name, what, remedy))
    return _DTYPES[info.dtype]
