"""A search of a tiny pair of every type of causal model in transformers: served exactly, or refused by a guard."""

from pathlib import Path

import numpy as np
import pytest
import torch

from slrmerge.checkpoint.opening import open_pair
from slrmerge.errors import UnsupportedModelError
from slrmerge.io.progress import Progress
from slrmerge.searching.scorer import LocalScorer, ScorerOptions
from tests.searching.sweep.families import causal_types, log_probs_of, mixed_by_hand, write_family
from tests.searching.sweep.models import POST, PRE, contexts, gaps, hybrid, local_scorer, request

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 1e-5
FEW = contexts()[2:5]
"""Of two lengths."""

IMAGE_TEXT = ("gemma3", "llava", "mistral3", "qwen2_5_vl", "qwen3_vl")

REFUSED = {
    "blt": "no-layers",  # a patcher and a decoder
    "cpmant": "unsupported-layer-call",  # adds prompt tokens of its own
    "deepseek_v4": "unknown-layer-input",  # several states for each token
    "emu3": "no-language-model",
    "gemma3n_text": "shared-keys-and-values",
    "glm_moe_dsa": "layers-depend-on-layers",  # layers use the indices of earlier ones
    "hrm_text": "no-layers",
    "hy_v4": "unknown-layer-input",
    "inkling2_text": "layers-not-separate",
    "mllama": "no-language-model",
    "prophetnet": "unknown-layer-input",
    "reformer": "unsupported-layer-call",  # reversible layers, of two streams
    "xlm": "no-layers",  # attentions in one list, MLPs in another
    "zaya": "layers-depend-on-layers",
    "xlnet": "unknown-layer-input",  # tokens before prompts
}
"""Types that are refused, and the code of the refusal."""

NOT_MADE = (
    "cohere_compass_text", "dbrx", "dots3_note", "gemma3n", "gemma4_assistant", "gemma4_unified_assistant",
    "kimi_linear", "musicgen", "musicgen_melody", "qwen4_exp", "qwen4_exp_text",
    "xlstm",
)  # fmt: skip
"""Types of which no tiny pair is made here: transformers itself fails to build, save or run one."""

SERVED = sorted({*causal_types()} - REFUSED.keys() - {*NOT_MADE})


def test_at_least_150_types_are_served() -> None:
    assert len(SERVED) >= 150
    assert {*REFUSED, *NOT_MADE} <= {*causal_types()}


@pytest.mark.parametrize(
    ("architecture", "kind"), [*((each, "causal") for each in SERVED), *((each, "vision") for each in IMAGE_TEXT)]
)
def test_hybrids_of_a_type_are_scored_as_transformers_scores_them(tmp_path: Path, architecture: str, kind: str) -> None:
    write_family(tmp_path, architecture, kind=kind)
    with local_scorer(tmp_path) as scorer:
        wanted = request(scorer, [POST, PRE, hybrid(restore=[1, 2])], FEW)
        scorer.check(wanted.candidates[0], FEW[:2])
        log_probs = scorer.score(wanted, None, Progress())
        stack = scorer.pair.stack
    assert stack is not None
    folders = [tmp_path / "pre", mixed_by_hand(tmp_path, 1, 2, stack.prefix)]
    expected = np.stack([log_probs_of(folder, FEW, kind=kind) for folder in folders])
    assert max(gaps(log_probs[1:], expected)) < TOLERANCE
    assert np.nanmax(np.abs(np.exp(log_probs[1]) - np.exp(log_probs[2]))) > 10 * TOLERANCE


@pytest.mark.parametrize(("architecture", "code"), REFUSED.items())
def test_a_type_that_cannot_be_served_is_refused_from_its_headers(tmp_path: Path, architecture: str, code: str) -> None:
    write_family(tmp_path, architecture)
    pair = open_pair(tmp_path / "pre", tmp_path / "post")
    for side in ("pre", "post"):
        (tmp_path / side / "model.safetensors").unlink()
    if code == "no-layers":  # as `require_layers` says before a search looks at the model
        assert pair.stack is None
        return
    scorer = LocalScorer(pair, ScorerOptions(max_memory_bytes=0))
    with pytest.raises(UnsupportedModelError) as caught:
        scorer.model(torch.float32)
    assert [problem.code for problem in caught.value.problems] == [code]
    assert "\n" not in caught.value.problems[0].what
