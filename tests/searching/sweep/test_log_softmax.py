"""Log-probabilities from logits in runs, compared with torch's log_softmax of all logits."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slrmerge.searching.sweep.log_softmax import StreamingLogSoftmax
from slrmerge.searching.sweep.trie import Context

VOCABULARY = 11
CONTEXTS = [Context((1,), (3, 0, 10)), Context((2,), (5,)), Context((3,), (7, 7, 7, 2))]


def streamed(logits: torch.Tensor, cuts: list[int], states_at_a_time: int) -> torch.Tensor:
    """Log-probabilities of the targets from logits of shape (states, contexts, vocabulary)."""
    softmax = StreamingLogSoftmax(len(logits), CONTEXTS)
    ends = sorted({*cuts, VOCABULARY})
    for start, stop in zip([0, *ends], ends, strict=False):
        for first in range(0, len(logits), states_at_a_time):
            states = list(range(first, min(first + states_at_a_time, len(logits))))
            softmax.add(states, range(start, stop), logits[states, :, start:stop])
    return softmax.log_probs()


@settings(deadline=None)
@given(st.lists(st.integers(1, VOCABULARY - 1), max_size=5), st.integers(1, 4), st.integers(0, 5))
def test_runs_of_rows_give_the_log_softmax_of_all(cuts: list[int], states_at_a_time: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, len(CONTEXTS), VOCABULARY, generator=generator, dtype=torch.float64) * 30
    found, expected = streamed(logits, cuts, states_at_a_time), logits.log_softmax(dim=-1)
    assert found.shape == (4, len(CONTEXTS), 4)
    for number, context in enumerate(CONTEXTS):
        count = len(context.targets)
        torch.testing.assert_close(found[:, number, :count], expected[:, number, list(context.targets)])
        assert found[:, number, count:].isnan().all()


def test_states_that_overflowed_have_no_probability() -> None:
    logits = torch.zeros(3, len(CONTEXTS), VOCABULARY, dtype=torch.float64)
    logits[1, :, 4] = torch.nan
    logits[2, :, 4] = torch.inf
    found = streamed(logits, [2, 6], 2)
    wanted = ~found[0].isnan()
    assert wanted.sum() == sum(len(context.targets) for context in CONTEXTS)
    assert found[0, wanted].isfinite().all()
    assert (found[1:, wanted] == -torch.inf).all()
