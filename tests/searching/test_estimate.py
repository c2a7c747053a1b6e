"""The estimate of a search's time: matrix products, and what small layers take besides."""

from pathlib import Path

import pytest
import torch

from slrmerge.checkpoint.files import LocalFile
from slrmerge.searching import estimate
from slrmerge.searching.scorer import LocalScorer
from slrmerge.searching.sweep.cost import PAPER_MODELS, all_intervals_cost
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


@pytest.mark.parametrize("faster", [torch.bfloat16, torch.float32])
def test_the_papers_models_are_searched_in_the_dtype_that_is_faster_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: torch.dtype
) -> None:
    monkeypatch.setattr(estimate, "measured_rate", lambda width, dtype, device: 2e12 if dtype == faster else 1e12)
    monkeypatch.setattr(LocalFile, "download_bytes", 7)
    write_models(tmp_path, "llama")
    with local_scorer(tmp_path) as scorer:
        made = estimate.estimate(scorer, [request(scorer, [POST], contexts())])
    own, llama, *_ = made.rows
    assert (own.dtype, llama.dtype, llama.flop_per_s) == ("float32", str(faster).removeprefix("torch."), 2e12)
    assert llama.cost.states_bytes == all_intervals_cost(PAPER_MODELS[0], itemsize=faster.itemsize).states_bytes
    assert made.download_bytes == 7 * 2
