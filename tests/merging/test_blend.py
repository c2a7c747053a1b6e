"""Blends and casts: linear ones bit by bit against an exact reference, every rule against float64, and their streams.

Tests of the second kind run for each of `BLEND_RULES`; a new rule needs a reference in `REFERENCES`.
"""

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slrmerge.checkpoint.files import LocalFile
from slrmerge.errors import BlendError, VerificationError
from slrmerge.io.pieces import CHUNK_BYTES
from slrmerge.merging import stream
from slrmerge.merging.blend import Blender, one_core_per_chunk
from slrmerge.merging.executor import execute
from slrmerge.merging.export import export_mergekit
from slrmerge.merging.options import MergeOptions
from slrmerge.merging.plan.model import MergePlan, PlannedFile, PlannedShard
from slrmerge.merging.plan.planner import plan_merge
from slrmerge.merging.plan.summary import summarise_parts
from slrmerge.merging.stream import HybridReader, file_chunks
from slrmerge.merging.verify import verify
from slrmerge.recipe.blend import BLEND_RULES, SUMS, Linear, Slerp
from tests.checkpoints import Tensor, random_tensor, read_back, write_checkpoint
from tests.conftest import Pair
from tests.merging.plan import plan_of
from tests.problems import refused
from tests.streams import shard_bytes, shard_chunks

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
SEEDS = st.integers(0, 1 << 32)
CASTS = [(source, output) for source in FORMATS for output in FORMATS if source != output]


def run(output: str, alpha: float, *inputs: tuple[str, list[int]]) -> list[int]:
    """The bits of a cast of one input, or of the linear blend of two."""
    blender = Blender()
    count = len(inputs[0][1])
    for buffer, (dtype, column) in zip(blender.inputs, inputs, strict=False):
        width = FORMATS[dtype].bits // 8
        buffer[: count * width] = b"".join(bits.to_bytes(width, "little") for bits in column)
    if len(inputs) == 1:
        raw = bytes(blender.cast("x", count, inputs[0][0], output))
    else:
        dtypes = (inputs[0][0], inputs[1][0])
        raw = bytes(blender.blend("x", count, dtypes, output, rule=Linear(), alpha=alpha, sums={}))
    width = FORMATS[output].bits // 8
    assert len(raw) == count * width
    return [int.from_bytes(raw[at : at + width], "little") for at in range(0, len(raw), width)]


def cast_reference(source: Format, output: Format, bits: int) -> int:
    """The bits that a cast must give; for NaN, those of infinity plus one stand for any NaN."""
    magnitude = source.magnitude(bits)
    if magnitude >= source.inf:
        sign = int(source.negative(bits)) << (output.bits - 1)
        return output.inf + 1 if magnitude > source.inf else output.inf | sign
    return output.round(source.value(bits), negative=source.negative(bits))


def same(output: Format, found: list[int], expected: list[int]) -> bool:
    return [output.inf + 1 if output.magnitude(bits) > output.inf else bits for bits in found] == expected


def overflows(source: Format, output: Format, column: list[int], expected: list[int]) -> bool:
    return any(
        output.magnitude(after) == output.inf and source.magnitude(before) < source.inf
        for before, after in zip(column, expected, strict=True)
    )


def near_ties(source: Format, output: Format, rng: Random) -> list[int]:
    """Bits in `source` at and around values of `output` and the midpoints between them, subnormals included."""
    found: list[int] = []
    for _ in range(8):
        step = rng.choice([rng.randrange(output.inf - 1), rng.randrange(1 << (output.fraction + 1))])
        low, high = output.value(step), output.value(step + 1)
        for value in (low, (low + high) / 2):
            bits = source.round(value, negative=False)
            near = [max(0, bits + offset) for offset in (-1, 0, 1)]
            found += [bits | (rng.getrandbits(1) << (source.bits - 1)) for bits in near if bits < source.inf]
    return found


