"""Spherical interpolation: known weights and results."""

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slrmerge.recipe.blend import Slerp
from tests.merging.blends import PRECISION, merged, sums_of, tensor_of, values_of


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
