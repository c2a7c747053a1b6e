"""Tiny random pairs of real architectures, contexts, hybrids, and transformers' own log-probabilities: the oracle.

Small weights would make all hybrids alike; these are large enough that every layer shows in the log-probabilities.
"""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from slrmerge.checkpoint.opening import open_checkpoint, open_pair
from slrmerge.checkpoint.pair import ModelPair
from slrmerge.io.progress import Progress
from slrmerge.merging.executor import merge
from slrmerge.merging.plan.tensors import plan_tensor_alphas
from slrmerge.merging.stream import HybridReader
from slrmerge.recipe.alphas import TensorAlphas, resolve_rules
from slrmerge.recipe.rules import Rules
from slrmerge.searching.proxy_tasks import ConstrainedRandomCharacter, Scores
from slrmerge.searching.scorer import LocalScorer, ScoreRequest, ScorerOptions
from slrmerge.searching.sweep.engine import Sweep
from slrmerge.searching.sweep.layouts import staged_model
from slrmerge.searching.sweep.model import StagedModel
from slrmerge.searching.sweep.paths import SweepPlan
from slrmerge.searching.sweep.states import StateStore
from slrmerge.searching.sweep.trie import Context
from slrmerge.searching.sweep.weights import HybridWeights

CPU = torch.device("cpu")

LAYERS, WIDTH, VOCABULARY, WINDOW = 4, 32, 97, 6
"""Of all models here; sliding windows are shorter than the prompts."""

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "tie_word_embeddings": True}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"original_max_position_embeddings": 128},
    "olmo2": {},
}
"""The architectures that are promised, by transformers' `model_type`, with what their configs need."""

SLIDING = ("gemma2", "gemma3_text", "mistral")
"""Those of them with a window."""


def config_of(architecture: str, **more: Any) -> Any:
    """The transformers config of a tiny model."""
    from transformers import AutoConfig

    settings = {**_SIZES, "tie_word_embeddings": False, **ARCHITECTURES.get(architecture, {}), **more}
    return AutoConfig.for_model(architecture, **settings)