@pytest.mark.parametrize(("source", "output"), CASTS)
@given(SEEDS)
@settings(deadline=None, max_examples=15)
def test_casts_round_once_to_nearest_even(source: str, output: str, seed: int) -> None:
    rng = Random(seed)
    wide, narrow = FORMATS[source], FORMATS[output]
    column = [rng.getrandbits(wide.bits) for _ in range(20)] + near_ties(wide, narrow, rng)
    expected = [cast_reference(wide, narrow, bits) for bits in column]
    if output == "F16" and overflows(wide, narrow, column, expected):
        with refused(BlendError, "overflow"):
            run(output, 1.0, (source, column))
        kept = [not overflows(wide, narrow, [one], [two]) for one, two in zip(column, expected, strict=True)]
        column = [bits for bits, keep in zip(column, kept, strict=True) if keep]
        expected = [bits for bits, keep in zip(expected, kept, strict=True) if keep]
    assert same(narrow, run(output, 1.0, (source, column)), expected)


@pytest.mark.parametrize(("source", "output"), CASTS)
def test_casts_keep_zeros_infinities_and_nan(source: str, output: str) -> None:
    wide, narrow = FORMATS[source], FORMATS[output]
    sign = 1 << (wide.bits - 1)
    column = [0, sign, wide.inf, sign | wide.inf, wide.inf + 1, sign | (wide.inf + 1), sign - 1, 1, sign | 1]
    found = run(output, 1.0, (source, column))
    assert same(narrow, found, [cast_reference(wide, narrow, bits) for bits in column])


@pytest.mark.parametrize(
    ("source", "bits", "output", "rounded"),
    [
        ("F32", 0x3F808000, "BF16", 0x3F80),  # a tie goes down to even
        ("F32", 0x3F818000, "BF16", 0x3F82),  # and up to even
        ("F32", 0x3F808001, "BF16", 0x3F81),
        ("F32", 0x00008000, "BF16", 0x0000),  # half the least subnormal
        ("F32", 0x00018000, "BF16", 0x0002),
        ("F32", 0x7F7FFFFF, "BF16", 0x7F80),  # bfloat16 overflows as IEEE says
        ("F64", 0x3FF0100000000001, "BF16", 0x3F81),  # by way of float32 it would be a tie
        ("F64", 0x3FF0100000000000, "BF16", 0x3F80),
        ("F64", 0x3FF0020000000001, "F16", 0x3C01),
        ("F64", 0x3FF0020000000000, "F16", 0x3C00),
        ("F64", 0x7FEFFFFFFFFFFFFF, "BF16", 0x7F80),
        ("F64", 0x8000000000000001, "BF16", 0x8000),
        ("F32", 0x33000000, "F16", 0x0000),  # 2**-25, half the least subnormal
        ("F32", 0x33000001, "F16", 0x0001),
    ],
)
def test_known_roundings(source: str, bits: int, output: str, rounded: int) -> None:
    assert run(output, 1.0, (source, [bits])) == [rounded]
    assert cast_reference(FORMATS[source], FORMATS[output], bits) == rounded


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


BLENDS = [
    ("BF16", "BF16", "BF16"),
    ("F32", "BF16", "BF16"),
    ("F16", "F16", "F16"),
    ("BF16", "F16", "F32"),
    ("F32", "F32", "F32"),
    ("F32", "F32", "BF16"),
    ("F64", "F64", "BF16"),
    ("F64", "F32", "F16"),
    ("F64", "BF16", "F64"),
    ("F64", "F64", "F64"),
    ("BF16", "BF16", "F64"),
]


