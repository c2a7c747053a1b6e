"""Metrics against values worked out by hand and by independent libraries, and at their edges."""

import subprocess
from itertools import pairwise
from math import isnan, log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import entropy as scipys_entropy
from scipy.stats import hypergeom
from sklearn.metrics.pairwise import cosine_similarity

from slrmerge.evaluation.metrics import (
    compression_ratio,
    coverage,
    dissimilarity,
    distinct,
    entropy,
    pass_at_k,
    precision,
    vendi_score,
)

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


def test_vendi_counts_different_directions() -> None:
    assert vendi_score(np.eye(5)) == pytest.approx(5)
    assert vendi_score(np.eye(5) * 1e-6) == pytest.approx(5)
    assert vendi_score(np.ones((7, 3))) == pytest.approx(1)
    assert vendi_score(np.array([[1, 0], [2, 0], [0, 1], [0, 3]])) == pytest.approx(2)
    assert vendi_score(np.array([[0, 0], [0, 0], [1, 0]])) == pytest.approx(3)  # zero vectors are like nothing else
    assert isnan(vendi_score(np.empty((0, 4))))


@given(arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 5)), elements=st.floats(0.5, 2, width=32)))
def test_vendi_is_the_exponential_of_the_entropy_of_singular_values(embeddings: np.ndarray) -> None:
    """By the other side: the squared singular values of the unit vectors, which need no matrix of similarities."""
    units = embeddings / np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True)
    singular = np.linalg.svd(units, compute_uv=False)
    assert vendi_score(embeddings) == pytest.approx(np.exp(scipys_entropy(singular**2)), rel=1e-6)


def test_vendi_is_that_of_its_authors() -> None:
    """Of vendi-score 0.0.3: `score_X(numpy.random.default_rng(0).normal(size=(20, 6)))`."""
    assert vendi_score(np.random.default_rng(0).normal(size=(20, 6))) == pytest.approx(5.225948215137828)


def test_distinct_by_hand() -> None:
    texts = ["to be or not to be", "to be", "be"]
    assert distinct(texts, 1) == 4 / 9
    assert distinct(texts, 2) == 4 / 6  # to be, be or, or not, not to; none from one text to the next
    assert isnan(distinct(["one", "two"], 2))
    assert isnan(distinct([], 1))


@given(st.lists(st.text("ab c", max_size=12), max_size=6))
def test_distinct_is_the_share_of_different_ngrams(texts: list[str]) -> None:
    pairs = [pair for text in texts for pair in pairwise(text.split())]
    expected = len(set(pairs)) / len(pairs) if pairs else float("nan")
    assert distinct(texts, 2) == pytest.approx(expected, nan_ok=True)


def test_what_repeats_compresses_better() -> None:
    words = [f"word{number * 7919 % 1000}" for number in range(2000)]
    varied, same = [" ".join(words[start : start + 40]) for start in range(0, 2000, 40)], [" ".join(words[:40])] * 50
    assert compression_ratio(same) > 5 * compression_ratio(varied) > 5
    assert isnan(compression_ratio([]))
    assert compression_ratio(["\ud83d"]) > 0


def test_the_compression_ratio_is_that_of_the_command() -> None:
    """Up to gzip's own choice of blocks; the command adds no name to what it reads from a pipe."""
    texts = ["Roses are red,", "violets are blue,", "sugar is sweet"] * 40
    data = "\n".join(texts).encode()
    packed = subprocess.run(["gzip", "-n", "-c"], input=data, capture_output=True, check=True).stdout
    assert compression_ratio(texts) == pytest.approx(len(data) / len(packed), rel=0.05)
