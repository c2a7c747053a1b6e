"""A sweep's log-probabilities against transformers': each hybrid merged, loaded, and run on one context at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from slrmerge.errors import PlanError
from slrmerge.searching.sweep.model import StagedModel
from slrmerge.searching.sweep.trie import Context
from tests.problems import refused
from tests.searching.sweep.models import (
    ARCHITECTURES,
    INTERVALS,
    MIXED,
    POST,
    PRE,
    SLIDING,
    SOUPS,
    VOCABULARY,
    alphas_of,
    contexts,
    edit_config,
    gaps,
    hybrid,
    local_scorer,
    merged_log_probs,
    scores,
    swept,
    transformers_log_probs,
    write_models,
)

TOLERANCE = 1e-5
"""In Q and D, as is promised; measured 1e-6."""

ALL = [POST, PRE, *INTERVALS, *SOUPS, *MIXED]
A_FEW = [POST, PRE, INTERVALS[5], SOUPS[1], MIXED[4]]

IN_EVERY_RUN = ("llama", "gemma2")
"""Of these every kind of hybrid and both kinds of head are compared in every run; of the others less."""

HEADS = [pytest.param(each, marks=() if each in IN_EVERY_RUN else pytest.mark.slow) for each in ARCHITECTURES]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_intervals_soups_and_mixtures_give_the_log_probs_of_merged_hybrids(tmp_path: Path, architecture: str) -> None:
    write_models(tmp_path, architecture)
    merged = [*A_FEW, *INTERVALS[1:3], *MIXED[:4]] if architecture in IN_EVERY_RUN else A_FEW
    expected = merged_log_probs(tmp_path, merged, contexts(), tmp_path)
    log_probs = swept(tmp_path, ALL, contexts())
    assert max(gaps(log_probs[[ALL.index(rules) for rules in merged]], expected)) < TOLERANCE
    for number, one in enumerate(log_probs):  # or the comparison would mean little
        differences = np.abs(np.exp(log_probs[:number]) - np.exp(one))
        assert (np.nanmax(differences, axis=(1, 2)) > 100 * TOLERANCE).all()


@pytest.mark.slow
def test_every_interval_soup_and_mixture_gives_the_log_probs_of_its_merge(llamas: Path, tmp_path: Path) -> None:
    expected = merged_log_probs(llamas, ALL, contexts(), tmp_path)
    assert max(gaps(swept(llamas, ALL, contexts()), expected)) < TOLERANCE


@pytest.mark.parametrize("architecture", HEADS)
def test_tied_and_untied_heads_are_exact(tmp_path: Path, architecture: str) -> None:
    tied = not ARCHITECTURES[architecture].get("tie_word_embeddings", False)
    write_models(tmp_path, architecture, tie_word_embeddings=tied)
    hybrids = A_FEW[1:4]
    expected = merged_log_probs(tmp_path, hybrids, contexts(), tmp_path)
    assert max(gaps(swept(tmp_path, hybrids, contexts()), expected)) < TOLERANCE


@pytest.mark.parametrize("pre_is_tied", [True, False])
def test_a_pair_with_one_tied_side_is_exact(tmp_path: Path, pre_is_tied: bool) -> None:
    write_models(tmp_path / "tied", "llama", tie_word_embeddings=True)
    write_models(tmp_path / "untied", "llama")
    (tmp_path / ("tied" if pre_is_tied else "untied") / "pre").rename(tmp_path / "pre")
    (tmp_path / ("untied" if pre_is_tied else "tied") / "post").rename(tmp_path / "post")
    hybrids = A_FEW if pre_is_tied else [POST, hybrid(restore=[1, 2])]
    expected = merged_log_probs(tmp_path, hybrids, contexts(), tmp_path)
    assert max(gaps(swept(tmp_path, hybrids, contexts()), expected)) < TOLERANCE


def test_a_padding_token_is_treated_like_any_token(tmp_path: Path) -> None:
    write_models(tmp_path, "llama", pad_token_id=VOCABULARY - 1)
    wanted = [Context((1, VOCABULARY - 1, 5), (7, 8)), Context((1, 5, VOCABULARY - 1), (7, VOCABULARY - 1))]
    for rules, side, some in ((POST, "post", wanted), (PRE, "pre", wanted[:1])):
        expected = transformers_log_probs(tmp_path / side, some)[None]
        assert max(gaps(swept(tmp_path, [rules], some), expected)) < TOLERANCE


def test_a_stored_head_is_used_though_the_config_ties_it(tmp_path: Path) -> None:
    write_models(tmp_path, "llama")
    for side in ("pre", "post"):
        edit_config(tmp_path / side, tie_word_embeddings=True)
    hybrids = [POST, PRE, hybrid(tensors=[{"match": "lm_head.weight", "alpha": 1.0}])]
    expected = merged_log_probs(tmp_path, hybrids, contexts(), tmp_path)
    assert max(gaps(swept(tmp_path, hybrids, contexts()), expected)) < TOLERANCE


def test_blends_are_rounded_to_the_output_dtype_like_those_of_a_merge(tmp_path: Path) -> None:
    write_models(tmp_path, "llama", dtypes=(torch.float32, torch.bfloat16))
    hybrids = A_FEW[1:4]
    fine = merged_log_probs(tmp_path, hybrids, contexts(), tmp_path)
    assert max(gaps(swept(tmp_path, hybrids, contexts()), fine)) < TOLERANCE
    other = merged_log_probs(tmp_path, hybrids, contexts(), tmp_path / "other", dtype="float16")
    assert max(gaps(swept(tmp_path, hybrids, contexts(), output_dtype="float16"), other)) < TOLERANCE
    assert max(gaps(fine, other)) > 10 * TOLERANCE


def test_other_contexts_do_not_change_a_log_prob(llamas: Path) -> None:
    together = swept(llamas, A_FEW, contexts())
    for number, context in enumerate(contexts()):
        alone = swept(llamas, A_FEW, [context])
        assert max(gaps(together[:, number : number + 1, : alone.shape[2]], alone)) < TOLERANCE


def test_only_log_probs_past_a_contexts_own_targets_are_nan(llamas: Path) -> None:
    log_probs = swept(llamas, A_FEW, contexts())
    assert log_probs.shape == (len(A_FEW), len(contexts()), 5)
    for number, context in enumerate(contexts()):
        assert np.isfinite(log_probs[:, number, : len(context.targets)]).all()
        assert np.isnan(log_probs[:, number, len(context.targets) :]).all()


def test_a_sweep_in_bfloat16_is_close_to_one_in_fp32(tmp_path: Path) -> None:
    write_models(tmp_path, "llama", dtypes=(torch.bfloat16, torch.bfloat16))
    hybrids = [POST, PRE, *INTERVALS]
    exact, rough = (swept(tmp_path, hybrids, contexts(), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert 1e-4 < max(gaps(rough, exact)) < 0.05
    means = [np.stack([values.mean(axis=1) for values in scores(log_probs)]) for log_probs in (exact, rough)]
    assert np.abs(means[0] - means[1]).max() < 0.01


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_contexts_that_are_prefixes_of_each_other_are_exact(tmp_path: Path, architecture: str) -> None:
    """Answers of several tokens need this: each token is a target after the tokens before it."""
    write_models(tmp_path, architecture)
    prompt = contexts()[0].ids
    answers = [(5, 6, 7), (5, 6, 8), (5, 9), (10,), (11, 5, 6, 7)]
    targets: dict[tuple[int, ...], list[int]] = {}
    for answer in answers:
        for length, token in enumerate(answer):
            targets.setdefault(prompt + answer[:length], []).append(token)
    wanted = [Context(ids, tuple(dict.fromkeys(tokens))) for ids, tokens in targets.items()]
    wanted += [Context(prompt[:1], (3, 4)), Context(prompt, (96, 0))]  # the root alone, and the same ids once more
    log_probs = swept(tmp_path, ALL, wanted)
    expected = merged_log_probs(tmp_path, A_FEW, wanted, tmp_path)
    np.testing.assert_allclose(
        np.exp(log_probs[[ALL.index(rules) for rules in A_FEW]]), np.exp(expected), atol=TOLERANCE
    )
    assert (np.isnan(log_probs) == np.isnan(expected[0])).all()
    with local_scorer(tmp_path) as scorer:
        scorer.check(alphas_of(scorer.pair, POST), wanted)
    backwards = swept(tmp_path, ALL, wanted[::-1])
    np.testing.assert_allclose(np.exp(backwards[:, ::-1]), np.exp(log_probs), rtol=0, atol=TOLERANCE)


@contextmanager
def windows_ignored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every layer sees everything before it in the trie, as if there were no sliding windows."""

    def without_windows(model: StagedModel, length: int) -> list[torch.Tensor]:
        return [torch.full((length, length), -torch.inf).triu(1)] * len(model.layers)

    with monkeypatch.context() as patch:
        patch.setattr("slrmerge.searching.sweep.trie_layout.layer_masks", without_windows)
        yield


@pytest.mark.parametrize("architecture", SLIDING)
def test_a_sweep_without_sliding_windows_is_far_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    write_models(tmp_path, architecture)
    expected = np.stack([transformers_log_probs(tmp_path / side, contexts()) for side in ("post", "pre")])
    assert max(gaps(swept(tmp_path, [POST, PRE], contexts()), expected)) < TOLERANCE
    with windows_ignored(monkeypatch):
        quality, _ = gaps(swept(tmp_path, [POST, PRE], contexts()), expected)
    assert quality > 1000 * TOLERANCE


def test_an_embedding_that_only_one_side_ties_to_its_head_is_refused_where_it_is_blended(tmp_path: Path) -> None:
    write_models(tmp_path, "llama")
    edit_config(tmp_path / "post", tie_word_embeddings=True)
    assert swept(tmp_path, [hybrid(restore=[1, 2])], contexts()).shape[0] == 1
    with refused(PlanError, "tied-differently"):
        swept(tmp_path, [POST, PRE], contexts())