@pytest.mark.parametrize(("pre", "post", "output"), BLENDS)
@given(SEEDS, st.floats(0, 1) | st.sampled_from([0.85, 0.5, 0.9, 1 / 3]))
@example(46077, 0.5)  # zeros of both signs
@settings(deadline=None, max_examples=15)
def test_blends_round_every_step_in_the_wide_format_and_the_result_once(
    pre: str, post: str, output: str, seed: int, alpha: float
) -> None:
    """Numbers like weights, some far apart in size, some that cancel."""
    rng = Random(seed)
    columns: list[tuple[int, int]] = []
    for _ in range(24):
        value = Fraction(rng.gauss(0, 1)) * Fraction(2) ** rng.choice([0, 0, 0, -8, -20, 10])
        other = rng.choice([Fraction(rng.gauss(0, 1)), -value, value, Fraction(0)])
        sides = ((pre, value), (post, other))
        one, two = (FORMATS[dtype].round(x, negative=bool(rng.getrandbits(1))) for dtype, x in sides)
        columns.append((one, two))
    expected = [blend_reference(output, alpha, (pre, one), (post, two)) for one, two in columns]
    found = run(output, alpha, (pre, [one for one, _ in columns]), (post, [two for _, two in columns]))
    assert found == expected


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_mean_whose_difference_overflows_is_the_sum_of_two_products(dtype: str) -> None:
    form = FORMATS[dtype]
    largest, sign = form.inf - 1, 1 << (form.bits - 1)
    pre, post = [largest, largest, 0, form.inf], [largest | sign, largest, largest, form.inf]
    assert run(dtype, 0.5, (dtype, pre), (dtype, post)) == [0, largest, largest - (1 << form.fraction), form.inf]


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_mean_does_not_depend_on_its_neighbours(dtype: str) -> None:
    """However a tensor is divided, and whatever else is not finite in a chunk."""
    form, rng = FORMATS[dtype], Random(1)
    sides = [[form.round(Fraction(rng.gauss(0, 1)), negative=False) for _ in range(301)] for _ in range(2)]
    whole = run(dtype, 0.3, *((dtype, side) for side in sides))
    parts = [run(dtype, 0.3, *((dtype, side[at : at + 7]) for side in sides)) for at in range(0, 301, 7)]
    assert [bits for part in parts for bits in part] == whole
    assert run(dtype, 0.3, *((dtype, [*side, form.inf]) for side in sides)) == [*whole, form.inf]


def test_a_blend_of_subnormals_flushes_nothing() -> None:
    least = [1, 3, 0x80000005, 0x007FFFFF]
    expected = [blend_reference("F32", 0.5, ("F32", bits), ("F32", bits)) for bits in least]
    assert expected == least  # the mean of a value and itself
    assert run("F32", 0.5, ("F32", least), ("F32", least)) == expected


def test_float16_overflow_is_refused_in_casts_and_blends() -> None:
    above = FORMATS["F32"].round(Fraction(65520), negative=False)
    fits = above - 1  # just under the midpoint between 65504 and the next power of two
    assert run("F16", 1.0, ("F32", [fits, fits | 1 << 31])) == [0x7BFF, 0xFBFF]
    for inputs in ([("F32", [0, above])], [("F32", [0, above]), ("F32", [0, above])], [("F32", [above | 1 << 31])]):
        with refused(BlendError, "overflow") as caught:
            run("F16", 0.5, *inputs)
        assert caught.value.problems[0].where == "x"


def test_infinities_and_nan_of_the_inputs_pass_into_float16() -> None:
    inf, nan = 0x7F800000, 0x7FC00000
    assert run("F16", 1.0, ("F32", [inf, inf | 1 << 31])) == [0x7C00, 0xFC00]
    found = run("F16", 0.5, ("F32", [inf, 0, nan, inf]), ("F32", [0, inf, 0, inf | 1 << 31]))
    assert found[:2] == [0x7C00, 0x7C00]
    assert all(FORMATS["F16"].magnitude(bits) > 0x7C00 for bits in found[2:])


def test_bfloat16_overflow_is_infinity() -> None:
    largest = 0x7F7FFFFF
    assert run("BF16", 0.5, ("F32", [largest]), ("F32", [largest])) == [0x7F80]


# every rule

PRECISION = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}


def linear_reference(pre: Array, post: Array, alpha: float) -> tuple[Array, Array]:
    return alpha * pre, (1 - alpha) * post


def slerp_reference(pre: Array, post: Array, alpha: float) -> tuple[Array, Array]:
    """By Kahan's formula for the angle, which is exact for small angles too."""
    p, q = pre / np.linalg.norm(pre), post / np.linalg.norm(post)
    angle = 2 * np.arctan2(np.linalg.norm(p - q), np.linalg.norm(p + q))
    return np.sin(alpha * angle) / np.sin(angle) * pre, np.sin((1 - alpha) * angle) / np.sin(angle) * post


