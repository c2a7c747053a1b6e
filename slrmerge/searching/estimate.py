"""What a search would take on this machine, without reading weights."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from slrmerge.searching.scorer import LocalScorer, ScoreRequest
from slrmerge.searching.sweep.cost import PAPER_MODELS, Cost, all_intervals_cost, measured_rate

SMALL_FLOP = 2e10
"""Operations of a layer for one state below which what it takes is measured."""


@dataclass(frozen=True)
class EstimateRow:
    """The first pass of one search: its cost, and the rate of a matrix product of its width, measured here."""

    name: str
    candidates: int
    dtype: str
    cost: Cost
    flop_per_s: float
    overhead_s: float = 0.0
    """What small layers take besides their matrix products."""

    @property
    def seconds(self) -> float:
        """The time of the arithmetic, without reading weights."""
        return self.cost.flop / self.flop_per_s + self.overhead_s


@dataclass(frozen=True)
class Estimate:
    """What searches would take on this machine: the pair's first, then the paper's three models."""

    prompts: int
    prompt_tokens: int
    packed_tokens: int
    rows: tuple[EstimateRow, ...]
    workers: int = 1
    """With more than one, everything else is about the worker with the most to do."""

    download_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [{**asdict(row), "seconds": row.seconds} for row in self.rows]}


def estimate_parts(scorer: LocalScorer, parts: Sequence[ScoreRequest]) -> Estimate:
    """The cost of the largest part of a first pass that several workers share, at the rate of this machine."""
    largest = max(parts, key=lambda part: scorer.cost(part).flop)
    made = _own_estimate(scorer, largest, device=torch.device("cpu"))
    weights = (file for _, side in scorer.pair.items() for file in side.weight_files.values())
    return replace(made, workers=len(parts), download_bytes=sum(file.download_bytes for file in weights))


def estimate(scorer: LocalScorer, request: ScoreRequest, *, device: torch.device) -> Estimate:
    """The cost of a first pass, from shapes and a matrix product measured here, and of the paper's models."""
    made = _own_estimate(scorer, request, device=device)
    rows = []
    for known in PAPER_MODELS:
        candidates = known.layers * (known.layers + 1) // 2 + 2
        rate = measured_rate(known.width, torch.bfloat16, device)
        rows.append(EstimateRow(known.name, candidates, "bfloat16", all_intervals_cost(known), rate))
    return replace(made, rows=(*made.rows, *rows))


def _own_estimate(scorer: LocalScorer, request: ScoreRequest, *, device: torch.device) -> Estimate:
    """The cost of a first pass alone."""
    shape = scorer.shape(request)
    rate = measured_rate(shape.width, request.dtype, device)
    cost, overhead_s = scorer.cost(request), 0.0
    state_flop = 2 * shape.layer_parameters * shape.tokens
    if state_flop < SMALL_FLOP:
        overhead_s = cost.states * max(0.0, scorer.state_s(request) - state_flop / rate)
    row = EstimateRow(shape.name, len(request.candidates), request.dtype_name, cost, rate, overhead_s)
    prompt_tokens = sum(len(context.ids) for context in request.contexts)
    return Estimate(len(request.contexts), prompt_tokens, shape.tokens, (row,))
