"""The check of a sweep against the model's own forward: what passes, and that a wrong sweep does not."""

from pathlib import Path

import pytest
import torch

from slrmerge.errors import UnsupportedModelError
from slrmerge.io.progress import Progress
from slrmerge.searching.scorer import TOLERANCE, require_agreement
from slrmerge.searching.sweep.states import StateStore
from tests.problems import refused
from tests.searching.sweep.models import (
    ARCHITECTURES,
    POST,
    SLIDING,
    WINDOW,
    alphas_of,
    contexts,
    local_scorer,
    made_sweep,
    write_models,
)
from tests.searching.sweep.test_exactness import windows_ignored

NAN = float("nan")


def compare(reference: list[float], swept: list[float]) -> None:
    one, other = (torch.tensor([[side]], dtype=torch.float64).log() for side in (reference, swept))
    require_agreement(one, other, where="/post", model="TinyForCausalLM")


def test_probabilities_within_the_tolerance_agree() -> None:
    compare([0.5, 0.25, NAN], [0.5 + 0.9 * TOLERANCE, 0.25, NAN])
    compare([0.0, 0.5], [0.5 * TOLERANCE, 0.5])


@pytest.mark.parametrize("swept", [[0.5, 0.2501011], [0.5, 0.45], [0.0, 0.25], [1.0, 0.25]])
def test_one_probability_past_the_tolerance_is_refused(swept: list[float]) -> None:
    with refused(UnsupportedModelError, "sweep-disagrees") as caught:
        compare([0.5, 0.25, NAN], [*swept, NAN])
    assert caught.value.problems[0].where == "/post"


@pytest.mark.parametrize(("reference", "swept"), [([0.5, 0.5], [0.5, NAN]), ([0.5, NAN], [0.5, 0.5])])
def test_a_probability_that_only_one_has_is_refused(reference: list[float], swept: list[float]) -> None:
    with refused(UnsupportedModelError, "sweep-disagrees"):
        compare(reference, swept)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_supported_models_pass(tmp_path: Path, architecture: str) -> None:
    write_models(tmp_path, architecture)
    with local_scorer(tmp_path) as scorer:
        scorer.check(alphas_of(scorer.pair, POST), contexts())


@pytest.mark.parametrize("architecture", SLIDING)
def test_a_sweep_without_sliding_windows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    write_models(tmp_path, architecture)
    few = contexts()[:2]
    assert min(len(context.ids) for context in few) > WINDOW
    with windows_ignored(monkeypatch), local_scorer(tmp_path) as scorer:
        with refused(UnsupportedModelError, "sweep-disagrees") as caught:
            scorer.check(alphas_of(scorer.pair, POST), few)
        with made_sweep(tmp_path, [POST], few) as sweep:
            swept = sweep.run(StateStore(None, max_bytes=0, fingerprint=""), Progress())
            assert (sweep.reference().exp() - swept.exp()).nan_to_num().abs().max() > 10 * TOLERANCE
    assert caught.value.problems[0].where == str(tmp_path / "post")