REFERENCES: dict[str, Callable[[Array, Array, float], tuple[Array, Array]]] = {
    "linear": linear_reference,
    "slerp": slerp_reference,
}
"""The two terms of each rule in float64, independently of slrmerge."""

each_rule = pytest.mark.parametrize("rule", BLEND_RULES)


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


def test_every_rule_has_a_reference() -> None:
    assert REFERENCES.keys() == BLEND_RULES.keys()
    assert all(rule.name == name for name, rule in BLEND_RULES.items())
    assert all(set(rule.sums) <= SUMS.keys() for rule in BLEND_RULES.values())


@pytest.mark.parametrize(
    ("pre", "post", "dtype", "output"),
    [
        ("BF16", "BF16", None, "BF16"),
        ("F16", "F16", None, "F16"),
        ("F32", "F32", None, "F32"),
        ("F64", "F64", None, "F64"),
        ("F32", "BF16", None, "BF16"),
        ("BF16", "F32", None, "F32"),
        ("F64", "F32", None, "F32"),
        ("F16", "F64", None, "F64"),
        ("BF16", "BF16", "float32", "F32"),
        ("F64", "F64", "bfloat16", "BF16"),
    ],
)
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.85])
@each_rule
def test_a_blend_is_its_reference_within_one_rounding(
    tmp_path: Path, rule: str, pre: str, post: str, dtype: str | None, output: str, alpha: float
) -> None:
    one, two = random_tensor(pre, (37, 11), f"pre{alpha}"), random_tensor(post, (37, 11), f"post{alpha}")
    found = merged(tmp_path, one, two, alpha=alpha, rule=rule, **({"dtype": dtype} if dtype else {}))
    sides = values_of(one), values_of(two)
    terms = REFERENCES[rule](*sides, alpha)
    wide = 53 if "F64" in (pre, post, output) else 24
    slack = 2.0 ** (3 - wide) * (abs(terms[0]) + abs(terms[1]))
    allowed = 2.0 ** -PRECISION[output] * abs(terms[0] + terms[1]) + slack
    assert found.dtype == output
    assert (abs(values_of(found) - (terms[0] + terms[1])) <= allowed).all()
    for other in REFERENCES.keys() - {rule}:
        differs = abs(values_of(found) - sum(REFERENCES[other](*sides, alpha))) > allowed
        assert differs.sum() > 300  # of 407


@pytest.mark.parametrize("dtype", ["F32", "F64", "BF16"])
@each_rule
def test_a_blend_at_0_and_1_is_one_side_exactly(rule: str, dtype: str) -> None:
    pre, post = random_tensor(dtype, (50,), "pre"), random_tensor(dtype, (50,), "post")
    sums = sums_of(values_of(pre).tolist(), values_of(post).tolist())
    for alpha, side in ((1.0, pre), (0.0, post)):
        blender = Blender()
        for buffer, tensor in zip(blender.inputs, (pre, post), strict=True):
            buffer[: len(tensor.data)] = tensor.data
        found = blender.blend("x", 50, (dtype, dtype), dtype, rule=BLEND_RULES[rule], alpha=alpha, sums=sums)
        assert bytes(found) == side.data


def kinds_of(plan: MergePlan) -> dict[float, set[str]]:
    found: dict[float, set[str]] = {}
    for tensor in plan.tensors():
        found.setdefault(tensor.alpha, set()).add(tensor.kind)
    return found


@each_rule
def test_a_merge_copies_at_0_and_1_and_blends_between(pair: Pair, rule: str) -> None:
    plan = pair.plan(blend=rule, restore=[0, 2], layers=[{"range": [5, 5], "alpha": 0.5}])
    assert kinds_of(plan) == {0: {"copy"}, 1: {"copy"}, 0.5: {rule}}
    execute(plan, pair.out, options=NO_FSYNC)
    for name, tensor in read_back(pair.out).items():
        if name.startswith("model.layers.5."):
            assert tensor not in (pair.pre[name], pair.post[name])
        else:
            restored = name.startswith(("model.layers.0.", "model.layers.1.", "model.layers.2."))
            assert tensor == (pair.pre if restored else pair.post)[name]


