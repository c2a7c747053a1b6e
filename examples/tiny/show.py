"""Show what checkpoints answer when asked for a random character, and how good and how varied that is.

A collapsed model gives the same answer again and again; a restored one should not, and this makes it visible. Q and D
are those of `slrmerge.searching.proxy_tasks`; the probabilities come from transformers alone.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # the imports below take seconds
    print("loading torch and transformers ...", file=sys.stderr, flush=True)

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from slrmerge.searching.proxy_tasks import ConstrainedRandomCharacter, Question


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (in fp32) and tokenizer of a checkpoint."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return model, tokenizer


def first_token_probs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> torch.Tensor:
    """Probabilities of the first generated token, shape (questions, vocabulary)."""
    chats = [[{"role": "user", "content": question.text}] for question in questions]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    last = batch.attention_mask.sum(dim=1) - 1
    with torch.inference_mode():
        logits: torch.Tensor = model(**batch).logits
    return logits[torch.arange(len(questions)), last].softmax(dim=-1)


def score(
    probs: torch.Tensor, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]
) -> tuple[float, float]:
    """Mean quality and diversity of `probs`, one row for each question."""
    answers = max(len(question.answers) for question in questions)
    log_probs = torch.full((1, len(questions), answers), torch.nan, dtype=torch.float64)
    for number, question in enumerate(questions):
        valid = [tokenizer.convert_tokens_to_ids(answer) for answer in question.answers]
        log_probs[0, number, : len(valid)] = probs[number, valid].double().log()
    quality, diversity = ConstrainedRandomCharacter().score(log_probs.numpy())
    return float(quality.mean()), float(diversity.mean())


def show(folder: Path) -> None:
    """Print a checkpoint's score and its favourite answers to three of the questions."""
    model, tokenizer = load(folder)
    questions = ConstrainedRandomCharacter().questions()
    probs = first_token_probs(model, tokenizer, questions)
    quality, diversity = score(probs, tokenizer, questions)
    print(f"{folder}: Q {quality:.3f}   D {diversity:.3f}")
    for index in (2, 22, 36):
        print(f"  {questions[index].text.split('.')[0]}")
        top = probs[index].topk(6)
        for p, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            print(f"    {tokenizer.decode([token]):8} {p:4.2f} {'#' * round(40 * p)}")
        draws = probs[index].multinomial(20, replacement=True, generator=torch.Generator().manual_seed(0))
        print("    20 tries:", *(tokenizer.decode([token]) for token in draws.tolist()))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # faster than two at this size
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no annotations there
    for folder in arguments.folders:
        if not folder.is_dir():
            parser.error(f"{folder}: no such folder")
        show(folder)


if __name__ == "__main__":
    main()
