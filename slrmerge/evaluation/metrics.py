"""Metrics: precision, entropy, coverage, dissimilarity, pass@k (paper, section 4.1); others that are widely used."""

import gzip
from collections import Counter
from collections.abc import Sequence
from math import comb, inf, nan
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Metric(NamedTuple):
    """A number for each prompt and model, at least 0 and at most `most`, where more is better unless `less_is_better`.

    Those not `in_table` are in the files of a result only.
    """

    name: str
    meaning: str
    in_table: bool = True
    most: float = 1
    less_is_better: bool = False


LEXICAL = (
    Metric("distinct-1", "share of the words of all samples that are different", in_table=False),
    Metric("distinct-2", "share of the pairs of neighbouring words that are different", in_table=False),
    Metric(
        "compression-ratio",
        "size of all samples by their size after gzip; less is more diverse",
        in_table=False,
        most=inf,
        less_is_better=True,
    ),
)
"""Diversity of a prompt's samples as texts, for every task."""


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
    units = _units(embeddings)
    every_pair_twice = float((units.sum(axis=0) ** 2).sum() - (units**2).sum())
    return 1 - every_pair_twice / (count * (count - 1))


def vendi_score(embeddings: NDArray[np.floating]) -> float:
    """The effective number of different texts, 1 to their number; NaN without texts. `embeddings`: (samples, width).

    The exponential of the entropy of the eigenvalues of K / n, K the cosine similarities (Friedman and Dieng 2023,
    arXiv 2210.02410). A zero vector is similar to itself only.
    """
    count = len(embeddings)
    if not count:
        return nan
    units = _units(embeddings)
    similarities = units @ units.T
    np.fill_diagonal(similarities, 1.0)
    shares = np.linalg.eigvalsh(similarities / count)
    shares = shares[shares > 0]  # by rounding, some of them are not
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _units(embeddings: NDArray[np.floating]) -> NDArray[np.float64]:
    """The vectors in float64 with length 1; zero vectors stay zero."""
    vectors = embeddings.astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units: NDArray[np.float64] = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return units


def distinct(texts: Sequence[str], n: int) -> float:
    """distinct-n: the share of the n-grams of all texts that are different (Li et al. 2016, arXiv 1510.03055).

    Words are what is between spaces; an n-gram is within one text. NaN where there is none.
    """
    count, different = 0, set[tuple[str, ...]]()
    for text in texts:
        words = text.split()
        count += max(0, len(words) - n + 1)
        different.update(zip(*(words[start:] for start in range(n)), strict=False))
    return len(different) / count if count else nan


def compression_ratio(texts: Sequence[str]) -> float:
    """The size of the texts, one after the other, by their size after gzip (Shaib et al. 2024, arXiv 2403.00553).

    At the command's default level, which is up to ten times as fast as the highest.
    """
    data = "\n".join(texts).encode("utf-8", "replace")
    return len(data) / len(gzip.compress(data, 6, mtime=0)) if data else nan


def lexical_metrics(texts: Sequence[str | None]) -> dict[str, float]:
    """The values of `LEXICAL`, without missing and empty samples; NaN where undefined."""
    known = [text for text in texts if text and text.strip()]
    values = (distinct(known, 1), distinct(known, 2), compression_ratio(known))
    return dict(zip((metric.name for metric in LEXICAL), values, strict=True))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that one of `k` samples drawn without replacement is correct; NaN for fewer than `k` samples.

    The unbiased estimator 1 − C(n − c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374, equation 1), in exact
    integers.
    """
    return 1 - comb(samples - correct, k) / comb(samples, k) if samples >= k else nan