@each_rule
def test_a_merge_that_changes_the_dtype_casts_at_0_and_1(pair: Pair, rule: str) -> None:
    assert kinds_of(pair.plan(blend=rule, restore=[0, 5], dtype="float32")) == {0: {"cast"}, 1: {"cast"}}


def test_the_default_rule_is_linear(pair: Pair) -> None:
    assert kinds_of(pair.plan(alpha=0.5)) == {0.5: {"linear"}}


def any_plan(folder: Path, rule: str, *, wide: bool = True, **more: Any) -> MergePlan:
    """The plan of a blend of a few tensors, among them an empty one and a scalar."""
    kinds = [
        ("a", "BF16", (37, 11)),
        ("b", "F32", (301,)),
        ("c", "F16", (5, 5)),
        ("none", "F32", (0, 3)),
        ("one", "F32", ()),
    ]
    kinds += [("d", "F64", (99,))] if wide else []
    for side in ("pre", "post"):
        tensors = {name: random_tensor(kind, shape, side + name) for name, kind, shape in kinds}
        write_checkpoint(folder / side, tensors, {})
    return plan_of(folder, alpha=0.3, blend=rule, **more)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@each_rule
def test_a_blend_does_not_depend_on_its_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, chunk: int
) -> None:
    plan = any_plan(tmp_path, rule, wide=False)
    whole = shard_bytes(plan)
    monkeypatch.setattr(stream, "CHUNK_ELEMENTS", chunk)
    assert shard_bytes(plan) == whole


@pytest.mark.parametrize("stretch", [8, 7, 1000])
@each_rule
def test_a_blend_does_not_depend_on_the_ranges_that_are_requested(tmp_path: Path, rule: str, stretch: int) -> None:
    plan = any_plan(tmp_path, rule)
    assert shard_bytes(plan, stretch=stretch) == shard_bytes(plan)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("piece", [512, 1 << 24])
@each_rule
def test_a_blend_does_not_depend_on_threads_and_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, threads: int, piece: int
) -> None:
    plan = any_plan(tmp_path, rule)
    monkeypatch.setattr("slrmerge.io.pieces.PIECE_BYTES", piece)
    execute(plan, tmp_path / "out", options=MergeOptions(threads=threads, fsync=False))
    assert [(tmp_path / "out" / shard.name).read_bytes() for shard in plan.shards] == shard_bytes(plan)


@each_rule
def test_a_blend_does_not_depend_on_torchs_threads(tmp_path: Path, rule: str) -> None:
    for side in ("pre", "post"):
        raw = np.random.default_rng(len(side)).standard_normal(200_000).astype("<f4").tobytes()
        write_checkpoint(tmp_path / side, {"a": Tensor("F32", (200_000,), raw)}, {})
    plan = plan_of(tmp_path, alpha=0.7, blend=rule, dtype="bfloat16")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        several = shard_bytes(plan)
        with one_core_per_chunk():
            assert torch.get_num_threads() == 1
            assert shard_bytes(plan) == several
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@each_rule
def test_infinity_and_nan_affect_no_other_element(tmp_path: Path, rule: str) -> None:
    rng = Random(1)
    pre = tensor_of([math.inf, math.nan, 1.0, *(rng.gauss(0, 1) for _ in range(9))])
    found = values_of(merged(tmp_path, pre, tensor_of([1.0] * 12), alpha=0.5, rule=rule))
    assert found[0] == math.inf
    assert math.isnan(found[1])
    assert np.isfinite(found[2:]).all()


@each_rule
def test_float16_overflow_of_a_merge_is_refused(tmp_path: Path, rule: str) -> None:
    pre, post = tensor_of([1e6, 1.0]), tensor_of([1e6, 2.0])
    with refused(BlendError, "overflow") as caught:
        merged(tmp_path, pre, post, alpha=0.5, rule=rule, dtype="float16")
    assert caught.value.problems[0].where == "x"


