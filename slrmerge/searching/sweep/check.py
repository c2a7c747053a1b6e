"""Compares a sweep with the model's own forward before its scores are trusted."""

import torch

from slrmerge.errors import Problem, UnsupportedModelError

TOLERANCE = 1e-4
"""The largest difference of a probability in float32; the error of a correct sweep is a hundredth of it."""


def require_agreement(reference: torch.Tensor, swept: torch.Tensor, *, where: str, model: str) -> None:
    """Raise UnsupportedModelError where a probability differs by more than the tolerance.

    Both are log-probabilities of one hybrid, float64, shape (1, contexts, targets), NaN past a context's own targets.
    """
    gap = (reference.exp().nan_to_num(nan=-1) - swept.exp().nan_to_num(nan=-1)).abs().max().item()
    if not gap <= TOLERANCE:  # a NaN does not pass either
        what = f"the sweep does not reproduce {model}: a probability differs by {gap:.2g}, {TOLERANCE:g} is allowed"
        raise UnsupportedModelError(
            Problem("sweep-disagrees", where, what, "please report this model; it cannot be searched yet")
        )
