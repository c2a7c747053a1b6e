"""The estimate of a search's time: matrix products, and what small layers take besides."""

import json
from pathlib import Path

import pytest
import torch

from slrmerge.checkpoint.files import LocalFile
from slrmerge.searching import estimate
from slrmerge.searching.scorer import LocalScorer
from slrmerge.searching.sweep.cost import KERNEL_BYTES, PAPER_MODELS, Cost, all_intervals_cost, sweep_memory_bytes
from tests.merging.faults import tree
from tests.searching.pairs import SmallPair, Watcher, hurried
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


def test_memory_holds_states_a_layer_and_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "peak_memory_bytes", lambda: 1000)
    write_models(tmp_path, "llama", dtypes=(torch.bfloat16, torch.bfloat16))
    with local_scorer(tmp_path) as scorer:
        exact, rough = (
            request(scorer, [POST, *INTERVALS], contexts(), dtype) for dtype in (torch.float32, torch.bfloat16)
        )
        made = estimate._own_estimate(scorer, [exact, rough])
        layer = [
            sum(each.nbytes for each in scorer.model(dtype).layers[0].parameters())
            for dtype in (exact.dtype, rough.dtype)
        ]
        loaded = [scorer._layer_bytes(scorer.model(dtype), 0) for dtype in (exact.dtype, rough.dtype)]
    assert loaded == [layer[0] + layer[1], layer[1]]  # as stored, and as computed where that is another dtype
    for row in made.rows:
        assert row.memory_bytes > 1000 + KERNEL_BYTES + row.cost.states_bytes


@pytest.mark.parametrize(("max_states_bytes", "held"), [(1 << 40, 8 << 30), (4 << 30, 4 << 30)])
def test_memory_for_states_has_a_limit(max_states_bytes: int, held: int) -> None:
    shape = PAPER_MODELS[0]
    found = sweep_memory_bytes(
        shape,
        Cost(1.0, 8 << 30, 1),
        layer_bytes=100 << 20,
        chunk_tokens=2048,
        max_states_bytes=max_states_bytes,
        itemsize=2,
    )
    chunk = 2048 * (shape.layer_parameters // 4096 + 8 * 4096) * 2
    assert found == KERNEL_BYTES + held + (100 << 20) + chunk


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


@hurried
def test_an_estimate_writes_nothing_and_covers_the_papers_models(small: SmallPair) -> None:
    ready = small.search()
    before = tree(small.folder)
    estimate = ready.estimate()
    assert tree(small.folder) == before
    contexts = ready.prepared.first.request.contexts
    assert (estimate.prompts, estimate.prompt_tokens) == (6, sum(len(context.ids) for context in contexts))
    assert estimate.packed_tokens < estimate.prompt_tokens
    assert [(row.name, row.candidates, row.dtype) for row in estimate.rows] == [
        ("post", 15, "float32"), ("post, held-out", 6, "float32"), ("Llama-3.1-8B", 530, "bfloat16"),
        ("Qwen2.5-7B", 408, "bfloat16"), ("Gemma-2-9B", 905, "bfloat16"),
    ]  # fmt: skip
    for row in estimate.rows:
        assert row.seconds == row.cost.flop / 1e11 + row.overhead_s > 0
    assert [row.overhead_s > 0 for row in estimate.rows] == [
        True,
        True,
        False,
        False,
        False,
    ]  # layers of width 16 are small
    assert json.loads(json.dumps(estimate.to_dict()))["rows"][0]["seconds"] == estimate.rows[0].seconds


@hurried
def test_the_number_of_states_is_that_of_the_estimate(small: SmallPair) -> None:
    watcher = Watcher()
    ready = small.search()
    states = ready.estimate().rows[0].cost.states
    ready.run(small.out, progress=watcher)
    assert watcher.totals[0] == states
    assert watcher.advanced == sum(watcher.totals)


@hurried
def test_a_quick_estimate_is_of_the_quick_pass(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrmerge.searching.prepare.QUICK_PROMPTS", 2)
    assert small.search(quick=True).estimate().prompts == 2


@hurried
def test_an_estimate_bounds_the_finalists_of_a_rough_first_pass(small: SmallPair) -> None:
    """Where all scores tie, every candidate is a finalist."""
    first, finalists, held_out, *_ = small.search(dtype="bfloat16").estimate().rows
    (exact, *_) = small.search().estimate().rows
    assert (first.dtype, finalists.dtype, held_out.dtype) == ("bfloat16", "float32", "float32")
    assert finalists.candidates == first.candidates == exact.candidates
    assert (finalists.name, finalists.cost) == ("post, finalists at most", exact.cost)