@each_rule
def test_a_blend_is_verified_and_an_altered_one_is_found(pair: Pair, rule: str) -> None:
    plan = pair.plan(alpha=0.4, blend=rule, max_shard_size="2KB")
    execute(plan, pair.out, options=NO_FSYNC)
    assert verify(pair.out, full=True, threads=2).against_sources
    shard = pair.out / "model-00002-of-00003.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 64
    shard.write_bytes(raw)
    with refused(VerificationError, "file-altered") as caught:
        verify(pair.out, threads=1)
    assert caught.value.problems[0].where == str(shard)
    assert plan.shards[1].tensors[-1].name in caught.value.problems[0].what


@each_rule
def test_the_summary_of_a_plan_describes_the_rule(pair: Pair, rule: str) -> None:
    plan = pair.plan(blend=rule, layers=[{"range": [1, 2], "alpha": 0.25}])
    described = BLEND_RULES[rule].describe(0.25)
    assert [part.source for part in summarise_parts(plan)] == [
        "post-trained",
        described,
        "post-trained",
        "post-trained",
    ]
    assert "0.25" in described
    assert "\n" not in described


def test_rules_have_descriptions_and_mergekit_methods_of_their_own() -> None:
    rules = BLEND_RULES.values()
    assert len({rule.describe(0.25) for rule in rules}) == len({rule.mergekit_method for rule in rules}) == len(rules)


@pytest.mark.parametrize("alpha", [0.25, 1 / 3])
@each_rule
def test_the_exported_mergekit_config_is_the_same_merge(pair: Pair, rule: str, alpha: float) -> None:
    rules = {"restore": [4, 4], "layers": [{"range": [1, 2], "alpha": alpha, "modules": ["mlp"]}]}
    plan = pair.plan(blend=rule, **rules)
    config = yaml.safe_load(export_mergekit(plan))
    assert config["merge_method"] == BLEND_RULES[rule].mergekit_method
    again = plan_merge(config)
    assert [*again.origins()] == [*plan.origins()]
    assert shard_bytes(again) == shard_bytes(plan)


# slerp


def sums_of(pre: Sequence[float], post: Sequence[float]) -> Mapping[str, float]:
    return {
        "pre_squared": math.fsum(p * p for p in pre),
        "post_squared": math.fsum(q * q for q in post),
        "product": math.fsum(p * q for p, q in zip(pre, post, strict=True)),
    }


def slerp_weights(alpha: float, sums: Mapping[str, float]) -> tuple[float, float]:
    return Slerp().weight(alpha, sums), Slerp().weight(1 - alpha, sums)


HALF = math.sin(math.pi / 4)  # both weights half way along a right angle


@pytest.mark.parametrize(
    ("alpha", "pre", "post", "weights"),
    [
        (0.5, [1, 0], [0, 1], (HALF, HALF)),
        (0.5, [3, 0], [0, 5], (HALF, HALF)),  # whatever their lengths
        (1 / 3, [1, 0], [0, 1], (0.5, math.sqrt(3) / 2)),  # 30 and 60 degrees
        (0.5, [1, 0], [1, 1], (math.sin(math.pi / 8) / HALF, math.sin(math.pi / 8) / HALF)),
        (0.5, [1, 0], [-1, 1], (math.sin(3 * math.pi / 8) / HALF, math.sin(3 * math.pi / 8) / HALF)),
        (0.25, [2, 0], [7, 0], (0.25, 0.75)),  # the same way
        (0.25, [2, 0], [-7, 0], (0.25, 0.75)),  # opposite ways
        (0.25, [0, 0], [3, 4], (math.sin(math.pi / 8), math.sin(3 * math.pi / 8))),  # zero points nowhere
        (0.25, [3, 4], [0, 0], (math.sin(math.pi / 8), math.sin(3 * math.pi / 8))),
        (0.25, [0, 0], [0, 0], (math.sin(math.pi / 8), math.sin(3 * math.pi / 8))),
        (0.25, [1e-9, 0], [1, 0], (math.sin(math.acos(1e-9) / 4), math.sin(math.acos(1e-9) * 3 / 4))),  # as good as 0
        (0.25, [1, 0], [1, 0.03], (0.25, 0.75)),  # a cosine of 0.99955
        (0.25, [-1, 0], [1, 0.03], (0.25, 0.75)),
    ],
)  # fmt: skip
def test_known_slerp_weights(alpha: float, pre: list[float], post: list[float], weights: tuple[float, float]) -> None:
    assert slerp_weights(alpha, sums_of(pre, post)) == pytest.approx(weights, rel=1e-12)


