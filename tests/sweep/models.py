"""Tiny random pairs of real architectures, what they are asked, and transformers' own answers: the oracle.

Small weights would make all sides answer alike; these are large enough that every layer shows in the answers.
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

from slrmerge.chat import Prompt
from slrmerge.crc import ConstrainedRandomCharacter, Scores
from slrmerge.hub import open_pair
from slrmerge.merge import merge_checkpoints
from slrmerge.progress import Progress, Silent
from slrmerge.recipe import parse_recipe
from slrmerge.search.candidates import Candidate, recipe_of
from slrmerge.search.scoring import PairSweeper, Pass

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


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a config on disk."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def prompts(*, seed: int = 1) -> list[Prompt]:
    """Prompts that share a trunk and branches of it; among them one twice, and one that is the start of another.

    Their ends lie past every window, and they have three to five valid answers.
    """
    rng = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCABULARY) for _ in range(count))

    trunk = (1, *tokens(7))
    ids = [branch + tokens(rng.choice([3, 3, 4])) for branch in (trunk + tokens(2), trunk + tokens(3)) for _ in "123"]
    ids += [ids[0], ids[1] + tokens(2)]
    return [Prompt(prompt, tuple(rng.sample(range(VOCABULARY), rng.choice([3, 4, 5])))) for prompt in ids]


def hybrid(**rules: Any) -> Candidate:
    """What a recipe with these keys makes, to be tried."""
    return Candidate("test", rules, json.dumps(rules))


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


@contextmanager
def sweeper(folder: Path, *, output_dtype: str | None = None) -> Iterator[PairSweeper]:
    """The pair in `folder`, ready to be asked."""
    sides = open_pair(folder / "pre", folder / "post")
    with PairSweeper(*sides, output_dtype=output_dtype, device=torch.device("cpu")) as ready:
        yield ready


def swept(
    folder: Path,
    candidates: Sequence[Candidate],
    asked: Sequence[Prompt],
    *,
    dtype: torch.dtype = torch.float32,
    output_dtype: str | None = None,
    kept: Path | None = None,
    max_bytes: int = 1 << 30,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """Log-probabilities of the valid answers by a sweep, shape (candidates, prompts, answers)."""
    wanted = Pass("test", candidates, asked, dtype)
    with sweeper(folder, output_dtype=output_dtype) as ready:
        return ready.run(wanted, kept, max_bytes=max_bytes, progress=progress or Silent())


def merged(folder: Path, candidate: Candidate, out: Path, *, dtype: str | None = None) -> Path:
    """The hybrid as `slrmerge` writes it."""
    pre, post = str(folder / "pre"), str(folder / "post")
    recipe = recipe_of(candidate, pretrained=pre, posttrained=post, dtype=dtype)
    merge_checkpoints(parse_recipe(recipe), out, fsync=False)
    return out


def asked_of(folder: Path, asked: Sequence[Prompt]) -> NDArray[np.float64]:
    """The same from transformers itself, in fp32 and one prompt at a time, shape (prompts, answers)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = np.full((len(asked), max(len(prompt.valid_ids) for prompt in asked)), np.nan)
    with torch.inference_mode():
        for number, prompt in enumerate(asked):
            logits = model(input_ids=torch.tensor([prompt.ids])).logits[0, -1].double()
            answers[number, : len(prompt.valid_ids)] = logits.log_softmax(-1)[list(prompt.valid_ids)]
    return answers


def merged_and_asked(
    folder: Path, candidates: Sequence[Candidate], asked: Sequence[Prompt], scratch: Path, *, dtype: str | None = None
) -> NDArray[np.float64]:
    """The same from transformers for hybrids that are merged one by one, shape (candidates, prompts, answers)."""
    return np.stack(
        [
            asked_of(merged(folder, candidate, scratch / f"hybrid-{number}", dtype=dtype), asked)
            for number, candidate in enumerate(candidates)
        ]
    )


def scores(log_probs: NDArray[np.float64]) -> Scores:
    return ConstrainedRandomCharacter().score(log_probs)


def gaps(one: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float]:
    """The largest differences in Q and in D, hybrid by hybrid and prompt by prompt."""
    quality, diversity = (np.abs(a - b).max() for a, b in zip(scores(one), scores(other), strict=True))
    return float(quality), float(diversity)


class Killed(BaseException):
    """What kills a sweep here; nothing may catch it."""


class Recorder:
    """A Progress that writes down what it is told, and kills the sweep at one of the events."""

    def __init__(self, *, kill_at: int | None = None) -> None:
        self.stages: list[str] = []
        self.states: list[int] = []
        self.said: list[str] = []
        self.at_stage = False  # killed as a stage began
        self._left = kill_at

    def start(self, what: str, total: int, unit: str = "B") -> None:
        raise AssertionError("a count begins with the search, not with a sweep")

    def stage(self, what: str) -> None:
        self.at_stage = self._left == 0
        self._event()
        self.stages.append(what)

    def advance(self, count: int) -> None:
        self._event()
        self.states.append(count)

    def say(self, message: str) -> None:
        self.said.append(message)

    def _event(self) -> None:
        if self._left == 0:
            raise Killed
        if self._left is not None:
            self._left -= 1
