"""The self-check: what it lets through, what it stops, and that it stops a sweep that is wrong."""

import re
from pathlib import Path

import pytest
import torch

from slrmerge.errors import UnsupportedModelError
from slrmerge.sweep.check import TOLERANCE, require_agreement
from tests.sweep.models import ARCHITECTURES, POST, SLIDING, WINDOW, prompts, sweeper, write_models
from tests.sweep.test_exactness import windows_forgotten

REMEDY = "please report this model; it cannot be searched yet"
NAN = float("nan")


def compare(ordinary: list[float], swept: list[float]) -> None:
    one, other = (torch.tensor([[side]], dtype=torch.float64).log() for side in (ordinary, swept))
    require_agreement(one, other, where="/post", model="TinyForCausalLM")


def test_probabilities_within_the_tolerance_agree() -> None:
    compare([0.5, 0.25, NAN], [0.5 + 0.9 * TOLERANCE, 0.25, NAN])
    compare([0.0, 0.5], [0.5 * TOLERANCE, 0.5])


@pytest.mark.parametrize(
    ("swept", "gap"), [([0.5, 0.2501011], "0.0001"), ([0.5, 0.45], "0.2"), ([0.0, 0.25], "0.5"), ([1.0, 0.25], "0.5")]
)
def test_one_probability_past_the_tolerance_is_refused(swept: list[float], gap: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        compare([0.5, 0.25, NAN], [*swept, NAN])
    what = f"TinyForCausalLM answers otherwise in a sweep: a probability differs by {gap}, 0.0001 is allowed"
    assert str(caught.value) == f"/post: {what}; {REMEDY}"


@pytest.mark.parametrize(("ordinary", "swept"), [([0.5, 0.5], [0.5, NAN]), ([0.5, NAN], [0.5, 0.5])])
def test_a_probability_that_only_one_of_them_has_is_refused(ordinary: list[float], swept: list[float]) -> None:
    with pytest.raises(UnsupportedModelError):
        compare(ordinary, swept)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_that_sweeps_serve_passes(tmp_path: Path, architecture: str) -> None:
    write_models(tmp_path, architecture)
    with sweeper(tmp_path) as ready:
        ready.check(prompts(), POST)


@pytest.mark.parametrize("architecture", SLIDING)
def test_a_sweep_without_the_sliding_windows_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    write_models(tmp_path, architecture)
    asked = prompts()[:2]
    assert min(len(prompt.ids) for prompt in asked) > WINDOW
    with windows_forgotten(monkeypatch), sweeper(tmp_path) as ready, pytest.raises(UnsupportedModelError) as caught:
        ready.check(asked, POST)
    name = {"gemma3_text": "Gemma3", "gemma2": "Gemma2", "mistral": "Mistral"}[architecture]
    pattern = (
        rf"{re.escape(str(tmp_path / 'post'))}: {name}ForCausalLM answers otherwise in a sweep: "
        rf"a probability differs by (\S+), 0\.0001 is allowed; {REMEDY}"
    )
    found = re.fullmatch(pattern, str(caught.value))
    assert found
    assert float(found[1]) > 10 * TOLERANCE