def test_almost_parallel_tensors_are_on_the_circle() -> None:
    sums = sums_of([1, 0], [1, 0.04])
    angle = math.atan(0.04)
    assert slerp_weights(0.25, sums) == pytest.approx(
        (math.sin(angle / 4) / math.sin(angle), math.sin(angle * 3 / 4) / math.sin(angle))
    )
    assert slerp_weights(0.25, sums) != pytest.approx((0.25, 0.75), rel=1e-6)


@given(st.floats(0.01, 0.99), st.floats(0.1, 3), st.floats(0.1, 10))
@settings(deadline=None, max_examples=60)
def test_slerp_moves_evenly_along_the_circle(alpha: float, angle: float, length: float) -> None:
    pre, post = (length * math.cos(angle), length * math.sin(angle)), (length, 0.0)
    p, q = slerp_weights(alpha, sums_of(pre, post))
    x, y = p * pre[0] + q * post[0], p * pre[1] + q * post[1]
    assert math.hypot(x, y) == pytest.approx(length, rel=1e-9)
    assert math.atan2(y, x) == pytest.approx(alpha * angle, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("values", [[math.inf, 1], [math.nan, 1], [-math.inf, math.nan]])
def test_slerp_weights_of_infinite_tensors_are_finite(values: list[float]) -> None:
    sums = {"pre_squared": values[0] ** 2, "post_squared": 1.0, "product": values[0] * values[1]}
    weights = slerp_weights(0.25, sums)
    assert all(math.isfinite(weight) for weight in weights)


@pytest.mark.parametrize(
    ("alpha", "pre", "post", "values"),
    [
        (0.5, [2, 0], [0, 2], [math.sqrt(2), math.sqrt(2)]),
        (0.25, [4, 8], [8, 16], [7, 14]),
        (0.25, [4, 8], [-4, -8], [-2, -4]),
        (0.5, [0, 0], [1, 2], [HALF, 2 * HALF]),
        (0.5, [0, 0], [0, 0], [0, 0]),
    ],
)
@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_known_slerps(
    tmp_path: Path, dtype: str, alpha: float, pre: list[float], post: list[float], values: list[float]
) -> None:
    found = merged(tmp_path, tensor_of(pre, dtype), tensor_of(post, dtype), alpha=alpha, rule="slerp")
    assert values_of(found) == pytest.approx(values, rel=2.0 ** (2 - PRECISION[dtype]))


# streams


def any_bytes(dtype: str, width: int, count: int, seed: str) -> Tensor:
    """Every bit pattern there is, NaN and infinities among them."""
    return Tensor(dtype, (count,), Random(seed).randbytes(count * width))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_any_bits_do_not_depend_on_the_chunks_they_are_computed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    for side in ("pre", "post"):
        tensors = {
            f"t{n}": any_bytes(*kind, side + str(n)) for n, kind in enumerate((("BF16", 2, 999), ("F32", 4, 301)))
        }
        write_checkpoint(tmp_path / side, tensors | {"none": Tensor("F32", (0, 3), b"")}, {})
    plan = plan_of(tmp_path, alpha=0.3, dtype="bfloat16")
    whole = shard_bytes(plan)
    monkeypatch.setattr(stream, "CHUNK_ELEMENTS", chunk)
    assert shard_bytes(plan) == whole


@pytest.mark.parametrize("stretch", [8, 7, 1000])
def test_any_bits_do_not_depend_on_the_ranges_that_are_requested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stretch: int
) -> None:
    for side in ("pre", "post"):
        tensors = {"a": any_bytes("F32", 4, 999, side), "b": any_bytes("I32", 4, 9, side)}
        write_checkpoint(tmp_path / side, tensors | {"c": any_bytes("F32", 4, 50, side)}, {})
    plan = plan_of(tmp_path, alpha=0.7, dtype="bfloat16")
    alone = shard_bytes(plan)
    monkeypatch.setattr(stream, "CHUNK_ELEMENTS", 11)
    assert shard_bytes(plan, stretch=stretch) == alone


