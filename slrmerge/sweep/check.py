"""Before a sweep is trusted: the post-trained model asked the ordinary way, and by the sweep."""

import torch

from slrmerge.errors import Problem, UnsupportedModelError

TOLERANCE = 1e-4
"""How far the probability of an answer may differ in fp32; the sweep's own error is a hundredth of that."""


def require_agreement(ordinary: torch.Tensor, swept: torch.Tensor, *, where: str, model: str) -> None:
    """Raise UnsupportedModelError where the two give different probabilities to some answer.

    Both are log-probabilities of one hybrid's answers, shape (1, prompts, answers).
    """
    gap = (ordinary.exp().nan_to_num(nan=-1) - swept.exp().nan_to_num(nan=-1)).abs().max().item()
    if not gap <= TOLERANCE:
        what = f"{model} answers otherwise in a sweep: a probability differs by {gap:.2g}, {TOLERANCE:g} is allowed"
        raise UnsupportedModelError(Problem(where, what, "please report this model; it cannot be searched yet"))
