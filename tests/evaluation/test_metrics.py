"""Metrics against values worked out by hand and by independent libraries, and at their edges."""

from math import isnan, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import entropy as scipys_entropy
from scipy.stats import hypergeom
from sklearn.metrics.pairwise import cosine_similarity

from slrmerge.evaluation.metrics import coverage, dissimilarity, entropy, pass_at_k, precision

MAPPED = st.lists(st.none() | st.integers(0, 5), max_size=40)


def test_precision_is_the_share_that_was_mapped() -> None:
    assert precision([0, None, 3, 0]) == 0.75
    assert precision([None, None]) == 0
    assert isnan(precision([]))


def test_entropy_of_two_to_one_to_one_by_hand() -> None:
    assert entropy([0, 0, 1, 2, None]) == pytest.approx(1.5 * log(2))


@pytest.mark.parametrize("mapped", [[], [None], [None, None], [4], [4, 4, 4, None]])
def test_without_two_different_answers_nothing_varies(mapped: list[int | None]) -> None:
    assert str(entropy(mapped)) == "0.0"


@given(MAPPED)
def test_entropy_is_scipys(mapped: list[int | None]) -> None:
    counts = np.bincount([answer for answer in mapped if answer is not None], minlength=1)
    expected = scipys_entropy(counts[counts > 0]) if counts.any() else 0.0
    assert entropy(mapped) == pytest.approx(expected, abs=1e-12)


@given(MAPPED)
def test_entropy_is_at_most_that_of_all_its_answers_alike_often(mapped: list[int | None]) -> None:
    assert 0 <= entropy(mapped) <= log(max(1, len(set(mapped) - {None}))) + 1e-12


def test_coverage_counts_an_answer_once() -> None:
    assert coverage([0, 0, 3, None], 4) == 0.5
    assert coverage([None], 4) == 0
    assert coverage([], 4) == 0
    assert coverage([1, 0], 2) == 1


def test_dissimilarity_by_hand() -> None:
    right_angle = np.array([[1, 0], [0, 2]], dtype=np.float32)
    assert dissimilarity(right_angle) == pytest.approx(1)
    assert dissimilarity(np.array([[1, 0], [3, 0]])) == pytest.approx(0)
    assert dissimilarity(np.array([[1, 0], [-3, 0]])) == pytest.approx(2)
    assert dissimilarity(np.array([[1, 0], [0, 1], [-1, 0]])) == pytest.approx(1 + 1 / 3)


def test_dissimilarity_takes_two_texts_and_a_direction() -> None:
    assert isnan(dissimilarity(np.ones((1, 3))))
    assert isnan(dissimilarity(np.ones((0, 3))))
    assert dissimilarity(np.array([[0, 0], [1, 0]])) == pytest.approx(1)


@given(arrays(np.float64, st.tuples(st.integers(2, 8), st.integers(1, 5)), elements=st.integers(-9, 9).map(float)))
def test_dissimilarity_is_that_of_scikit_learns_pairs(embeddings: np.ndarray) -> None:
    pairs = cosine_similarity(embeddings)[np.triu_indices(len(embeddings), k=1)]
    assert dissimilarity(embeddings) == pytest.approx(1 - pairs.mean(), abs=1e-9)


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)  # of six pairs one has none of the two
    assert pass_at_k(64, 1, 64) == 1
    assert pass_at_k(64, 0, 64) == 0
    assert pass_at_k(3, 3, 1) == 1
    assert pass_at_k(1, 0, 1) == 0


def test_pass_at_k_has_no_value_for_more_than_there_are() -> None:
    assert isnan(pass_at_k(3, 3, 4))
    assert isnan(pass_at_k(0, 0, 1))


@given(st.integers(1, 128).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_what_scipy_says_of_drawing_without_replacement(drawn: tuple[int, int, int]) -> None:
    samples, correct, k = drawn
    assert pass_at_k(samples, correct, k) == pytest.approx(1 - hypergeom(samples, correct, k).pmf(0), abs=1e-9)
