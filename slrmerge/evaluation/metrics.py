"""Metrics: precision, entropy, coverage, dissimilarity, pass@k (paper, section 4.1)."""

from collections import Counter
from collections.abc import Sequence
from math import comb, nan

import numpy as np
from numpy.typing import NDArray


def precision(mapped: Sequence[int | None]) -> float:
    """The share of samples that match an accepted answer, which is an index; NaN without samples."""
    return sum(answer is not None for answer in mapped) / len(mapped) if mapped else nan


def entropy(mapped: Sequence[int | None]) -> float:
    """The entropy in nats of the distribution of accepted answers; 0 where there is none."""
    counts = np.array(list(Counter(answer for answer in mapped if answer is not None).values()), dtype=np.float64)
    shares = counts / counts.sum() if counts.size else counts
    return float(abs(-(shares * np.log(shares)).sum()))  # 0 for a single answer, not -0


def coverage(mapped: Sequence[int | None], accepted: int) -> float:
    """Coverage-n: the share of the `accepted` answers that occur at least once."""
    return len({answer for answer in mapped if answer is not None}) / accepted


def dissimilarity(embeddings: NDArray[np.floating]) -> float:
    """1 minus the mean cosine similarity of all pairs; `embeddings` has shape (samples, width). NaN for fewer than two.

    A zero vector has similarity 0 with all others.
    """
    count = len(embeddings)
    if count < 2:
        return nan
    vectors = embeddings.astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    every_pair_twice = float((units.sum(axis=0) ** 2).sum() - (units**2).sum())
    return 1 - every_pair_twice / (count * (count - 1))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that one of `k` samples drawn without replacement is correct; NaN for fewer than `k` samples.

    The unbiased estimator 1 − C(n − c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374, equation 1), in exact
    integers.
    """
    return 1 - comb(samples - correct, k) / comb(samples, k) if samples >= k else nan
