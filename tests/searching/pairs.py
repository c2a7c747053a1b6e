"""Small chat models that a search can score: four Llama layers, a word tokenizer, a chat template.

Also scores without a model, and a Progress that records a run or stops it.
"""

import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from slrmerge.checkpoint.opening import open_pair
from slrmerge.checkpoint.pair import ModelPair
from slrmerge.io.progress import Progress
from slrmerge.recipe.load import RecipeLike, load_recipe
from slrmerge.recipe.model import Recipe
from slrmerge.recipe.rules import Rules
from slrmerge.searching.candidates import CandidateInfo
from slrmerge.searching.options import SearchOptions
from slrmerge.searching.prompt_scores import PromptScores
from slrmerge.searching.prompts import Prompt
from slrmerge.searching.proxy_tasks import TASKS, ConstrainedRandomCharacter, Scores
from slrmerge.searching.results import SearchResult
from slrmerge.searching.results_folder import FIGURES
from slrmerge.searching.run import Search
from slrmerge.searching.selection import ScoredCandidate, mark_feasible, select_from
from tests.merging.faults import snapshot

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LAYERS, HIDDEN = 4, 16
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>")

ALL = ["early.yaml", "heatmaps.png", "heatmaps.svg", "late.yaml", "prompts.npz", "report.html", "results.csv",
       "slr.yaml", "soup.yaml", "summary.json", "tradeoff.png", "tradeoff.svg"]  # fmt: skip
"""The files of a search."""

STAGES = LAYERS + 1  # every layer, and the head
ALL_STAGES = 2 * STAGES  # of all candidates, and of those that answer the held-out prompts

hurried = pytest.mark.usefixtures("hurried")


@dataclass(frozen=True)
class SmallPair:
    """Two small chat models side by side in `folder`, `pre` and `post`."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "search"

    def recipe_file(self, name: str = "pair.yaml", **content: Any) -> Path:
        """A recipe file beside the two models, for them unless `content` names others."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        recipe = {"pretrained": "./pre", "posttrained": "./post", **content}
        path.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return path

    def recipe(self, **content: Any) -> Recipe:
        recipe = load_recipe(self.recipe_file(**content))
        assert isinstance(recipe, Recipe)
        return recipe

    def open(self) -> ModelPair:
        return open_pair(self.folder / "pre", self.folder / "post")

    def search(self, recipe: RecipeLike | ModelPair | None = None, **options: Any) -> Search:
        return Search(recipe or self.recipe(), SearchOptions(threads=1, **options))

    def run(
        self, out: Path | None = None, *, overwrite: bool = False, progress: Progress | None = None, **options: Any
    ) -> SearchResult:
        """Search the pair into `out`."""
        return self.search(**options).run(out or self.out, overwrite=overwrite, progress=progress)


def make_pair(folder: Path, *, layers: int = LAYERS) -> SmallPair:
    """A pair whose sides differ in every tensor."""
    for side, seed in (("pre", 26), ("post", 126)):
        make_model(folder / side, seed=seed, layers=layers)
    return SmallPair(folder)


def make_model(folder: Path, *, seed: int, layers: int = LAYERS, more_words: int = 0, **config: Any) -> Path:
    """A Llama checkpoint in float32 with a tokenizer, as a Hub folder has them."""
    words = [*vocabulary(), *(f"word-{number}" for number in range(more_words))]
    folder.mkdir(parents=True)
    values = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers,
        "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_attention_heads": 2, "num_key_value_heads": 1,
        "vocab_size": len(words), "tie_word_embeddings": False, "dtype": "float32", "max_position_embeddings": 128,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    random = torch.Generator().manual_seed(seed)
    shapes = llama_shapes(layers, len(words))
    save_file({name: weight(name, shape, random) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(words)))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "unk_token": "<|unknown|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def vocabulary() -> list[str]:
    """The words of all questions, the answers first; few enough for a random model to have some quality."""
    with pytest.MonkeyPatch.context() as patch:  # all questions, also under `hurry`
        patch.setattr(ConstrainedRandomCharacter, "prompts_per_kind", 20)
        questions = TASKS["crc"]().questions()
    answers = dict.fromkeys(answer for question in questions for answer in question.answers)
    words = [word for question in questions for word in split(question.text)]
    return list(dict.fromkeys([*answers, *SPECIAL, *words]))


def split(text: str) -> list[str]:
    """As the tokenizer's `Whitespace` splits: runs of word characters, runs of others."""
    return re.findall(r"\w+|[^\w\s]+", text)


def tokenizer(words: Sequence[str]) -> dict[str, Any]:
    """The content of `tokenizer.json`: one token per word."""
    added = [
        {"id": words.index(word), "content": word, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for word in SPECIAL
    ]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: k for k, word in enumerate(words)}, "unk_token": "<|unknown|>"},
    }  # fmt: skip


def llama_shapes(layers: int, words: int) -> dict[str, tuple[int, ...]]:
    inner = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 2, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (2 * HIDDEN, HIDDEN), "mlp.up_proj": (2 * HIDDEN, HIDDEN),
        "mlp.down_proj": (HIDDEN, 2 * HIDDEN), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    return {
        "model.embed_tokens.weight": (words, HIDDEN),
        **{f"model.layers.{k}.{name}.weight": shape for k in range(layers) for name, shape in inner.items()},
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (words, HIDDEN),
    }


def weight(name: str, shape: Sequence[int], random: torch.Generator) -> torch.Tensor:
    """Random, large enough that layers matter; norms near one."""
    values = torch.randn(*shape, generator=random)
    return 1 + values / 10 if len(shape) == 1 else values * 0.3


# scores without a model


