"""A second look at a selection: on prompts that were not used to select it, and on resampled prompts.

A search selects the best of hundreds of candidates on some prompts, so its scores there are a little too good.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from slrmerge.merging.finding import HeldOut, HeldOutScores, ScoreChange
from slrmerge.searching.prompt_scores import PromptScores
from slrmerge.searching.selection import ScoredCandidate, Selection, interval_space, tie_order

RESAMPLES, CONFIDENCE = 9999, 0.95
"""Of the intervals of changes: draws, and their level."""

DRAWS = 2000
"""Draws of prompts that are selected by; their shares have a standard error of at most 1.1 %."""

NAMES = {
    "post": "post-trained",
    "slr": "selected",
    "runner_up": "runner-up",
    "soup": "best soup",
    "early": "early control",
    "late": "late control",
    "pre": "pre-trained",
}
"""What tables call the hybrids that a search compares, in their order."""


def candidates_to_ask(choice: Selection) -> dict[str, ScoredCandidate]:
    """The candidates that answer held-out prompts, by name: those that a selection names, and the runner-up."""
    named = {**choice.named(), **({"runner_up": choice.runner_up} if choice.runner_up else {})}
    return {name: named[name] for name in NAMES if name in named}


def look_again(choice: Selection, answered: PromptScores | None) -> HeldOut | None:
    """The scores on held-out prompts, with their changes from the post-trained model.

    Without the candidates that were not asked: a later selection may name others. None where the post-trained model
    was not asked.
    """
    if answered is None or choice.post.label not in answered.candidates:
        return None
    post = answered.of(choice.post.label)
    scores = {}
    for name, row in candidates_to_ask(choice).items():
        if row.label in answered.candidates:
            own, is_post = answered.of(row.label), row is choice.post
            scores[name] = HeldOutScores(
                label=row.label,
                quality=float(own.quality.mean()),
                diversity=float(own.diversity.mean()),
                quality_change=None if is_post else _change(own.quality, post.quality),
                diversity_change=None if is_post else _change(own.diversity, post.diversity),
            )
    return HeldOut(prompts=len(answered.questions), scores=scores)


def reselect(rows: Sequence[ScoredCandidate], asked: PromptScores, *, min_quality: float) -> dict[str, float]:
    """How often each candidate is selected when the prompts are drawn again with replacement, most often first.

    Only candidates that were scored on all prompts are selected, as by `select_from`. In the remaining draws, none has
    enough quality. Empty where there is nothing to draw from.
    """
    space = interval_space(rows)
    tried = sorted((row for row in rows if row.exact and row.space == space), key=tie_order)
    post = next(row for row in rows if row.exact and row.space == "post")
    count = len(asked.questions)
    if not tried or count < 2:
        return {}
    places = [asked.candidates.index(row.label) for row in (*tried, post)]
    weights = _weights(count, DRAWS)
    # not a matrix product, whose rounding depends on the number of threads
    quality, diversity = (np.einsum("dp,cp->dc", weights, values[places]) for values in asked.scores)
    is_feasible = quality[:, :-1] >= min_quality * quality[:, -1:]
    best = np.where(is_feasible, diversity[:, :-1], -np.inf).argmax(axis=1)  # among equals the first
    times = np.bincount(best[is_feasible.any(axis=1)], minlength=len(tried))
    order = sorted(np.flatnonzero(times).tolist(), key=lambda number: -times[number])
    return {tried[number].label: float(times[number] / DRAWS) for number in order}


def _weights(prompts: int, draws: int) -> NDArray[np.float64]:
    """The weight of each prompt in each draw with replacement, shape (draws, prompts); deterministic."""
    counts = np.random.default_rng(0).multinomial(prompts, np.full(prompts, 1 / prompts), size=draws)
    return counts / prompts


def _change(values: NDArray[np.float64], reference: NDArray[np.float64]) -> ScoreChange:
    """The mean difference of paired values, with its bootstrap interval (percentiles)."""
    differences = values - reference
    mean = float(differences.mean())
    if len(differences) < 2:
        return ScoreChange(mean=mean)
    means = np.einsum("dp,p->d", _weights(len(differences), RESAMPLES), differences)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return ScoreChange(mean=mean, low=float(low), high=float(high))
