"""Small pairs that transformers can run and a search can ask: four Llama layers, a word tokenizer, a chat template.

And what the tests of a search share: scores without a model, a progress that stops a run, the example pair searched.
"""

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from slrmerge.crc import TASKS, ConstrainedRandomCharacter
from slrmerge.recipe import Recipe, load_recipe
from slrmerge.search.candidates import Candidate
from slrmerge.search.choose import Row, choose, conditions, judge
from slrmerge.search.results import Report
from slrmerge.search.run import Search, SearchOptions

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LAYERS, HIDDEN = 4, 16
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>")
CHECKING = "checking that LlamaForCausalLM answers in a sweep as it does by itself"


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
        said = {"pretrained": "./pre", "posttrained": "./post", **content}
        path.write_text(yaml.safe_dump(said, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return path

    def recipe(self, **content: Any) -> Recipe:
        return load_recipe(self.recipe_file(**content), pair_only=True)

    def search(self, recipe: Recipe | None = None, **options: Any) -> Search:
        return Search(recipe or self.recipe(), SearchOptions(threads=1, **options))

    def report(
        self, out: Path | None = None, *, overwrite: bool = False, progress: "Watcher | None" = None, **options: Any
    ) -> Report:
        """Search, all of it."""
        with self.search(**options) as search:
            return search.run(out or self.out, overwrite=overwrite, progress=progress or Watcher())


def make_pair(folder: Path, *, layers: int = LAYERS) -> SmallPair:
    """A pair whose sides differ in every tensor."""
    for side, seed in (("pre", 26), ("post", 126)):
        make_model(folder / side, seed=seed, layers=layers)
    return SmallPair(folder)


def make_model(folder: Path, *, seed: int, layers: int = LAYERS, **config: Any) -> Path:
    """A Llama checkpoint in float32 with a tokenizer, as a Hub folder has them."""
    words = vocabulary()
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
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "unk_token": "<|unknown|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def vocabulary() -> list[str]:
    """The words of all questions, the answers first; so few that even a random model has some quality."""
    with pytest.MonkeyPatch.context() as patch:  # all of them, however few are asked
        patch.setattr(ConstrainedRandomCharacter, "prompts_per_family", 20)
        questions = TASKS["crc"]().questions()
    answers = dict.fromkeys(answer for question in questions for answer in question.answers)
    words = [word for question in questions for word in split(question.text)]
    return list(dict.fromkeys([*answers, *SPECIAL, *words]))


def split(text: str) -> list[str]:
    """As the tokenizer's `Whitespace` splits: runs of word characters, runs of others."""
    return re.findall(r"\w+|[^\w\s]+", text)


def tokenizer(words: Sequence[str]) -> dict[str, Any]:
    """The content of `tokenizer.json`: a token a word."""
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


def interval(start: int, end: int) -> Candidate:
    return Candidate("interval", {"restore": [start, end]}, f"layers {start}–{end}", start, end,
                     layers_restored=end - start + 1)  # fmt: skip


def row(candidate: Candidate, quality: float, diversity: float, **more: Any) -> Row:
    return Row(candidate, quality, diversity, **{"prompts": 40, "dtype": "float32", "exact": True, **more})


POST = Candidate("post", {"alpha": 0.0}, "post-trained", alpha=0.0)
PRE = Candidate("pre", {"alpha": 1.0}, "pre-trained", alpha=1.0, layers_restored=3)
SOUP = Candidate("soup", {"alpha": 0.5}, "soup 0.50", alpha=0.5)


def made_rows(intervals: dict[tuple[int, int], tuple[float, float]]) -> list[Row]:
    """Rows of both models, a soup, and intervals with (Q, D)."""
    ends = [row(POST, 0.96, 1.0), row(PRE, 0.5, 2.0), row(SOUP, 0.9, 1.5)]
    return ends + [row(interval(*span), *scores) for span, scores in intervals.items()]


def made_report(rows: Sequence[Row], *, min_quality: float = 0.9, **more: Any) -> Report:
    """A report on rows of which the first is the post-trained model."""
    post_quality = {conditions(rows[0]): rows[0].quality}
    judged = judge(rows, post_quality=post_quality, min_quality=min_quality)
    ends = [row.candidate.end for row in rows if row.candidate.end is not None]
    values = {
        "layers": max(ends, default=0) + 1, "task": "crc", "pretrained": "../pre", "posttrained": "../post",
        "dtype": None, "notes": (), "elapsed_s": 1.5,
    }  # fmt: skip
    choice = choose(judged, min_quality=min_quality)
    return Report(rows=tuple(judged), choice=choice, post_quality=post_quality, **{**values, **more})


# watching and stopping


@dataclass
class Watcher:
    """A Progress that remembers what it was told, and does `act` when it has heard of `at` stages."""

    at: int = 0
    act: Callable[[], object] = bool
    said: list[str] = field(default_factory=list)
    started: list[tuple[str, int]] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    states: int = 0

    def start(self, what: str, total: int, unit: str = "B") -> None:
        self.started.append((what, total))

    def stage(self, what: str) -> None:
        self.stages.append(what)
        if len(self.stages) == self.at:
            self.act()

    def advance(self, count: int) -> None:
        self.states += count

    def say(self, message: str) -> None:
        self.said.append(message)


def kill_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_pictures(folder: Path, report: Report) -> None:
    """Stands in for `draw_report`, which takes longer than a small search."""
    for name in ("tradeoff.png", "tradeoff.svg", "heatmaps.png", "heatmaps.svg"):
        (folder / name).write_bytes(b"a picture")


def prompts_of(folder: Path) -> dict[str, Any]:
    with np.load(folder / "prompts.npz") as kept:
        return dict(kept)


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Three prompts of each family, three soups and no real pictures: a small search takes a quarter of a second.

    The machine is said to do 100 GFLOP/s, which takes seconds to measure.
    """
    patch.setattr(ConstrainedRandomCharacter, "prompts_per_family", 3)
    patch.setattr("slrmerge.search.candidates.SOUP_STEPS", 4)
    patch.setattr("slrmerge.search.estimate.measured_rate", lambda width, dtype, device: 1e11)
    patch.setattr("slrmerge.search.run.draw_report", no_pictures)
    patch.setattr("slrmerge.search.select.draw_report", no_pictures)


if __name__ == "__main__":  # search the pair in a folder, and be killed when a stage starts
    number, folder = sys.argv[1:]
    hurry(pytest.MonkeyPatch())
    SmallPair(Path(folder)).report(progress=Watcher(int(number), kill_oneself))
