"""Slerp: on the great circle from the post-trained tensor to the pre-trained one, however it is computed."""

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import slrmerge.stream
from slrmerge import execute, verify_checkpoint
from slrmerge.blend import Sums, linear, one_core_per_chunk, slerp
from slrmerge.checkpoint import CheckpointReader
from slrmerge.errors import PlanError, VerificationError
from slrmerge.hub import open_checkpoint
from slrmerge.plan import MergePlan, summarise_parts
from slrmerge.recipe import parse_recipe
from slrmerge.search.candidates import from_recipe
from slrmerge.stream import Sources
from tests.checkpoints import Tensor, random_tensor, read_back, write_checkpoint
from tests.conftest import Pair
from tests.plan import plan_of
from tests.streams import shard_chunks

PRECISION = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}
HALF = math.sin(math.pi / 4)  # both weights half way along a right angle


def sums_of(pre: Sequence[float], post: Sequence[float]) -> Sums:
    return Sums(
        math.fsum(p * p for p in pre),
        math.fsum(q * q for q in post),
        math.fsum(p * q for p, q in zip(pre, post, strict=True)),
    )


def values_of(tensor: Tensor) -> Any:
    """The values of a tensor, in float64."""
    if tensor.dtype == "BF16":
        return (np.frombuffer(tensor.data, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(tensor.data, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[tensor.dtype]).astype(np.float64)


def tensor_of(values: Sequence[float], dtype: str = "F32") -> Tensor:
    code = {"F64": "d", "F32": "f"}[dtype]
    return Tensor(dtype, (len(values),), struct.pack(f"<{len(values)}{code}", *values))


def shard_bytes(plan: MergePlan, *, stretch: int | None = None) -> list[bytes]:
    with CheckpointReader(plan.pretrained) as pre, CheckpointReader(plan.posttrained) as post:
        sources = Sources(pre, post)
        return [b"".join(shard_chunks(plan, shard, sources, stretch=stretch)) for shard in plan.shards]


def merged(folder: Path, pre: Tensor, post: Tensor, *, alpha: float, **more: Any) -> Tensor:
    """The slerp of two tensors, merged as a checkpoint of nothing else."""
    write_checkpoint(folder / "pre", {"x": pre}, {})
    write_checkpoint(folder / "post", {"x": post}, {})
    execute(plan_of(folder, alpha=alpha, blend="slerp", **more), folder / "out", fsync=False)
    return read_back(folder / "out")["x"]


# the weights


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
def test_known_weights(alpha: float, pre: list[float], post: list[float], weights: tuple[float, float]) -> None:
    assert slerp(alpha, sums_of(pre, post)) == pytest.approx(weights, rel=1e-12)


def test_just_beside_parallel_the_weights_are_slerps_own() -> None:
    sums = sums_of([1, 0], [1, 0.04])
    angle = math.atan(0.04)
    assert slerp(0.25, sums) == pytest.approx(
        (math.sin(angle / 4) / math.sin(angle), math.sin(angle * 3 / 4) / math.sin(angle))
    )
    assert slerp(0.25, sums) != linear(0.25)


@given(st.floats(0.01, 0.99), st.floats(0.1, 3), st.floats(0.1, 10))
@settings(deadline=None, max_examples=60)
def test_between_two_unit_vectors_every_step_is_as_long_and_stays_on_the_circle(
    alpha: float, angle: float, length: float
) -> None:
    pre, post = (length * math.cos(angle), length * math.sin(angle)), (length, 0.0)
    p, q = slerp(alpha, sums_of(pre, post))
    x, y = p * pre[0] + q * post[0], p * pre[1] + q * post[1]
    assert math.hypot(x, y) == pytest.approx(length, rel=1e-9)
    assert math.atan2(y, x) == pytest.approx(alpha * angle, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("values", [[math.inf, 1], [math.nan, 1], [-math.inf, math.nan]])
def test_weights_of_what_has_no_length_are_numbers(values: list[float]) -> None:
    weights = slerp(0.25, Sums(values[0] ** 2, 1.0, values[0] * values[1]))
    assert all(math.isfinite(weight) for weight in weights)


# the bytes


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
    found = merged(tmp_path, tensor_of(pre, dtype), tensor_of(post, dtype), alpha=alpha)
    assert values_of(found) == pytest.approx(values, rel=2.0 ** (2 - PRECISION[dtype]))


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
def test_a_slerp_is_numpys_within_one_rounding(
    tmp_path: Path, pre: str, post: str, dtype: str | None, output: str, alpha: float
) -> None:
    one, two = random_tensor(pre, (37, 11), f"pre{alpha}"), random_tensor(post, (37, 11), f"post{alpha}")
    found = merged(tmp_path, one, two, alpha=alpha, **({"dtype": dtype} if dtype else {}))
    p, q = values_of(one), values_of(two)
    angle = (
        np.arctan2(
            np.linalg.norm(p / np.linalg.norm(p) - q / np.linalg.norm(q)),
            np.linalg.norm(p / np.linalg.norm(p) + q / np.linalg.norm(q)),
        )
        * 2
    )
    terms = np.sin(alpha * angle) / np.sin(angle) * p, np.sin((1 - alpha) * angle) / np.sin(angle) * q
    wide = 53 if "F64" in (pre, post, output) else 24
    slack = 2.0 ** (3 - wide) * (abs(terms[0]) + abs(terms[1]))
    off = abs(values_of(found) - (terms[0] + terms[1]))
    assert found.dtype == output
    assert (off <= 2.0 ** -PRECISION[output] * abs(terms[0] + terms[1]) + slack).all()
    mean = abs(values_of(found) - (alpha * p + (1 - alpha) * q))
    assert (mean > 2.0 ** -PRECISION[output] * abs(terms[0] + terms[1]) + slack).sum() > 300  # of 407: it is no mean


def any_pair(folder: Path, *, wide: bool = True) -> MergePlan:
    """The plan of a slerp of a few tensors, empty and of no dimension among them."""
    kinds = [
        ("a", "BF16", (37, 11)),
        ("b", "F32", (301,)),
        ("c", "F16", (5, 5)),
        ("none", "F32", (0, 3)),
        ("one", "F32", ()),
    ]
    kinds += [("d", "F64", (99,))] if wide else []
    for side in ("pre", "post"):
        write_checkpoint(
            folder / side, {name: random_tensor(kind, shape, side + name) for name, kind, shape in kinds}, {}
        )
    return plan_of(folder, alpha=0.3, blend="slerp")


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_slerp_does_not_depend_on_the_chunks_it_is_computed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    plan = any_pair(tmp_path, wide=False)
    whole = shard_bytes(plan)
    monkeypatch.setattr(slrmerge.stream, "CHUNK_ELEMENTS", chunk)
    assert shard_bytes(plan) == whole


@pytest.mark.parametrize("stretch", [8, 24, 1000])
def test_a_slerp_does_not_depend_on_the_stretches_it_is_asked_for_in(tmp_path: Path, stretch: int) -> None:
    plan = any_pair(tmp_path)
    assert shard_bytes(plan, stretch=stretch) == shard_bytes(plan)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("piece", [512, 1 << 24])
def test_a_slerp_does_not_depend_on_threads_and_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, piece: int
) -> None:
    plan = any_pair(tmp_path)
    monkeypatch.setattr("slrmerge.writer.PIECE_BYTES", piece)
    execute(plan, tmp_path / "out", threads=threads, fsync=False)
    assert [(tmp_path / "out" / shard.name).read_bytes() for shard in plan.shards] == shard_bytes(plan)


def test_a_slerp_does_not_depend_on_torchs_threads(tmp_path: Path) -> None:
    import torch

    for side in ("pre", "post"):
        raw = np.random.default_rng(len(side)).standard_normal(200_000).astype("<f4").tobytes()
        write_checkpoint(tmp_path / side, {"a": Tensor("F32", (200_000,), raw)}, {})
    plan = plan_of(tmp_path, alpha=0.7, blend="slerp")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        several = shard_bytes(plan)
        with one_core_per_chunk():
            assert shard_bytes(plan) == several
    finally:
        torch.set_num_threads(before)


def test_not_numbers_go_through_a_slerp_as_they_do_through_a_mean(tmp_path: Path) -> None:
    rng = Random(1)
    pre = tensor_of([math.inf, math.nan, 1.0, *(rng.gauss(0, 1) for _ in range(9))])
    found = values_of(merged(tmp_path, pre, tensor_of([1.0] * 12), alpha=0.5))
    assert found[0] == math.inf
    assert math.isnan(found[1])
    assert np.isfinite(found[2:]).all()


# plans and merges


def kinds_of(plan: MergePlan) -> dict[float, set[str]]:
    found: dict[float, set[str]] = {}
    for tensor in plan.tensors():
        found.setdefault(tensor.alpha, set()).add(tensor.kind)
    return found


def test_at_0_and_1_a_slerp_is_a_copy(pair: Pair) -> None:
    plan = pair.plan(blend="slerp", restore=[0, 2], layers=[{"range": [5, 5], "alpha": 0.5}])
    assert kinds_of(plan) == {0: {"copy"}, 1: {"copy"}, 0.5: {"slerp"}}
    execute(plan, pair.out, fsync=False)
    for name, tensor in read_back(pair.out).items():
        if name.startswith("model.layers.5."):
            assert tensor not in (pair.pre[name], pair.post[name])
        else:
            restored = name.startswith(("model.layers.0.", "model.layers.1.", "model.layers.2."))
            assert tensor == (pair.pre if restored else pair.post)[name]


def test_a_slerp_that_changes_the_dtype_only_casts_at_0_and_1(pair: Pair) -> None:
    assert kinds_of(pair.plan(blend="slerp", restore=[0, 5], dtype="float32")) == {0: {"cast"}, 1: {"cast"}}


def test_without_slerp_alphas_are_means(pair: Pair) -> None:
    assert kinds_of(pair.plan(alpha=0.5)) == kinds_of(pair.plan(alpha=0.5, blend="linear")) == {0.5: {"blend"}}


def test_a_slerp_says_so_in_words(pair: Pair) -> None:
    plan = pair.plan(blend="slerp", layers=[{"range": [1, 2], "alpha": 0.25}])
    assert [(part.where, part.source) for part in summarise_parts(plan)] == [
        ("layer 0, 1 of 6", "post-trained"),
        ("layers 1–2, 2 of 6", "slerp, 0.25 of the way from post to pre"),
        ("layers 3–5, 3 of 6", "post-trained"),
        ("lm_head.weight, model.embed_tokens.weight, model.norm.weight", "post-trained"),
    ]


def test_a_slerp_is_verified_and_an_altered_one_found(pair: Pair) -> None:
    execute(pair.plan(alpha=0.4, blend="slerp", max_shard_size="2KB"), pair.out, fsync=False)
    verify_checkpoint(pair.out, full=True, threads=2)
    shard = pair.out / "model-00002-of-00003.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 64
    shard.write_bytes(raw)
    with pytest.raises(VerificationError) as caught:
        verify_checkpoint(pair.out, threads=1)
    name = list(pair.plan(alpha=0.4, max_shard_size="2KB").shards[1].tensors)[-1].name
    assert str(caught.value) == f"{shard}: was altered after it was written (in {name}); merge again"


def test_the_recipe_of_a_slerp_is_its_own(pair: Pair) -> None:
    recipe = parse_recipe({"pretrained": "a", "posttrained": "b", "alpha": 0.5, "blend": "slerp"})
    assert recipe.to_dict() == {"pretrained": "a", "posttrained": "b", "alpha": 0.5, "blend": "slerp"}


@pytest.mark.parametrize("label", ["other.yaml", "the recipe's own"])
def test_a_search_refuses_a_slerp(pair: Pair, label: str) -> None:
    recipe = parse_recipe({"pretrained": "a", "posttrained": "b", "alpha": 0.5, "blend": "slerp"})
    with pytest.raises(PlanError) as caught:
        from_recipe(recipe, label, open_checkpoint(pair.folder / "post"))
    assert str(caught.value) == f"{label}: is a slerp, and searches score means only; leave it out"
