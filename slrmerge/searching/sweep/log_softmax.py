"""The log-probabilities of a few target tokens, without the logits of the whole vocabulary in memory."""

from collections.abc import Sequence

import torch

from slrmerge.searching.sweep.trie import Context


class StreamingLogSoftmax:
    """Log-softmax of target tokens from logits that arrive in runs of vocabulary rows; computed in float64."""

    def __init__(self, states: int, contexts: Sequence[Context]) -> None:
        most = max(len(context.targets) for context in contexts)
        self._log_sum = torch.full((states, len(contexts)), -torch.inf, dtype=torch.float64)
        self._target_logits = torch.full((states, len(contexts), most), torch.nan, dtype=torch.float64)
        self._is_target = torch.tensor([[k < len(context.targets) for k in range(most)] for context in contexts])
        # one entry per target: its context, its place among the context's targets, its token id
        self._context, self._place = self._is_target.nonzero(as_tuple=True)
        self._token = torch.tensor([token for context in contexts for token in context.targets], dtype=torch.long)

    def add(self, states: Sequence[int], rows: range, logits: torch.Tensor) -> None:
        """Add the logits of some states for a run of rows, shape (len(states), contexts, len(rows)), float64."""
        numbers = torch.tensor(states)
        self._log_sum[numbers] = torch.logaddexp(self._log_sum[numbers], logits.logsumexp(dim=-1))
        here = (self._token >= rows.start) & (self._token < rows.stop)
        context, place, token = self._context[here], self._place[here], self._token[here]
        self._target_logits[numbers[:, None], context, place] = logits[:, context, token - rows.start]

    def log_probs(self) -> torch.Tensor:
        """Log-probabilities, shape (states, contexts, targets), float64, NaN past a context's own targets.

        Those of a state whose values overflowed are -inf.
        """
        log_probs = self._target_logits - self._log_sum[..., None]
        log_probs[log_probs.isnan() & self._is_target] = -torch.inf
        return log_probs
