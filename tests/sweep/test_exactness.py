"""A sweep's answers against transformers': each hybrid merged into a folder, loaded, asked one prompt at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from slrmerge.chat import Prompt
from slrmerge.sweep.model import Layout, StagedModel
from slrmerge.sweep.trie import TokenTrie
from tests.sweep.models import (
    ARCHITECTURES,
    INTERVALS,
    MIXED,
    POST,
    PRE,
    SLIDING,
    SOUPS,
    VOCABULARY,
    asked_of,
    edit_config,
    gaps,
    hybrid,
    merged_and_asked,
    prompts,
    scores,
    swept,
    write_models,
)

TOLERANCE = 1e-5
"""In Q and D, as is promised; measured 1e-6."""

ALL = [POST, PRE, *INTERVALS, *SOUPS, *MIXED]
A_FEW = [POST, PRE, INTERVALS[5], SOUPS[1], MIXED[4]]

MERGED_WHOLLY = ("llama", "gemma2")
"""Every hybrid of these is merged; of the others a few, from the same sweep, to save time."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_intervals_soups_and_mixtures_answer_as_merged_hybrids_do(tmp_path: Path, architecture: str) -> None:
    write_models(tmp_path, architecture)
    merged = ALL if architecture in MERGED_WHOLLY else [*A_FEW, *INTERVALS[1:3], *MIXED[:2]]
    expected = merged_and_asked(tmp_path, merged, prompts(), tmp_path)
    answers = swept(tmp_path, ALL, prompts())
    assert max(gaps(answers[[ALL.index(candidate) for candidate in merged]], expected)) < TOLERANCE
    for number, answer in enumerate(answers):  # or the comparison would mean little
        others = np.exp(answers[:number]) - np.exp(answer)
        assert (np.nanmax(np.abs(others), axis=(1, 2)) > 100 * TOLERANCE).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_that_are_the_embedding_and_heads_that_are_not_are_both_exact(tmp_path: Path, architecture: str) -> None:
    tied = not ARCHITECTURES[architecture].get("tie_word_embeddings", False)
    write_models(tmp_path, architecture, tie_word_embeddings=tied)
    candidates = A_FEW[1:4]
    expected = merged_and_asked(tmp_path, candidates, prompts(), tmp_path)
    assert max(gaps(swept(tmp_path, candidates, prompts()), expected)) < TOLERANCE


@pytest.mark.parametrize("pre_is_tied", [True, False])
def test_a_pair_of_which_one_side_is_tied_is_exact(tmp_path: Path, pre_is_tied: bool) -> None:
    write_models(tmp_path / "tied", "llama", tie_word_embeddings=True)
    write_models(tmp_path / "untied", "llama")
    (tmp_path / ("tied" if pre_is_tied else "untied") / "pre").rename(tmp_path / "pre")
    (tmp_path / ("untied" if pre_is_tied else "tied") / "post").rename(tmp_path / "post")
    expected = merged_and_asked(tmp_path, A_FEW, prompts(), tmp_path)
    assert max(gaps(swept(tmp_path, A_FEW, prompts()), expected)) < TOLERANCE


def test_a_padding_token_is_a_token_like_others(tmp_path: Path) -> None:
    write_models(tmp_path, "llama", pad_token_id=VOCABULARY - 1)
    asked = [Prompt((1, VOCABULARY - 1, 5), (7, 8)), Prompt((1, 5, VOCABULARY - 1), (7, VOCABULARY - 1))]
    assert max(gaps(swept(tmp_path, [POST], asked), asked_of(tmp_path / "post", asked)[None])) < TOLERANCE
    assert max(gaps(swept(tmp_path, [PRE], asked[:1]), asked_of(tmp_path / "pre", asked[:1])[None])) < TOLERANCE


def test_a_stored_head_counts_though_the_config_says_that_it_is_the_embedding(tmp_path: Path) -> None:
    write_models(tmp_path, "llama")
    for side in ("pre", "post"):
        edit_config(tmp_path / side, tie_word_embeddings=True)
    candidates = [POST, PRE, hybrid(tensors=[{"match": "lm_head.weight", "alpha": 1.0}])]
    expected = merged_and_asked(tmp_path, candidates, prompts(), tmp_path)
    assert max(gaps(swept(tmp_path, candidates, prompts()), expected)) < TOLERANCE


def test_blends_are_rounded_to_the_dtype_of_the_output_as_a_merge_rounds_them(tmp_path: Path) -> None:
    write_models(tmp_path, "llama", dtypes=(torch.float32, torch.bfloat16))
    candidates = A_FEW[1:4]
    fine = merged_and_asked(tmp_path, candidates, prompts(), tmp_path)
    assert max(gaps(swept(tmp_path, candidates, prompts()), fine)) < TOLERANCE
    other = merged_and_asked(tmp_path, candidates, prompts(), tmp_path / "other", dtype="float16")
    assert max(gaps(swept(tmp_path, candidates, prompts(), output_dtype="float16"), other)) < TOLERANCE
    assert max(gaps(fine, other)) > 10 * TOLERANCE


def test_more_prompts_than_one_do_not_change_an_answer(llamas: Path) -> None:
    together = swept(llamas, A_FEW, prompts())
    for number, prompt in enumerate(prompts()):
        alone = swept(llamas, A_FEW, [prompt])
        assert max(gaps(together[:, number : number + 1, : alone.shape[2]], alone)) < TOLERANCE


def test_answers_past_a_prompts_own_are_nan_and_only_those(llamas: Path) -> None:
    answers = swept(llamas, A_FEW, prompts())
    assert answers.shape == (len(A_FEW), len(prompts()), 5)
    for number, prompt in enumerate(prompts()):
        assert np.isfinite(answers[:, number, : len(prompt.valid_ids)]).all()
        assert np.isnan(answers[:, number, len(prompt.valid_ids) :]).all()


def test_a_sweep_in_bfloat16_is_near_the_one_in_fp32(tmp_path: Path) -> None:
    write_models(tmp_path, "llama", dtypes=(torch.bfloat16, torch.bfloat16))
    candidates = [POST, PRE, *INTERVALS]
    exact, rough = (swept(tmp_path, candidates, prompts(), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert 1e-4 < max(gaps(rough, exact)) < 0.05
    means = [np.stack([values.mean(axis=1) for values in scores(answers)]) for answers in (exact, rough)]
    assert np.abs(means[0] - means[1]).max() < 0.01


@contextmanager
def windows_forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every layer sees everything before it in the trie, as if there were no sliding windows."""
    lay_out = StagedModel.lay_out

    def forgetful(self: StagedModel, trie: TokenTrie) -> Layout:
        layout = lay_out(self, trie)
        causal = torch.full((trie.longest, trie.longest), -torch.inf).triu(1)
        return replace(layout, rules=[causal] * len(layout.rules))

    with monkeypatch.context() as patch:
        patch.setattr(StagedModel, "lay_out", forgetful)
        yield


@pytest.mark.parametrize("architecture", SLIDING)
def test_without_the_sliding_windows_the_comparison_fails_by_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    write_models(tmp_path, architecture)
    expected = np.stack([asked_of(tmp_path / side, prompts()) for side in ("post", "pre")])
    assert max(gaps(swept(tmp_path, [POST, PRE], prompts()), expected)) < TOLERANCE
    with windows_forgotten(monkeypatch):
        quality, _ = gaps(swept(tmp_path, [POST, PRE], prompts()), expected)
    assert quality > 1000 * TOLERANCE
