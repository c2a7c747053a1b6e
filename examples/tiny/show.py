"""Show what checkpoints answer when asked for a random character, and how good and how varied that is.

A collapsed model gives the same answer again and again; a restored one should not, and this makes it visible.
"""

from __future__ import annotations

import argparse
import copy
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ONLY = "Do not include anything else in your reply."
DIGIT_PROMPT = "Generate a random integer in the range [{}, {}]. " + ONLY
LETTER_PROMPT = "Generate a random letter from {} to {} (inclusive). " + ONLY


@dataclass(frozen=True)
class Prompt:
    """One question and the single-token answers that obey it."""

    text: str
    valid: str


@dataclass(frozen=True)
class Score:
    """Means over the prompts (paper, section 3.2): the mass on valid answers, and their entropy in nats."""

    quality: float
    diversity: float

    def __str__(self) -> str:
        return f"Q {self.quality:.3f}   D {self.diversity:.3f}"


def crc_prompts(count: int = 20, shortest: int = 4) -> list[Prompt]:
    """Constrained Random Character: `count` digit and `count` letter prompts, always the same ones."""
    rng = random.Random(0)
    prompts = []
    for text, alphabet in ((DIGIT_PROMPT, DIGITS), (LETTER_PROMPT, LETTERS)):
        last = len(alphabet) - 1
        ranges = [(a, b) for a in range(last) for b in range(a + shortest - 1, last + 1)]
        for a, b in sorted(rng.sample(ranges, count)):
            prompts.append(Prompt(text.format(alphabet[a], alphabet[b]), alphabet[a : b + 1]))
    return prompts


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The checkpoint in fp32, ready to be asked."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return model, tokenizer


def first_token_probs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]
) -> torch.Tensor:
    """Probabilities of the first generated token, shape (prompts, vocabulary)."""
    chats = [[{"role": "user", "content": prompt.text}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    last = batch.attention_mask.sum(dim=1) - 1
    with torch.inference_mode():
        logits: torch.Tensor = model(**batch).logits
    return logits[torch.arange(len(prompts)), last].softmax(dim=-1)


def score(probs: torch.Tensor, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]) -> Score:
    """Quality and diversity of `probs`, one row for each prompt."""
    quality, diversity = [], []
    for row, prompt in zip(probs, prompts, strict=True):
        valid = row[tokenizer.convert_tokens_to_ids(list(prompt.valid))]
        quality.append(valid.sum())
        diversity.append(torch.special.entr(valid / valid.sum()).sum())
    return Score(torch.stack(quality).mean().item(), torch.stack(diversity).mean().item())


def layer_of(name: str) -> int | None:
    """The layer a tensor belongs to, or None outside the stack."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def check(pretrained: Path, posttrained: Path) -> None:
    """Score the pair, every interval, the soups and the controls, and print the ones that count."""
    pre, tokenizer = load(pretrained)
    post, _ = load(posttrained)
    pre_weights, post_weights = pre.state_dict(), copy.deepcopy(post.state_dict())
    prompts = crc_prompts()
    layers = post.config.num_hidden_layers

    def score_mix(alpha: Callable[[str], float]) -> Score:
        """Score the model in which `alpha` of each tensor is pre-trained and the rest post-trained."""
        post.load_state_dict(
            {name: torch.lerp(post_weights[name], pre_weights[name], alpha(name)) for name in post_weights}
        )
        return score(first_token_probs(post, tokenizer, prompts), tokenizer, prompts)

    def score_soup(alpha: float) -> Score:
        return score_mix(lambda _: alpha)

    def score_interval(first: int, last: int) -> Score:
        return score_mix(lambda name: float((layer := layer_of(name)) is not None and first <= layer <= last))

    def best(scores: dict[str, Score]) -> str:
        good = [key for key in scores if scores[key].quality >= floor]
        return max(good, key=lambda key: scores[key].diversity)

    ends = {"pre-trained": score_mix(lambda _: 1.0), "post-trained": score_mix(lambda _: 0.0)}
    floor = 0.9 * ends["post-trained"].quality
    soups = {f"alpha {a / 20:.2f}": score_soup(a / 20) for a in range(1, 20)}
    spans = {f"layers {i}-{j}": (i, j) for i in range(layers) for j in range(i, layers)}
    intervals = {key: score_interval(*span) for key, span in spans.items()}
    first, last = spans[best(intervals)]
    length = last - first + 1
    early, late = f"layers 0-{length - 1}", f"layers {layers - length}-{layers - 1}"
    rows = ends | {
        f"best soup ({best(soups)})": soups[best(soups)],
        f"best interval ({best(intervals)})": intervals[best(intervals)],
        f"early control ({early})": intervals[early],
        f"late control ({late})": intervals[late],
    }
    for name, value in rows.items():
        print(f"{name:30} {value}")
    print(f"Best: the highest D with Q >= {floor:.3f}, 0.9 of the post-trained model's,")
    print(f"among {len(intervals)} intervals and {len(soups)} soups.")


def show(folder: Path) -> None:
    """Print a checkpoint's score and its favourite answers to three of the prompts."""
    model, tokenizer = load(folder)
    prompts = crc_prompts()
    probs = first_token_probs(model, tokenizer, prompts)
    print(f"{folder}: {score(probs, tokenizer, prompts)}")
    for index in (2, 22, 36):
        print(f"  {prompts[index].text.split('.')[0]}")
        top = probs[index].topk(6)
        for p, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            print(f"    {tokenizer.decode([token]):8} {p:4.2f} {'#' * round(40 * p)}")
        draws = probs[index].multinomial(20, replacement=True, generator=torch.Generator().manual_seed(0))
        print("    20 tries:", *(tokenizer.decode([token]) for token in draws.tolist()))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--check", action="store_true", help="try every interval of PRETRAINED POSTTRAINED")
    args = parser.parse_args()
    torch.set_num_threads(1)  # faster than two at this size
    disable_progress_bar()
    for folder in args.folders:
        if not folder.is_dir():
            parser.error(f"{folder}: no such folder")
    if not args.check:
        for folder in args.folders:
            show(folder)
    elif len(args.folders) == 2:
        check(*args.folders)
    else:
        parser.error("--check takes two folders: the pre-trained and the post-trained checkpoint")


if __name__ == "__main__":
    main()
