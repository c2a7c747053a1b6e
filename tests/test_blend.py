"""The arithmetic, held bit by bit against an exact reference; and the streams that carry it."""

from fractions import Fraction
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import slrmerge.stream
from slrmerge.blend import Blender, linear, one_core_per_chunk
from slrmerge.checkpoint import CheckpointReader
from slrmerge.errors import BlendError
from slrmerge.plan import MergePlan, PlannedFile
from slrmerge.stream import Sources, file_chunks
from slrmerge.writer import CHUNK_BYTES
from tests.checkpoints import Tensor, random_tensor, write_checkpoint
from tests.conftest import Pair
from tests.plan import plan_of
from tests.streams import shard_chunks

OVERFLOW = "x: has values past float16's 65504; use dtype: bfloat16 or float32 in the recipe"


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
    """What a Blender makes of the inputs' bits, as bits."""
    blender = Blender()
    count = len(inputs[0][1])
    for buffer, (dtype, column) in zip(blender.inputs, inputs, strict=False):
        width = FORMATS[dtype].bits // 8
        buffer[: count * width] = b"".join(bits.to_bytes(width, "little") for bits in column)
    raw = bytes(blender.run("x", count, tuple(dtype for dtype, _ in inputs), output, linear(alpha)))
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
        with pytest.raises(BlendError, match="past float16's 65504"):
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


def blend_reference(output: str, alpha: float, pre: tuple[str, int], post: tuple[str, int]) -> int:
    """alpha * pre + (1 - alpha) * post for finite inputs: each step rounded in the wide format, then once more."""
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
    ("BF16", "BF16", "F64"),
]


@pytest.mark.parametrize(("pre", "post", "output"), BLENDS)
@given(SEEDS, st.floats(0, 1) | st.sampled_from([0.85, 0.5, 0.9, 1 / 3]))
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


def test_a_blend_of_subnormals_flushes_nothing() -> None:
    least = [1, 3, 0x80000005, 0x007FFFFF]
    expected = [blend_reference("F32", 0.5, ("F32", bits), ("F32", bits)) for bits in least]
    assert expected == [0, 4, 0x80000004, 0x00800000]
    assert run("F32", 0.5, ("F32", least), ("F32", least)) == expected


def test_float16_overflow_is_refused_in_casts_and_blends() -> None:
    above = FORMATS["F32"].round(Fraction(65520), negative=False)
    fits = above - 1  # just under the midpoint between 65504 and the next power of two
    assert run("F16", 1.0, ("F32", [fits, fits | 1 << 31])) == [0x7BFF, 0xFBFF]
    for inputs in ([("F32", [0, above])], [("F32", [0, above]), ("F32", [0, above])], [("F32", [above | 1 << 31])]):
        with pytest.raises(BlendError) as caught:
            run("F16", 0.5, *inputs)
        assert str(caught.value) == OVERFLOW


def test_infinities_and_nan_that_were_there_before_pass_into_float16() -> None:
    inf, nan = 0x7F800000, 0x7FC00000
    assert run("F16", 1.0, ("F32", [inf, inf | 1 << 31])) == [0x7C00, 0xFC00]
    found = run("F16", 0.5, ("F32", [inf, 0, nan, inf]), ("F32", [0, inf, 0, inf | 1 << 31]))
    assert found[:2] == [0x7C00, 0x7C00]
    assert all(FORMATS["F16"].magnitude(bits) > 0x7C00 for bits in found[2:])


def test_bfloat16_overflow_is_infinity_as_everywhere() -> None:
    largest = 0x7F7FFFFF
    assert run("BF16", 0.5, ("F32", [largest]), ("F32", [largest])) == [0x7F80]


# streams


def shard_bytes(plan: MergePlan, *, stretch: int | None = None) -> list[bytes]:
    with CheckpointReader(plan.pretrained) as pre, CheckpointReader(plan.posttrained) as post:
        streams = [shard_chunks(plan, shard, Sources(pre, post), stretch=stretch) for shard in plan.shards]
        return [b"".join(bytes(chunk) for chunk in stream) for stream in streams]


def any_bytes(dtype: str, width: int, count: int, seed: str) -> Tensor:
    """Every bit pattern there is, NaN and infinities among them."""
    return Tensor(dtype, (count,), Random(seed).randbytes(count * width))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_tensor_does_not_depend_on_the_chunks_it_is_computed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    for side in ("pre", "post"):
        tensors = {
            f"t{n}": any_bytes(*kind, side + str(n)) for n, kind in enumerate((("BF16", 2, 999), ("F32", 4, 301)))
        }
        write_checkpoint(tmp_path / side, tensors | {"none": Tensor("F32", (0, 3), b"")}, {})
    plan = plan_of(tmp_path, alpha=0.3, dtype="bfloat16")
    whole = shard_bytes(plan)
    monkeypatch.setattr(slrmerge.stream, "CHUNK_ELEMENTS", chunk)
    assert shard_bytes(plan) == whole


