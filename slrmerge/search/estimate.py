"""What a search would take on this machine, without reading a weight."""

from dataclasses import dataclass

import torch

from slrmerge.search.scoring import PairSweeper, Pass
from slrmerge.sweep.cost import PAPER_MODELS, Cost, all_intervals_cost, measured_rate


@dataclass(frozen=True)
class Estimate:
    """What searches would take on this machine: the pair at hand first, then the paper's three models."""

    prompts: int
    prompt_tokens: int
    packed_tokens: int
    lines: tuple["EstimateLine", ...]


@dataclass(frozen=True)
class EstimateLine:
    """One search's first pass: its cost, and the rate of a matrix product of its width, measured here."""

    name: str
    candidates: int
    dtype: str
    cost: Cost
    flop_per_s: float

    @property
    def seconds(self) -> float:
        """The products alone; reading weights and all else comes on top."""
        return self.cost.flop / self.flop_per_s


def estimate(sweeper: PairSweeper, first: Pass, *, device: torch.device) -> Estimate:
    """What a first pass costs, from shapes and a matrix product measured here, beside the paper's models."""
    shape = sweeper.shape(first)
    rate = measured_rate(shape.width, first.dtype, device)
    lines = [EstimateLine(shape.name, len(first.candidates), first.dtype_name, sweeper.cost(first), rate)]
    for known in PAPER_MODELS:
        candidates = known.layers * (known.layers + 1) // 2 + 2
        rate = measured_rate(known.width, torch.bfloat16, device)
        lines.append(EstimateLine(known.name, candidates, "bfloat16", all_intervals_cost(known), rate))
    prompt_tokens = sum(len(prompt.ids) for prompt in first.prompts)
    return Estimate(len(first.prompts), prompt_tokens, shape.tokens, tuple(lines))
