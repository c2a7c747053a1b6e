"""The estimate of a search's time: matrix products, and what small layers take besides."""

from pathlib import Path

import pytest

from slrmerge.searching import estimate
from slrmerge.searching.scorer import LocalScorer
from tests.searching.sweep.models import INTERVALS, POST, contexts, local_scorer, request, write_models


def test_what_a_layer_takes_for_a_state_is_measured(tmp_path: Path) -> None:
    write_models(tmp_path, "llama")
    with local_scorer(tmp_path) as scorer:
        assert 0 < scorer.state_s(request(scorer, [POST], contexts())) < 1


@pytest.mark.parametrize("small_flop", [0.0, 1e18], ids=["large", "small"])
def test_small_layers_take_what_was_measured_for_every_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_flop: float
) -> None:
    rate, state_s = 1e9, 0.25
    monkeypatch.setattr(estimate, "SMALL_FLOP", small_flop)
    monkeypatch.setattr(estimate, "measured_rate", lambda width, dtype, device: rate)
    monkeypatch.setattr(LocalScorer, "state_s", lambda self, request: state_s)
    write_models(tmp_path, "llama")
    with local_scorer(tmp_path) as scorer:
        wanted = request(scorer, [POST, *INTERVALS], contexts())
        shape, cost = scorer.shape(wanted), scorer.cost(wanted)
        (row,) = estimate._own_estimate(scorer, [wanted]).rows
    besides = state_s - 2 * shape.layer_parameters * shape.tokens / rate
    expected = cost.states * besides if small_flop else 0.0
    assert besides > 0
    assert row.overhead_s == pytest.approx(expected)
    assert row.seconds == pytest.approx(cost.flop / rate + expected)
