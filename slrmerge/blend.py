"""The arithmetic of a merge: means and slerps of two tensors, and casts between floating dtypes.

A blend rule is a function from alpha, and from sums over the whole tensors where it needs them, to two weights.

Chunk by chunk in buffers made once, so that memory does not grow with tensors. Only this module imports torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import acos, sin, sqrt
from typing import TYPE_CHECKING

from slrmerge.errors import BlendError, Problem

if TYPE_CHECKING:
    import torch

CHUNK_ELEMENTS = 1 << 17
"""Elements per step: 512 KiB in fp32, so that all the buffers of a step stay in a core's cache."""

MAX_ELEMENT_BYTES = 8
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The floating dtypes: safetensors' words and torch's, which are also a recipe's."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over two tensors p and q, in float64: p², q² and p·q."""

    pre: float = 0.0
    post: float = 0.0
    product: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.pre + other.pre, self.post + other.post, self.product + other.product)


Weights = tuple[float, float]
"""What the pre-trained and the post-trained tensor are multiplied by before they are added."""


def linear(alpha: float) -> Weights:
    """A mean: the paper's soup (section 4.1)."""
    return alpha, 1 - alpha


def slerp(alpha: float, sums: Sums) -> Weights:
    """On the great circle from the post-trained tensor to the pre-trained one (Shoemake, "Animating rotation with
    quaternion curves", 1985); a mean where they point the same way, or opposite ways, to 2e-4.
    """
    pre, post = (sqrt(square) if square > _NO_LENGTH**2 else 1.0 for square in (sums.pre, sums.post))
    cosine = max(-1.0, min(1.0, sums.product / (pre * post)))
    if abs(cosine) > _ALIKE:
        return linear(alpha)
    angle = acos(cosine)
    return sin(alpha * angle) / sin(angle), sin((1 - alpha) * angle) / sin(angle)


_ALIKE, _NO_LENGTH = 0.9995, 1e-8  # mergekit's


class Blender:
    """Blends and casts one chunk at a time; holds its own buffers, so one is needed per thread."""

    def __init__(self) -> None:
        self.inputs = (_buffer(), _buffer())
        self._wide = (_buffer(), _buffer())
        self._output = _buffer()

    def run(self, name: str, elements: int, dtypes: tuple[str, ...], output_dtype: str, weights: Weights) -> memoryview:
        """The bytes of a chunk of tensor `name`, from the `elements` at the start of each of `inputs`.

        With two `dtypes` the inputs are the pre- and the post-trained chunk, blended in fp32 (fp64 where any dtype is
        F64) with separate multiplications and one addition, so that neither vector width nor threads show in the
        result; with one, the first input is cast. Rounded to nearest even. The result is valid until the next call.

        Raises BlendError where float16 cannot hold a finite result.
        """
        output = as_tensor(self._output, output_dtype, elements)
        values = [as_tensor(self.inputs[side], dtype, elements) for side, dtype in enumerate(dtypes)]
        if len(values) == 1:
            result = values[0]
        else:
            wide = "F64" if "F64" in (*dtypes, output_dtype) else "F32"
            result, other = (self._widen(side, value, wide) for side, value in enumerate(values))
            result.mul_(weights[0])
            other.mul_(weights[1])
            result.add_(other)
        if result.element_size() == 8 and output.element_size() == 2:
            result = round_to_odd(result)
        output.copy_(result)
        if output_dtype == "F16":
            self._refuse_overflow(name, output, values)
        return self._output[: elements * output.element_size()]

    def sums(self, elements: int, dtypes: tuple[str, str]) -> Sums:
        """The sums over a chunk, from the `elements` at the start of each of `inputs`."""
        p, q = (as_tensor(self.inputs[side], dtype, elements).double() for side, dtype in enumerate(dtypes))
        return Sums(float(p.dot(p)), float(q.dot(q)), float(p.dot(q)))

    def _widen(self, side: int, value: "torch.Tensor", dtype: str) -> "torch.Tensor":
        wide = as_tensor(self._wide[side], dtype, value.numel())
        wide.copy_(value)
        return wide

    @staticmethod
    def _refuse_overflow(name: str, output: "torch.Tensor", values: "list[torch.Tensor]") -> None:
        lost = output.isinf()
        if lost.any():
            for value in values:
                lost &= value.isfinite()
            if lost.any():
                raise BlendError(
                    Problem(name, "has values past float16's 65504", "use dtype: bfloat16 or float32 in the recipe")
                )


def as_tensor(buffer: memoryview, dtype: str, elements: int) -> "torch.Tensor":
    """The first `elements` of a buffer as a tensor of a safetensors dtype, without a copy."""
    import torch

    return torch.frombuffer(buffer, dtype=torch_dtype(dtype), count=elements)


def as_bytes(tensor: "torch.Tensor") -> memoryview:
    """A contiguous tensor's own memory, to be read or written."""
    import torch

    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view


def torch_dtype(dtype: str) -> "torch.dtype":
    """torch's word for a floating safetensors dtype."""
    import torch

    found: torch.dtype = getattr(torch, DTYPES[dtype])
    return found


def _buffer() -> memoryview:
    return memoryview(bytearray(CHUNK_ELEMENTS * MAX_ELEMENT_BYTES))


def round_to_odd(values: "torch.Tensor") -> "torch.Tensor":
    """float64 values as float32, rounded so that one more rounding, to 16 bits, gives the correctly rounded result.

    An inexact value takes the neighbour with an odd last bit, which no 16-bit midpoint has (Boldo and Melquiond,
    "Emulation of FMA and correctly rounded sums", 2008).
    """
    import torch

    narrow = values.float()
    back = narrow.double()
    inexact = (back != values) & values.isfinite()
    away = back.abs() > values.abs()  # towards zero first, then make the last bit odd
    bits = narrow.view(torch.int32)
    return torch.where(inexact, (bits - away.int()) | 1, bits).view(torch.float32)


@contextmanager
def one_core_per_chunk() -> Iterator[None]:
    """Keep torch from splitting a chunk over cores: chunks are small, and several are worked out at a time anyway."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
