"""Linear blends and casts, bit by bit against an exact reference."""

from fractions import Fraction
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slrmerge.errors import BlendError
from slrmerge.merging.blend import Blender
from slrmerge.recipe.blend import Linear
from tests.merging.blends import FORMATS, Format, blend_reference, cast_reference
from tests.problems import refused

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