def interval(start: int, end: int) -> CandidateInfo:
    return CandidateInfo(
        space="interval", label=f"layers {start}–{end}", rules=Rules(restore=((start, end),)), start=start, end=end,
        layers_restored=end - start + 1,
    )  # fmt: skip


def row(info: CandidateInfo, quality: float, diversity: float, **more: Any) -> ScoredCandidate:
    conditions = {"prompts": 40, "dtype": "float32", "exact": True}
    return ScoredCandidate(**vars(info), quality=quality, diversity=diversity, **{**conditions, **more})


POST = CandidateInfo(space="post", label="post-trained", rules=Rules(alpha=0.0), alpha=0.0)
PRE = CandidateInfo(space="pre", label="pre-trained", rules=Rules(alpha=1.0), alpha=1.0, layers_restored=3)
SOUP = CandidateInfo(space="soup", label="soup 0.50", rules=Rules(alpha=0.5), alpha=0.5)


def made_rows(intervals: dict[tuple[int, int], tuple[float, float]]) -> list[ScoredCandidate]:
    """Rows of both models, a soup, and intervals with (Q, D)."""
    others = [row(POST, 0.96, 1.0), row(PRE, 0.5, 2.0), row(SOUP, 0.9, 1.5)]
    return others + [row(interval(*span), *scores) for span, scores in intervals.items()]


def made_result(
    rows: Sequence[ScoredCandidate], *, min_quality: float = 0.9, base: Recipe | None = None, **more: Any
) -> SearchResult:
    """A result of rows of which the first is the post-trained model."""
    post_quality = {rows[0].conditions: rows[0].quality}
    marked = mark_feasible(rows, post_quality=post_quality, min_quality=min_quality)
    base = base or Recipe(pretrained="../pre", posttrained="../post")
    ends = [row.end for row in rows if row.end is not None]
    values: dict[str, Any] = {
        "rows": tuple(marked), "choice": select_from(marked, base=base, min_quality=min_quality),
        "post_quality": post_quality, "layers": max(ends, default=0) + 1, "task": "crc", "notes": (), "elapsed_s": 1.5,
    }  # fmt: skip
    return SearchResult(**{**values, **more})


def prompt_scores(labels: Sequence[str], prompts: int, *, seed: int) -> PromptScores:
    """Random scores of candidates on questions."""
    scores = Scores(*np.random.default_rng(seed).random((2, len(labels), prompts)))
    return PromptScores(tuple(labels), tuple(f"question {number}" for number in range(prompts)), scores)


def scores_of_paths(folder: Path, prompt: Prompt) -> tuple[float, float]:
    """Q and D of a checkpoint by transformers: each answer is written out, and its tokens' probabilities multiplied."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    valid = []
    for path in prompt.answers:
        tokens = [prompt.contexts[context].targets[target] for context, target in path]
        ids = prompt.contexts[0].ids
        with torch.inference_mode():
            log_probs = model(torch.tensor([[*ids, *tokens]])).logits[0].double().log_softmax(-1)
        places = range(len(ids) - 1, len(ids) - 1 + len(tokens))
        valid.append(math.exp(sum(log_probs[place, token].item() for place, token in zip(places, tokens, strict=True))))
    shares = [probability / sum(valid) for probability in valid]
    return sum(valid), -sum(share * math.log(share) for share in shares)


# recording and stopping


class Watcher(Progress):
    """Records the progress of a run, and calls `act` at the start of stage number `at`."""

    def __init__(self, at: int = 0, act: Callable[[], object] = bool) -> None:
        super().__init__()
        self.at, self.act = at, act
        self.messages: list[str] = []
        self.totals: list[int] = []
        self.stages: list[str] = []
        self.advanced = 0

    def on_start(self, description: str, total: int, unit: str) -> None:
        self.totals.append(total)

    def on_stage(self, description: str) -> None:
        self.stages.append(description)
        if len(self.stages) == self.at:
            self.act()

    def on_advance(self, count: int) -> None:
        self.advanced += count

    def on_message(self, text: str) -> None:
        self.messages.append(text)


def kill_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_pictures(folder: Path, *_: object) -> None:
    """Replaces `draw_result`, which takes longer than a small search."""
    for name in FIGURES:
        (folder / name).write_bytes(b"a picture")


def prompts_of(folder: Path) -> dict[str, Any]:
    with np.load(folder / "prompts.npz") as kept:
        return dict(kept)


def results(folder: Path) -> dict[str, bytes]:
    """The files of a search, without the time that it took."""
    found = snapshot(folder) or {}
    summary = json.loads(found.pop("summary.json"))
    del summary["elapsed_s"]
    return {**found, "summary.json": json.dumps(summary).encode()}


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Three prompts of each kind, three soups, no figures: a small search takes a quarter of a second.

    Also replaces the measurements of this machine's speed, which take seconds, by 100 GFLOP/s and 1 ms.
    """
    patch.setattr(ConstrainedRandomCharacter, "prompts_per_kind", 3)
    patch.setattr("slrmerge.searching.candidates.SOUP_STEPS", 4)
    patch.setattr("slrmerge.searching.estimate.measured_rate", lambda width, dtype, device: 1e11)
    patch.setattr("slrmerge.searching.scorer.measured_state_s", lambda model, contexts, layer: 1e-3)
    patch.setattr("slrmerge.searching.plots.draw_result", no_pictures)


if __name__ == "__main__":  # search the pair in a folder, and be killed at the start of a stage
    number, folder = sys.argv[1:]
    hurry(pytest.MonkeyPatch())
    SmallPair(Path(folder)).run(progress=Watcher(int(number), kill_oneself))