@pytest.mark.parametrize("stretch", [8, 24, 1000])
def test_a_tensor_does_not_depend_on_the_stretches_it_is_asked_for_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stretch: int
) -> None:
    for side in ("pre", "post"):
        tensors = {"a": any_bytes("F32", 4, 999, side), "b": any_bytes("I32", 4, 9, side)}
        write_checkpoint(tmp_path / side, tensors | {"c": any_bytes("F32", 4, 50, side)}, {})
    plan = plan_of(tmp_path, alpha=0.7, dtype="bfloat16")
    alone = shard_bytes(plan)
    monkeypatch.setattr(slrmerge.stream, "CHUNK_ELEMENTS", 11)
    assert shard_bytes(plan, stretch=stretch) == alone


def test_a_tensor_does_not_depend_on_torchs_threads(tmp_path: Path) -> None:
    import torch

    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, {"a": any_bytes("F32", 4, 300_000, side)}, {})
    plan = plan_of(tmp_path, alpha=0.7, dtype="bfloat16")
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


@pytest.mark.parametrize("stretch", [8, 4096])
def test_overflow_names_its_tensor_whatever_the_stretch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stretch: int
) -> None:
    powers = [FORMATS["F32"].round(Fraction(10**k), negative=False) for k in range(38)]
    large = Tensor("F32", (38,), b"".join(bits.to_bytes(4, "little") for bits in powers))
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, {"norm.weight": large}, {})
    monkeypatch.setattr(slrmerge.stream, "CHUNK_ELEMENTS", 4)
    with pytest.raises(BlendError) as caught:
        shard_bytes(plan_of(tmp_path, alpha=0.7, dtype="float16"), stretch=stretch)
    assert str(caught.value) == OVERFLOW.replace("x:", "norm.weight:", 1)


def test_a_blended_shard_is_its_header_and_every_tensor_in_turn(pair: Pair) -> None:
    plan = pair.plan(alpha=0.25)
    (shard,) = plan.shards
    (raw,) = shard_bytes(plan)
    expected = b""
    for tensor in shard.tensors:
        sides = zip(*(memoryview(side[tensor.name].data).cast("H") for side in (pair.pre, pair.post)), strict=True)
        for one, two in sides:
            expected += blend_reference("BF16", 0.25, ("BF16", one), ("BF16", two)).to_bytes(2, "little")
    assert raw == shard.header + expected


@pytest.mark.parametrize("size", ["5GB", "1KB"])
def test_copied_shards_are_their_headers_and_the_tensors_of_both_sides(pair: Pair, size: str) -> None:
    plan = pair.plan(restore=[[0, 1], [4, 4]], max_shard_size=size)
    restored = tuple(f"model.layers.{layer}." for layer in (0, 1, 4))
    for shard, raw in zip(plan.shards, shard_bytes(plan), strict=True):
        sides = [pair.pre if tensor.name.startswith(restored) else pair.post for tensor in shard.tensors]
        expected = [side[tensor.name].data for side, tensor in zip(sides, shard.tensors, strict=True)]
        assert raw == shard.header + b"".join(expected)


def test_copies_longer_than_a_chunk_come_in_chunks(tmp_path: Path) -> None:
    big = Tensor("U8", (2 * CHUNK_BYTES + 5,), Random(1).randbytes(2 * CHUNK_BYTES + 5))
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, {"big": big, "small": random_tensor("F32", (3,), side)}, {})
    plan = plan_of(tmp_path, alpha=0)
    with CheckpointReader(plan.pretrained) as pre, CheckpointReader(plan.posttrained) as post:
        chunks = [bytes(chunk) for chunk in shard_chunks(plan, plan.shards[0], Sources(pre, post))]
    assert max(map(len, chunks)) == CHUNK_BYTES
    assert b"".join(chunks[1:]) == random_tensor("F32", (3,), "post").data + big.data


def test_a_side_file_comes_whole_from_disk_or_from_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"x" * (CHUNK_BYTES + 1))
    assert [len(chunk) for chunk in file_chunks(PlannedFile("t", CHUNK_BYTES + 1, source=path))] == [CHUNK_BYTES, 1]
    assert [bytes(chunk) for chunk in file_chunks(PlannedFile("t", 2, content=b"{}"))] == [b"{}"]
