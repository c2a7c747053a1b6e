"""The cost of a sweep: its arithmetic from shapes alone, its time from the rate of a matrix product on this machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.layers import text_sections
from slrmerge.searching.sweep.paths import count_states

LAST_LAYER_SHARE = 0.2
"""The cost of a trie's last layer relative to another: keys and values of all tokens, the rest for the leaves only."""

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
ACTIVE_KEYS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
"""Names of the number of experts in configs, and of those that a token goes through."""

HEAD_BYTES = 1 << 26
"""Memory for a step of the head: rows of its weights, and the logits that they give in float64."""

KERNEL_BYTES = 1 << 26
"""What torch takes when it first computes."""

_MEASURED_ROWS = 512


@dataclass(frozen=True)
class Shape:
    """What the cost depends on: layers, matrix parameters per layer, hidden width, vocabulary, tokens of the trie."""

    name: str
    layers: int
    layer_parameters: int
    width: int
    vocabulary: int
    tokens: int
    last_layer_share: float = LAST_LAYER_SHARE

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        layers: Sequence[torch.nn.Module],
        *,
        width: int,
        vocabulary: int,
        tokens: int,
        last_layer_share: float = LAST_LAYER_SHARE,
    ) -> "Shape":
        """Of layers that differ, the mean; of experts, as many as a token goes through.

        `layers` are the model's own, which are dense where the checkpoint stores several numbers in a byte.
        """
        share = _active_share(checkpoint.config)
        sizes = [
            own.numel() * (share if ".experts." in name else 1)
            for layer in layers
            for name, own in layer.named_parameters()
            if own.dim() > 1
        ]
        parameters = round(sum(sizes) / len(layers))
        return cls(checkpoint.model_name, len(layers), parameters, width, vocabulary, tokens, last_layer_share)


def _active_share(config: Mapping[str, Any]) -> float:
    """The share of experts that a token goes through; 1 where there are none."""
    for section in text_sections(config):
        experts, active = (
            next((section[k] for k in keys if section.get(k)), None) for keys in (EXPERT_KEYS, ACTIVE_KEYS)
        )
        if isinstance(experts, int) and isinstance(active, int):
            return min(1.0, active / experts)
    return 1.0


PAPER_MODELS = (
    Shape("Llama-3.1-8B", 32, 218_103_808, 4096, 128_256, 772),
    Shape("Qwen2.5-7B", 28, 233_046_016, 3584, 152_064, 766),
    Shape("Gemma-2-9B", 42, 198_180_864, 3584, 256_000, 746),
)
"""Geometry from the models' configs; tokens as their tokenizers pack the 40 prompts (Gemma's is an estimate)."""


@dataclass(frozen=True)
class Cost:
    """Floating point operations of a sweep, the most bytes that its states take, the number of states to compute."""

    flop: float
    states_bytes: int
    states: int


def cost_of(shape: Shape, state_counts: Sequence[int], *, contexts: int, itemsize: int) -> Cost:
    """The cost from the number of states that each stage makes: embedding, layers, head."""
    per_state = 2 * shape.layer_parameters * shape.tokens
    *inner, last = state_counts[1:-1]
    layers = per_state * (sum(inner) + shape.last_layer_share * last)
    head = 2 * shape.vocabulary * shape.width * contexts * state_counts[-1]
    state_bytes = shape.tokens * shape.width * itemsize
    held = [before + after for before, after in pairwise(state_counts[:-2])]
    return Cost(layers + head, max(held, default=0) * state_bytes, sum(state_counts[1:-1]))


def sweep_memory_bytes(
    shape: Shape, cost: Cost, *, layer_bytes: int, chunk_tokens: int, max_states_bytes: int, itemsize: int
) -> int:
    """About the most memory that a sweep takes: states, the weights of a layer, and what a chunk makes in it.

    Besides a few states, a chunk holds for each matrix a vector of its other dimension per token. Searches of Llamas
    of 0.6, 26, 144 and 191 million parameters, in float32, peaked within 10% of the estimate.
    """
    tokens = max(shape.tokens, min(chunk_tokens, cost.states_bytes // 2 // (shape.width * itemsize)))
    chunk_bytes = tokens * (shape.layer_parameters // shape.width + 8 * shape.width) * itemsize
    states_bytes = min(cost.states_bytes, max_states_bytes)
    return KERNEL_BYTES + states_bytes + max(layer_bytes + chunk_bytes, 2 * HEAD_BYTES)


def all_intervals_cost(shape: Shape, *, contexts: int = 40, itemsize: int = 2) -> Cost:
    """The cost of scoring all intervals of a model and its two parents."""
    n = shape.layers
    intervals = [(i, j) for i in range(n) for j in range(i, n)]
    layers = [(*(int(i <= k <= j) for i, j in intervals), 0, 1) for k in range(n)]  # then post and pre
    outer = (0,) * len(intervals) + (0, 1)
    return cost_of(shape, count_states([outer, *layers, outer]), contexts=contexts, itemsize=itemsize)


def measured_rate(width: int, dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations per second of a matrix product of this width, the best of five or of a second's."""
    states = torch.randn(_MEASURED_ROWS, width, device=device).to(dtype)
    weight = torch.randn(width, width, device=device).to(dtype)
    times = []
    with torch.inference_mode():
        for _ in range(5):
            start = perf_counter()
            product = torch.nn.functional.linear(states, weight)
            product[0, 0].item()  # waits until the device has computed it
            times.append(perf_counter() - start)
            if sum(times) > 1:  # a processor without arithmetic in bfloat16 needs seconds for one
                break
    return 2 * _MEASURED_ROWS * width * width / min(times)
