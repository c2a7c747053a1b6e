"""Blends by every rule, compared with float64: one rounding, whatever the chunks, ranges and threads.

Tests run for each of `BLEND_RULES`; a new rule needs a reference in `REFERENCES`.
"""

import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from slrmerge.errors import BlendError, VerificationError
from slrmerge.merging import stream
from slrmerge.merging.blend import Blender, one_core_per_chunk
from slrmerge.merging.executor import execute
from slrmerge.merging.export import export_mergekit
from slrmerge.merging.options import MergeOptions
from slrmerge.merging.plan.model import MergePlan
from slrmerge.merging.plan.planner import plan_merge
from slrmerge.merging.plan.summary import summarise_parts
from slrmerge.merging.verify import verify
from slrmerge.recipe.blend import BLEND_RULES, SUMS
from tests.checkpoints import Tensor, random_tensor, read_back, write_checkpoint
from tests.conftest import Pair
from tests.merging.blends import NO_FSYNC, PRECISION, Array, merged, sums_of, tensor_of, values_of
from tests.merging.plan import plan_of
from tests.problems import refused
from tests.streams import shard_bytes


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
