"""Models of every family against transformers: experts, recurrences, convolutions, odd calls, vision towers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from slrmerge.searching.sweep.trie import Context
from tests.searching.sweep.families import log_probs_of, mixed_by_hand, write_family
from tests.searching.sweep.models import (
    POST,
    PRE,
    Killed,
    Recorder,
    alphas_of,
    contexts,
    gaps,
    hybrid,
    local_scorer,
    merged,
    request,
    scores,
    swept,
)

TOLERANCE = 1e-5
"""In Q and D, as is promised; measured 4e-7."""

RESTORED = [hybrid(restore=[1, 2]), hybrid(restore=[3, 3])]
FEW = contexts()[1:5]
"""Of three lengths."""

FAMILIES = {
    "experts": ("qwen3_moe", "causal", True),
    "experts in one tensor, sinks": ("gpt_oss", "causal", False),
    "linear attention and experts": ("qwen3_next", "causal", False),
    "recurrence": ("mamba2", "causal", False),
    "recurrence beside attention": ("falcon_h1", "causal", False),
    "convolution": ("lfm2", "causal", False),
    "absolute positions, layers called by position": ("gpt2", "causal", False),
    "vision tower": ("gemma3", "vision", True),
}
"""A type, its kind, and whether its prompts are packed as a trie."""

IN_EVERY_RUN = ("qwen3_moe", "qwen3_next", "falcon_h1", "gpt2", "gemma3")
"""The others are compared in slow runs, as every type is in `tests/slow/test_architectures.py`."""


@pytest.mark.parametrize(
    ("architecture", "kind", "in_trie"),
    [
        pytest.param(*each, id=name, marks=() if each[0] in IN_EVERY_RUN else pytest.mark.slow)
        for name, each in FAMILIES.items()
    ],
)
def test_hybrids_give_the_log_probs_of_hybrids_mixed_by_hand(
    tmp_path: Path, architecture: str, kind: str, in_trie: bool
) -> None:
    write_family(tmp_path, architecture, kind=kind)
    with local_scorer(tmp_path) as scorer:
        wanted = request(scorer, [POST, PRE, *RESTORED], FEW)
        log_probs = scorer.score(wanted, None, Recorder())
        assert (scorer.model(torch.float32).why_rows is None) == in_trie
        stack = scorer.pair.stack
    assert stack is not None
    folders = [
        tmp_path / "post", tmp_path / "pre", mixed_by_hand(tmp_path, 1, 2, stack.prefix),
        mixed_by_hand(tmp_path, 3, 3, stack.prefix),
    ]  # fmt: skip
    expected = np.stack([log_probs_of(folder, FEW, kind=kind) for folder in folders])
    assert max(gaps(log_probs, expected)) < TOLERANCE
    for number, one in enumerate(log_probs):  # or the comparison would mean little
        differences = np.abs(np.exp(log_probs[:number]) - np.exp(one))
        assert (np.nanmax(differences, axis=(1, 2)) > 100 * TOLERANCE).all()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pair whose prompts are rows: attention, and a recurrence beside it."""
    return write_family(tmp_path_factory.mktemp("rows"), "falcon_h1")


def test_rows_serve_soups_and_modules_of_layers(rows: Path, tmp_path: Path) -> None:
    hybrids = [
        hybrid(alpha=0.35),
        hybrid(layers=[{"range": [1, 2], "modules": ["self_attn"], "alpha": 1.0}]),
        hybrid(layers=[{"range": [0, 3], "modules": ["feed_forward"], "alpha": 1.0}]),
    ]
    folders = [merged(rows, rules, tmp_path / str(number)) for number, rules in enumerate(hybrids)]
    expected = np.stack([log_probs_of(folder, FEW) for folder in folders])
    assert max(gaps(swept(rows, [POST, *hybrids], FEW)[1:], expected)) < TOLERANCE


def test_rows_in_bfloat16_are_close_to_those_in_fp32(tmp_path: Path) -> None:
    write_family(tmp_path, "falcon_h1", dtype=torch.bfloat16)
    exact, rough = (
        swept(tmp_path, [POST, PRE, *RESTORED], FEW, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert 1e-5 < max(gaps(rough, exact)) < 0.05


def test_killed_rows_resume_in_memory_and_in_files(rows: Path, tmp_path: Path) -> None:
    hybrids = [POST, PRE, *RESTORED, hybrid(alpha=0.5)]
    complete, runs = swept(rows, hybrids, FEW), 0
    for runs in range(100):
        try:
            max_bytes = (1 << 30, 0)[runs % 2]
            log_probs = swept(rows, hybrids, FEW, kept=tmp_path, max_bytes=max_bytes, progress=Recorder(kill_at=9))
            break
        except Killed:
            continue
    assert runs > 1
    np.testing.assert_allclose(log_probs, complete, rtol=0, atol=1e-6)


def test_states_go_through_rows_together(rows: Path) -> None:
    """Seven states of a layer in calls of four, two and one give what each gives alone."""
    hybrids = [hybrid(alpha=alpha) for alpha in (0.0, 0.1, 0.2, 0.3)] + [hybrid(restore=[k, k]) for k in range(3)]
    together = swept(rows, hybrids, FEW)
    for number, rules in enumerate(hybrids):
        alone = swept(rows, [rules], FEW)
        assert max(gaps(together[number : number + 1], alone)) < 1e-6


def test_the_check_passes_for_rows(rows: Path) -> None:
    with local_scorer(rows) as scorer:
        scorer.check(alphas_of(scorer.pair, POST), FEW)


def test_contexts_that_are_prefixes_of_each_other_are_exact_in_rows(rows: Path) -> None:
    ids = FEW[0].ids
    wanted = [Context(ids[:3], (5, 6)), Context(ids, (7, 8)), Context(ids[:1], (9, 10)), Context(ids, (11,))]
    expected = log_probs_of(rows / "post", wanted)
    assert np.isfinite(scores(expected[:2][None]).quality).all()
    np.testing.assert_allclose(np.exp(swept(rows, [POST], wanted)[0]), np.exp(expected), rtol=0, atol=TOLERANCE)