@pytest.mark.parametrize("stretch", [8, 4096])
def test_overflow_names_its_tensor_whatever_the_stretch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stretch: int
) -> None:
    powers = [FORMATS["F32"].round(Fraction(10**k), negative=False) for k in range(38)]
    large = Tensor("F32", (38,), b"".join(bits.to_bytes(4, "little") for bits in powers))
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, {"norm.weight": large}, {})
    monkeypatch.setattr(stream, "CHUNK_ELEMENTS", 4)
    with refused(BlendError, "overflow") as caught:
        shard_bytes(plan_of(tmp_path, alpha=0.7, dtype="float16"), stretch=stretch)
    assert caught.value.problems[0].where == "norm.weight"


def header_of(shard: PlannedShard, pair: Pair) -> bytes:
    """A shard's own header, or that of the post-trained file where it is kept."""
    kept = (pair.folder / "post" / shard.name).read_bytes() if shard.kept else shard.header
    return kept[: shard.data_start]


def test_a_blended_shard_is_its_header_and_every_tensor_in_turn(pair: Pair) -> None:
    plan = pair.plan(alpha=0.25)
    for shard, raw in zip(plan.shards, shard_bytes(plan), strict=True):
        expected = header_of(shard, pair)
        for tensor in shard.tensors:
            sides = zip(*(memoryview(side[tensor.name].data).cast("H") for side in (pair.pre, pair.post)), strict=True)
            for one, two in sides:
                expected += blend_reference("BF16", 0.25, ("BF16", one), ("BF16", two)).to_bytes(2, "little")
        assert raw == expected


@pytest.mark.parametrize("size", ["5GB", "1KB"])
def test_copied_shards_are_their_headers_and_the_tensors_of_both_sides(pair: Pair, size: str) -> None:
    plan = pair.plan(restore=[[0, 1], [4, 4]], max_shard_size=size)
    restored = tuple(f"model.layers.{layer}." for layer in (0, 1, 4))
    for shard, raw in zip(plan.shards, shard_bytes(plan), strict=True):
        sides = [pair.pre if tensor.name.startswith(restored) else pair.post for tensor in shard.tensors]
        expected = [side[tensor.name].data for side, tensor in zip(sides, shard.tensors, strict=True)]
        assert raw == header_of(shard, pair) + b"".join(expected)


def test_copies_longer_than_a_chunk_come_in_chunks(tmp_path: Path) -> None:
    big = Tensor("U8", (2 * CHUNK_BYTES + 5,), Random(1).randbytes(2 * CHUNK_BYTES + 5))
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, {"big": big, "small": random_tensor("F32", (3,), side)}, {})
    for alpha in (0, 1):
        plan = plan_of(tmp_path, alpha=alpha)
        with plan.pair.open() as readers:
            chunks = list(shard_chunks(plan, plan.shards[0], HybridReader(readers)))
        assert max(map(len, chunks)) == CHUNK_BYTES
        small = random_tensor("F32", (3,), "pre" if alpha else "post").data
        assert b"".join(chunks)[plan.shards[0].data_start :] == big.data + small


def test_a_side_file_comes_whole_from_disk_or_from_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"x" * (CHUNK_BYTES + 1))
    copied = PlannedFile("t", LocalFile.at(path))
    assert (copied.file_bytes, [len(chunk) for chunk in file_chunks(copied)]) == (CHUNK_BYTES + 1, [CHUNK_BYTES, 1])
    assert list(file_chunks(PlannedFile("t", content=b"{}"))) == [b"{}"]
