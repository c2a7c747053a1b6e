"""What a search would take on this machine, without reading weights."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from slrmerge.io.memory import peak_memory_bytes
from slrmerge.searching.device import dtype_name
from slrmerge.searching.scorer import LocalScorer, ScoreRequest
from slrmerge.searching.sweep.cost import PAPER_MODELS, Cost, all_intervals_cost, measured_rate, sweep_memory_bytes
from slrmerge.searching.sweep.layouts import chunk_size

SMALL_FLOP = 2e10
"""Operations of a layer for one state below which what it takes is measured."""


@dataclass(frozen=True)
class EstimateRow:
    """A pass of a search: its cost, the most memory that the process has, and the rate measured here.

    The rate is that of a matrix product of the model's width.
    """

    name: str
    candidates: int
    dtype: str
    cost: Cost
    memory_bytes: int
    flop_per_s: float
    overhead_s: float = 0.0
    """What small layers take besides their matrix products."""

    @property
    def seconds(self) -> float:
        """The time of the arithmetic, without reading weights."""
        return self.cost.flop / self.flop_per_s + self.overhead_s


@dataclass(frozen=True)
class Estimate:
    """What searches would take on this machine: the passes over the pair, and the paper's models."""

    prompts: int
    prompt_tokens: int
    packed_tokens: int
    rows: tuple[EstimateRow, ...]
    workers: int = 1
    """With more than one, everything else is about the worker with the most to do."""

    download_bytes: int = 0
    program_bytes: int = 0
    """The memory of the process before it searches, of Python and its libraries."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [{**asdict(row), "seconds": row.seconds} for row in self.rows]}


def estimate_parts(scorer: LocalScorer, passes: Sequence[Sequence[ScoreRequest]]) -> Estimate:
    """The cost of the largest part of each pass, which several workers share, at the rate of this machine."""
    largest = [max(parts, key=lambda part: scorer.cost(part).flop) for parts in passes]
    return replace(_own_estimate(scorer, largest), workers=len(passes[0]))


def estimate(scorer: LocalScorer, passes: Sequence[ScoreRequest]) -> Estimate:
    """The cost of the passes, from shapes and a matrix product measured here, and of the paper's models.

    These are searched in the dtype that is faster here, as large models are by default.
    """
    made = _own_estimate(scorer, passes)
    width = PAPER_MODELS[0].width  # the others are about as wide
    rates = {dtype: measured_rate(width, dtype, scorer.device) for dtype in (torch.bfloat16, torch.float32)}
    dtype = max(rates, key=lambda each: rates[each])
    rows = []
    for known in PAPER_MODELS:
        candidates = known.layers * (known.layers + 1) // 2 + 2
        cost = all_intervals_cost(known, itemsize=dtype.itemsize)
        sweep_bytes = sweep_memory_bytes(
            known,
            cost,
            layer_bytes=known.layer_parameters * (dtype.itemsize if dtype == torch.bfloat16 else 2 + dtype.itemsize),
            chunk_tokens=chunk_size(known.width),
            max_states_bytes=scorer.options.max_memory_bytes,
            itemsize=dtype.itemsize,
        )
        named = known.name, candidates, dtype_name(dtype)
        rows.append(EstimateRow(*named, cost, made.program_bytes + sweep_bytes, rates[dtype]))
    return replace(made, rows=(*made.rows, *rows))


def _own_estimate(scorer: LocalScorer, passes: Sequence[ScoreRequest]) -> Estimate:
    """The cost of the passes alone; the tokens are those of the first."""
    program_bytes = peak_memory_bytes()  # before rates are measured
    first, *others = passes
    tokens = sum(len(context.ids) for context in first.contexts)
    name, packed = scorer.pair.posttrained.model_name, scorer.shape(first).tokens
    named = [(name, first), *((f"{name}, {each.name}", each) for each in others)]
    rows = [_row(name, scorer, request, program_bytes) for name, request in named]
    weights = (file for _, side in scorer.pair.items() for file in side.weight_files.values())
    download_bytes = sum(file.download_bytes for file in weights)
    return Estimate(
        len(first.contexts), tokens, packed, tuple(rows), download_bytes=download_bytes, program_bytes=program_bytes
    )


def _row(name: str, scorer: LocalScorer, request: ScoreRequest, program_bytes: int) -> EstimateRow:
    shape = scorer.shape(request)
    rate = measured_rate(shape.width, request.dtype, scorer.device)
    cost, overhead_s = scorer.cost(request), 0.0
    state_flop = 2 * shape.layer_parameters * shape.tokens
    if state_flop < SMALL_FLOP:
        overhead_s = cost.states * max(0.0, scorer.state_s(request) - state_flop / rate)
    peak_bytes = program_bytes + scorer.memory_bytes(request)
    return EstimateRow(name, len(request.candidates), request.dtype_name, cost, peak_bytes, rate, overhead_s)
