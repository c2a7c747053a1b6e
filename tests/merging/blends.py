"""Formats of numbers, exact references of linear blends in them, and merges of one tensor."""

import math
import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slrmerge.merging.executor import execute
from slrmerge.merging.options import MergeOptions
from tests.checkpoints import Tensor, read_back, write_checkpoint
from tests.merging.plan import plan_of

NO_FSYNC = MergeOptions(fsync=False)
Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class Format(NamedTuple):
    """An IEEE binary format: how many bits in all, and how many of the fraction."""

    bits: int
    fraction: int

    @property
    def inf(self) -> int:
        """The bits of infinity; greater ones, without the sign, are NaN."""
        return (1 << (self.bits - 1)) - (1 << self.fraction)

    @property
    def least_exponent(self) -> int:
        return 2 - (1 << (self.bits - self.fraction - 2))

    def magnitude(self, bits: int) -> int:
        return bits & ~(1 << (self.bits - 1))

    def negative(self, bits: int) -> bool:
        return bool(bits >> (self.bits - 1))

    def value(self, bits: int) -> Fraction:
        """The exact value of finite bits."""
        exponent, fraction = divmod(self.magnitude(bits), 1 << self.fraction)
        significand = fraction + ((1 << self.fraction) if exponent else 0)
        power = max(exponent, 1) - 1 + self.least_exponent - self.fraction
        return (-1 if self.negative(bits) else 1) * significand * Fraction(2) ** power

    def round(self, value: Fraction, *, negative: bool) -> int:
        """The bits nearest to `value`, ties to even; `negative` is the sign of a zero."""
        exact = abs(value)
        exponent = self.least_exponent
        if exact:
            floor = exact.numerator.bit_length() - exact.denominator.bit_length()
            exponent = max(exponent, floor - (Fraction(2) ** floor > exact))
        steps = round(exact / Fraction(2) ** (exponent - self.fraction))  # Python rounds ties to even
        bits = min(((exponent - self.least_exponent) << self.fraction) + steps, self.inf)
        return bits | (int(negative or value < 0) << (self.bits - 1))


FORMATS = {"F16": Format(16, 10), "BF16": Format(16, 7), "F32": Format(32, 23), "F64": Format(64, 52)}


def cast_reference(source: Format, output: Format, bits: int) -> int:
    """The bits that a cast must give; for NaN, those of infinity plus one stand for any NaN."""
    magnitude = source.magnitude(bits)
    if magnitude >= source.inf:
        sign = int(source.negative(bits)) << (output.bits - 1)
        return output.inf + 1 if magnitude > source.inf else output.inf | sign
    return output.round(source.value(bits), negative=source.negative(bits))


def mean_reference(dtype: str, alpha: float, pre: int, post: int) -> int:
    """post + alpha * (pre - post) or pre + (alpha - 1) * (pre - post), from the nearer end, for finite inputs.

    The difference is rounded in the wide format, and so is the rest, in one step (a fused multiply-add).
    """
    wide, source = FORMATS["F64" if dtype == "F64" else "F32"], FORMATS[dtype]
    weight = wide.value(wide.round(Fraction(alpha), negative=False))
    bits, factor = (post, weight) if weight < Fraction(1, 2) else (pre, weight - 1)
    is_negative = source.value(pre) == 0 and source.negative(pre) and not source.negative(post)  # (-0) - (+0)
    difference = wide.round(source.value(pre) - source.value(post), negative=is_negative)
    step, base = factor * wide.value(difference), source.value(bits)
    step_negative = (factor < 0) != wide.negative(difference)
    total = wide.round(step + base, negative=step == 0 and base == 0 and step_negative and source.negative(bits))
    return cast_reference(wide, source, total)


def blend_reference(output: str, alpha: float, pre: tuple[str, int], post: tuple[str, int]) -> int:
    """alpha * pre + (1 - alpha) * post for finite inputs: each step rounded in the wide format, then once more.

    Where all dtypes are the same, `mean_reference`.
    """
    if pre[0] == post[0] == output:
        return mean_reference(output, alpha, pre[1], post[1])
    wide = FORMATS["F64" if "F64" in (output, pre[0], post[0]) else "F32"]
    products: list[int] = []
    for weight, (dtype, bits) in ((alpha, pre), (1 - alpha, post)):
        factor = wide.value(wide.round(Fraction(weight), negative=False))
        source = FORMATS[dtype]
        products.append(wide.round(factor * source.value(bits), negative=source.negative(bits)))
    total = wide.round(
        sum(map(wide.value, products), Fraction()), negative=all(wide.negative(product) for product in products)
    )
    return cast_reference(wide, FORMATS[output], total)


PRECISION = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}


def values_of(tensor: Tensor) -> Array:
    if tensor.dtype == "BF16":
        return (np.frombuffer(tensor.data, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(tensor.data, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[tensor.dtype]).astype(np.float64)


def tensor_of(values: Sequence[float], dtype: str = "F32") -> Tensor:
    code = {"F64": "d", "F32": "f"}[dtype]
    return Tensor(dtype, (len(values),), struct.pack(f"<{len(values)}{code}", *values))


def merged(folder: Path, pre: Tensor, post: Tensor, *, alpha: float, rule: str, **more: Any) -> Tensor:
    """The blend of two tensors, merged as a checkpoint of nothing else."""
    write_checkpoint(folder / "pre", {"x": pre}, {})
    write_checkpoint(folder / "post", {"x": post}, {})
    execute(plan_of(folder, alpha=alpha, blend=rule, **more), folder / "out", options=NO_FSYNC)
    return read_back(folder / "out")["x"]


def sums_of(pre: Sequence[float], post: Sequence[float]) -> Mapping[str, float]:
    return {
        "pre_squared": math.fsum(p * p for p in pre),
        "post_squared": math.fsum(q * q for q in post),
        "product": math.fsum(p * q for p, q in zip(pre, post, strict=True)),
    }
