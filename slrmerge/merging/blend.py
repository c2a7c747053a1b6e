"""The arithmetic of a merge: blends and casts, chunk by chunk, in buffers that are reused."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from mmap import mmap
from typing import TYPE_CHECKING

from slrmerge.checkpoint.header import TORCH_DTYPES
from slrmerge.errors import BlendError, Problem
from slrmerge.io.progress import Progress
from slrmerge.recipe.blend import SUMS, BlendRule

if TYPE_CHECKING:
    import torch

CHUNK_ELEMENTS = 1 << 17
"""Elements per step: 512 KiB in float32, so that all buffers of a step fit in a core's cache."""

MAX_ELEMENT_BYTES = 8


class Blender:
    """Blends and casts one chunk at a time; owns its buffers, so each thread needs its own."""

    def __init__(self) -> None:
        self.inputs = (_buffer(), _buffer())
        self._wide = (_buffer(), _buffer())
        self._output = _buffer()
        self.nan_names: set[str] = set()
        """The blended tensors with a NaN."""

    def blend(
        self,
        name: str,
        elements: int,
        dtypes: tuple[str, str],
        output_dtype: str,
        *,
        rule: BlendRule,
        alpha: float,
        sums: Mapping[str, float],
    ) -> memoryview:
        """The bytes of a blended chunk of tensor `name`, from the first `elements` of the pre- and post-trained input.

        Computed in float32, or in float64 where any dtype is F64; rounded once to nearest even. Valid until the next
        call. Raises BlendError where float16 cannot represent a finite result.
        """
        values = [as_tensor(self.inputs[side], dtype, elements) for side, dtype in enumerate(dtypes)]
        if rule.is_mean and dtypes == (output_dtype, output_dtype):
            return self._mean(name, values, output_dtype, rule=rule, alpha=alpha)
        result = self._wide_blend(values, output_dtype, rule, alpha, sums)
        if has_nan(result):
            self.nan_names.add(name)
        return self._rounded(name, result, output_dtype, values)

    def _wide_blend(
        self, values: "list[torch.Tensor]", output_dtype: str, rule: BlendRule, alpha: float, sums: Mapping[str, float]
    ) -> "torch.Tensor":
        """The blend of two vectors in float32 or float64, not rounded yet."""
        dtypes = [value.dtype for value in (*values, as_tensor(self._output, output_dtype, 1))]
        wide = "F64" if torch_dtype("F64") in dtypes else "F32"
        pre, post = (as_tensor(self._wide[side], wide, len(value)).copy_(value) for side, value in enumerate(values))
        return rule.blend(pre, post, alpha, sums)

    def _mean(
        self, name: str, values: "list[torch.Tensor]", dtype: str, *, rule: BlendRule, alpha: float
    ) -> memoryview:
        """The weighted mean of two vectors of the output's dtype, in one pass: post + alpha × (pre − post).

        Where that is not finite the difference may have overflowed, and two products are added instead.
        """
        import torch

        pre, post = values
        output = as_tensor(self._output, dtype, len(pre))
        torch.lerp(post, pre, alpha, out=output)
        if not isfinite(output.sum()):  # a finite sum has finite terms only
            means = output.clone()
            self._round(self._wide_blend(values, dtype, rule, alpha, {}), output)
            torch.where(means.isfinite(), means, output, out=output)
            _check_overflow(name, output, values)
            if has_nan(output):
                self.nan_names.add(name)
        return self._output[: len(pre) * output.element_size()]

    def cast(
        self, name: str, elements: int, dtype: str, output_dtype: str, *, factor: float | None = None
    ) -> memoryview:
        """The first `elements` of the first input, times `factor`, rounded to nearest even once.

        Valid and raises as `blend`.
        """
        value = as_tensor(self.inputs[0], dtype, elements)
        result = value if factor is None else value.double().mul_(factor)
        return self._rounded(name, result, output_dtype, [value])

    def sums(self, elements: int, dtypes: tuple[str, str], keys: tuple[str, ...]) -> dict[str, float]:
        """Sums over a chunk of both inputs, in float64; see `recipe.blend.SUMS`."""
        pre, post = (as_tensor(self.inputs[side], dtype, elements).double() for side, dtype in enumerate(dtypes))
        return {key: float(SUMS[key](pre, post)) for key in keys}

    def _rounded(
        self, name: str, result: "torch.Tensor", output_dtype: str, values: "list[torch.Tensor]"
    ) -> memoryview:
        output = as_tensor(self._output, output_dtype, result.numel())
        self._round(result, output)
        _check_overflow(name, output, values)
        return self._output[: result.numel() * output.element_size()]

    def _round(self, result: "torch.Tensor", output: "torch.Tensor") -> None:
        if result.element_size() == 8 and output.element_size() == 2:
            result = round_to_odd(result)
        output.copy_(result)


def _check_overflow(name: str, output: "torch.Tensor", values: "list[torch.Tensor]") -> None:
    """Raise BlendError where a float16 `output` is infinite and the `values` that it comes from are not."""
    if output.dtype != torch_dtype("F16"):
        return
    overflowed = output.isinf()
    for value in values:
        overflowed &= value.isfinite()
    if overflowed.any():
        what, remedy = "has values beyond float16's 65504", "set dtype: bfloat16 or float32 in the recipe"
        raise BlendError(Problem("overflow", name, what, remedy))


def has_nan(values: "torch.Tensor") -> bool:
    """Whether any value is NaN; finite values cost one sum."""
    return not isfinite(float(values.sum())) and bool(values.isnan().any())


def as_tensor(buffer: memoryview, dtype: str, elements: int) -> "torch.Tensor":
    """The first `elements` of a buffer as a tensor of a safetensors dtype, without a copy."""
    import torch

    return torch.frombuffer(buffer, dtype=torch_dtype(dtype), count=elements)


def as_bytes(tensor: "torch.Tensor") -> memoryview:
    """The memory of a contiguous tensor, to be read or written."""
    import torch

    view: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return view


def torch_dtype(dtype: str) -> "torch.dtype":
    """torch's dtype for a floating safetensors dtype."""
    import torch

    found: torch.dtype = getattr(torch, TORCH_DTYPES[dtype])
    return found


def _buffer() -> memoryview:
    """Memory that is only taken as it is written: a copy needs no more than one buffer."""
    return memoryview(mmap(-1, CHUNK_ELEMENTS * MAX_ELEMENT_BYTES))


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
def one_core_per_chunk(progress: Progress | None = None) -> Iterator[None]:
    """Keep torch from splitting a chunk over cores: chunks are small, and several are computed at a time anyway.

    To `progress` it reports the import of torch.
    """
    if progress:
        progress.status("loading torch")
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