def random_model(config: Any, *, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """A model of this config whose weights depend on the seed."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.to(dtype).eval()


def write_models(
    folder: Path,
    architecture: str,
    *,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    **more: Any,
) -> Path:
    """Two tiny models, `folder/pre` and `folder/post`, as transformers writes them."""
    for seed, (side, dtype) in enumerate(zip(("pre", "post"), dtypes, strict=True)):
        random_model(config_of(architecture, **more), seed=seed, dtype=dtype).save_pretrained(folder / side)
    return folder


def staged(folder: Path, dtype: torch.dtype = torch.float32) -> StagedModel:
    """The model in `folder`, without weights."""
    return staged_model(open_checkpoint(folder), dtype=dtype, device=CPU)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a config on disk."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def contexts(*, seed: int = 1) -> list[Context]:
    """Contexts that share a trunk and branches of it; among them one twice, and one that is a prefix of another.

    They are longer than every window, and have three to five targets.
    """
    rng = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCABULARY) for _ in range(count))

    trunk = (1, *tokens(7))
    ids = [branch + tokens(rng.choice([3, 3, 4])) for branch in (trunk + tokens(2), trunk + tokens(3)) for _ in "123"]
    ids += [ids[0], ids[1] + tokens(2)]
    return [Context(each, tuple(rng.sample(range(VOCABULARY), rng.choice([3, 4, 5])))) for each in ids]


def hybrid(**rules: Any) -> Rules:
    """A hybrid, by the rules of a recipe."""
    return Rules(**rules)


POST, PRE = hybrid(alpha=0.0), hybrid(alpha=1.0)
INTERVALS = [hybrid(restore=[start, end]) for start in range(LAYERS) for end in range(start, LAYERS)]
SOUPS = [hybrid(alpha=alpha) for alpha in (0.05, 0.5, 0.8)]
MIXED = [
    hybrid(layers=[{"range": [1, 2], "modules": ["self_attn"], "alpha": 1.0}]),
    hybrid(layers=[{"range": [0, 3], "modules": ["mlp"], "alpha": 1.0}]),
    hybrid(layers=[{"range": [0, 3], "alpha": [0.1, 0.9]}]),
    hybrid(restore=[[0, 0], [2, 3]], tensors=[{"match": "model.norm.weight", "alpha": 0.5}]),
    hybrid(alpha=0.3, tensors=[{"match": "model.embed_tokens.weight", "alpha": 1.0}]),
]
"""Attention only, MLPs only, an alpha per layer, gaps, and the tensors outside the layers."""


def alphas_of(pair: ModelPair, rules: Rules) -> TensorAlphas:
    alphas, problems = resolve_rules(rules, pair.posttrained, pair.stack, tied=pair.correspondence.tied)
    assert not problems
    return alphas


@contextmanager
def local_scorer(
    folder: Path, *, output_dtype: str | None = None, max_memory_bytes: int = 1 << 30
) -> Iterator[LocalScorer]:
    """A scorer of the pair in `folder`."""
    pair = open_pair(folder / "pre", folder / "post")
    with LocalScorer(pair, ScorerOptions(output_dtype, max_memory_bytes=max_memory_bytes)) as scorer:
        yield scorer


def request(
    scorer: LocalScorer,
    hybrids: Sequence[Rules],
    contexts: Sequence[Context],
    dtype: torch.dtype = torch.float32,
) -> ScoreRequest:
    return ScoreRequest("test", [alphas_of(scorer.pair, rules) for rules in hybrids], contexts, dtype)


def swept(
    folder: Path,
    hybrids: Sequence[Rules],
    contexts: Sequence[Context],
    *,
    dtype: torch.dtype = torch.float32,
    output_dtype: str | None = None,
    kept: Path | None = None,
    max_bytes: int = 1 << 30,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Log-probabilities by a scorer, shape (hybrids, contexts, targets); what it keeps is in the folder `kept`."""
    with local_scorer(folder, output_dtype=output_dtype, max_memory_bytes=max_bytes) as scorer:
        return scorer.score(request(scorer, hybrids, contexts, dtype), kept, progress or Progress())


@contextmanager
def made_sweep(folder: Path, hybrids: Sequence[Rules], contexts: Sequence[Context], **sizes: int) -> Iterator[Sweep]:
    """The sweep itself, in fp32."""
    pair = open_pair(folder / "pre", folder / "post")
    model = staged_model(pair.posttrained, dtype=torch.float32, device=CPU)
    plan = SweepPlan.of(model.stages, [alphas_of(pair, rules) for rules in hybrids])
    planned = plan_tensor_alphas(plan.all_tensors(), pair, dtype=None)
    with pair.open() as reader, HybridWeights(planned, HybridReader(reader)) as weights:
        yield Sweep(model, weights, plan=plan, contexts=contexts, **sizes)


def swept_in_memory(
    folder: Path,
    hybrids: Sequence[Rules],
    contexts: Sequence[Context],
    *,
    progress: Progress | None = None,
    **sizes: int,
) -> NDArray[np.float64]:
    """Log-probabilities by the sweep itself, in fp32, cut to other sizes."""
    with made_sweep(folder, hybrids, contexts, **sizes) as sweep:
        log_probs: NDArray[np.float64] = sweep.run(
            StateStore(None, max_bytes=0, fingerprint=""), progress or Progress()
        ).numpy()
        return log_probs


def merged(folder: Path, rules: Rules, out: Path, *, dtype: str | None = None) -> Path:
    """The hybrid as `slrmerge` writes it."""
    recipe = {"pretrained": str(folder / "pre"), "posttrained": str(folder / "post"), **rules.rules()}
    merge(recipe | ({"dtype": dtype} if dtype else {}), out, fsync=False)
    return out


def transformers_log_probs(folder: Path, contexts: Sequence[Context], auto_class: Any = None) -> NDArray[np.float64]:
    """The same from transformers itself, in fp32 and one context at a time, shape (contexts, targets)."""
    from transformers import AutoModelForCausalLM

    model = (auto_class or AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32)
    model = model.float().eval()  # quantized ones stay partly in bf16
    log_probs = np.full((len(contexts), max(len(context.targets) for context in contexts)), np.nan)
    with torch.inference_mode():
        for number, context in enumerate(contexts):
            logits = model(input_ids=torch.tensor([context.ids])).logits[0, -1].double()
            log_probs[number, : len(context.targets)] = logits.log_softmax(-1)[list(context.targets)]
    return log_probs


def merged_log_probs(
    folder: Path, hybrids: Sequence[Rules], contexts: Sequence[Context], scratch: Path, *, dtype: str | None = None
) -> NDArray[np.float64]:
    """The same from transformers for hybrids that are merged one by one, shape (hybrids, contexts, targets)."""
    return np.stack(
        [
            transformers_log_probs(merged(folder, rules, scratch / f"hybrid-{number}", dtype=dtype), contexts)
            for number, rules in enumerate(hybrids)
        ]
    )


def scores(log_probs: NDArray[np.float64]) -> Scores:
    return ConstrainedRandomCharacter().score(log_probs)


def gaps(one: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float]:
    """The largest differences in Q and in D, hybrid by hybrid and context by context."""
    quality, diversity = (np.abs(a - b).max() for a, b in zip(scores(one), scores(other), strict=True))
    return float(quality), float(diversity)


class Killed(BaseException):
    """What kills a sweep here; nothing may catch it."""


class Recorder(Progress):
    """Records the progress, and kills the sweep at one of its events."""

    def __init__(self, *, kill_at: int | None = None) -> None:
        super().__init__()
        self.stages: list[str] = []
        self.states: list[int] = []
        self.messages: list[str] = []
        self.at_stage = False  # killed as a stage began
        self._left = kill_at

    def on_start(self, description: str, total: int, unit: str) -> None:
        raise AssertionError("a count begins with the search, not with a sweep")

    def on_stage(self, description: str) -> None:
        self.at_stage = self._left == 0
        self._event()
        self.stages.append(description)

    def on_advance(self, count: int) -> None:
        self._event()
        self.states.append(count)

    def on_message(self, text: str) -> None:
        self.messages.append(text)

    def _event(self) -> None:
        if self._left == 0:
            raise Killed
        if self._left is not None:
            self._left -= 1
