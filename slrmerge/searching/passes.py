"""A pass of a search: candidates, prompts and a dtype in; scores of each candidate on each prompt out."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from slrmerge.searching.candidates import Candidate
from slrmerge.searching.prompts import Prompt, contexts_of
from slrmerge.searching.proxy_tasks import Scores
from slrmerge.searching.scorer import ScoreRequest
from slrmerge.searching.selection import ScoredCandidate

PASSES = {
    "first": "scoring candidates",
    "finalists": "re-scoring finalists",
    "held-out": "asking held-out prompts",
}
"""The passes by name, as their progress is reported."""


@dataclass(frozen=True)
class Pass:
    """Candidates to score on prompts, computed in `dtype`; `name` is the folder of its hidden states."""

    name: str
    candidates: Sequence[Candidate]
    prompts: Sequence[Prompt]
    dtype: torch.dtype

    @cached_property
    def request(self) -> ScoreRequest:
        alphas = [candidate.alphas for candidate in self.candidates]
        return ScoreRequest(self.name, alphas, contexts_of(self.prompts), self.dtype)

    def is_exact(self, prompts: Sequence[Prompt]) -> bool:
        """Whether its scores can be selected by: in float32, on all of the task's prompts."""
        return self.dtype == torch.float32 and len(self.prompts) == len(prompts)


@dataclass(frozen=True)
class PassResult:
    """Candidates with their scores, the post-trained model first.

    `scores` has a column for each prompt of the task, NaN where it was left out; `post_quality` is by conditions.
    """

    rows: list[ScoredCandidate]
    scores: Scores
    post_quality: dict[str, float]

    @classmethod
    def of(cls, wanted: Pass, scores: Scores, prompts: Sequence[Prompt]) -> "PassResult":
        """The result of a pass over some of the task's prompts."""
        exact = wanted.is_exact(prompts)
        rows = [
            ScoredCandidate(
                **vars(each.info),
                quality=float(q),
                diversity=float(d),
                exact=exact,
                prompts=len(wanted.prompts),
                dtype=wanted.request.dtype_name,
            )
            for each, q, d in zip(wanted.candidates, scores.quality.mean(1), scores.diversity.mean(1), strict=True)
        ]
        every = np.full((2, len(rows), len(prompts)), np.nan)
        every[:, :, [prompts.index(prompt) for prompt in wanted.prompts]] = scores
        return cls(rows, Scores(*every), {rows[0].conditions: rows[0].quality})

    def replaced_by(self, exact: "PassResult") -> "PassResult":
        """These candidates; those that were scored exactly have their exact scores."""
        places = {row.label: number for number, row in enumerate(self.rows)}
        rows, scores = list(self.rows), Scores(*(values.copy() for values in self.scores))
        for number, row in enumerate(exact.rows):
            place = places[row.label]
            rows[place] = row
            scores.quality[place] = exact.scores.quality[number]
            scores.diversity[place] = exact.scores.diversity[number]
        return PassResult(rows, scores, {**self.post_quality, **exact.post_quality})
