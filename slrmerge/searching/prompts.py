"""Questions → tokens, through the post-trained model's own tokenizer and chat template."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slrmerge.errors import Problem, UnsupportedModelError, first_line, raise_all
from slrmerge.io.threads import memory_limit, time_limit
from slrmerge.searching.proxy_tasks import Question
from slrmerge.searching.sweep.contexts import Context

RENDERING_S = 20
"""Maximum time for a chat template to render one question."""

RENDERING_BYTES = 1 << 30
"""Maximum memory for it."""

MAX_RENDERED = 10_000_000
"""Maximum number of characters that a chat template renders to."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as the model reads it, and the contexts of its answers' tokens.

    `answers[a]` is the path of answer a: the context and the target of each of its tokens, as indices. Today every
    answer is one token of the only context.
    """

    contexts: tuple[Context, ...]
    answers: tuple[tuple[tuple[int, int], ...], ...]


def tokenize(questions: Sequence[Question], folder: Path) -> list[Prompt]:
    """Prompts for the chat model in `folder`: the question as a user's turn, then the start of the assistant's.

    An answer's token is the one that the model was trained to write there: the template's own rendering of the answer
    decides about spaces before it. Thinking is switched off where a template has such a switch. Raises
    UnsupportedModelError where there is no chat template, or an answer is not one token right after the prompt.
    """
    tokenizer = load_tokenizer(folder)
    prompts: list[Prompt] = []
    problems: dict[str, Problem] = {}
    for question in questions:
        text = render(tokenizer, question.text, enable_thinking=False)
        ids = _encode(tokenizer, text)
        targets = []
        for answer in question.answers:
            token = _answer_token(tokenizer, question, answer, text, ids)
            if isinstance(token, Problem):
                problems.setdefault(token.what, token)
            else:
                targets.append(token)
        paths = tuple(((0, target),) for target in range(len(targets)))
        prompts.append(Prompt((Context(tuple(ids), tuple(targets)),), paths))
    raise_all(list(problems.values())[:3], UnsupportedModelError)
    return prompts


def contexts_of(prompts: Sequence[Prompt]) -> list[Context]:
    """The contexts of all prompts, one prompt after the other."""
    return [context for prompt in prompts for context in prompt.contexts]


def answer_log_probs(prompts: Sequence[Prompt], log_probs: NDArray[np.float64]) -> NDArray[np.float64]:
    """The log-probability of each whole answer: the sum over its tokens.

    `log_probs` are those of the contexts' targets, shape (candidates, contexts, targets). Returns shape (candidates,
    prompts, answers), NaN past a prompt's own answers.
    """
    most = max(len(prompt.answers) for prompt in prompts)
    folded = np.full((len(log_probs), len(prompts), most), np.nan)
    first = 0
    for number, prompt in enumerate(prompts):
        for answer, path in enumerate(prompt.answers):
            folded[:, number, answer] = sum(log_probs[:, first + context, target] for context, target in path)
        first += len(prompt.contexts)
    return folded


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The tokenizer of the chat model in `folder`. Raises UnsupportedModelError where it or its template is missing."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises Exception itself for a file that it cannot read
        what = f"the tokenizer cannot be loaded ({type(error).__name__}: {first_line(error)})"
        raise UnsupportedModelError(Problem("no-tokenizer", str(folder), what)) from error
    if tokenizer.chat_template is None:
        what, remedy = "the tokenizer has no chat template", "add the chat_template that the model was trained with"
        raise UnsupportedModelError(Problem("no-chat-template", str(folder), what, remedy))
    return tokenizer


def render(tokenizer: Any, question: str, **switches: object) -> str:
    """A question as a user's turn, up to the start of the assistant's; `switches` are variables of the template."""
    return _apply_template(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True, **switches)


def _answer_token(tokenizer: Any, question: Question, answer: str, text: str, ids: list[int]) -> int | Problem:
    """The token of an answer after the prompt `text`, whose tokens are `ids`; a Problem where it is not one token."""
    turns = [{"role": "user", "content": question.text}, {"role": "assistant", "content": answer}]
    rendered = _apply_template(tokenizer, turns, add_generation_prompt=False, enable_thinking=False)
    if not rendered.startswith(text):  # a template that renders past turns differently
        rendered = text + answer
    after = _encode(tokenizer, rendered)
    first = after[len(ids) : len(ids) + 1]
    written = tokenizer.decode(first)
    if after[: len(ids)] == ids and written.strip() == answer:
        return first[0]
    what = (
        f"the answer {answer!r} changes the tokens of the prompt before it"
        if after[: len(ids)] != ids
        else f"the answer {answer!r} is not a single token after the chat template; the first token is {written!r}"
    )
    remedy = "use another proxy task, or a model whose answers are single tokens"
    return Problem("answer-not-a-token", str(tokenizer.name_or_path), what, remedy)


def _apply_template(tokenizer: Any, turns: list[dict[str, str]], **switches: object) -> str:
    try:
        with time_limit(RENDERING_S), memory_limit(RENDERING_BYTES):
            text: str = tokenizer.apply_chat_template(turns, tokenize=False, **switches)
        if len(text) > MAX_RENDERED:
            raise ValueError(f"it makes {len(text):,} characters of one question")
    except Exception as error:  # a template is a program: it may raise anything
        what = f"the chat template fails ({first_line(error)})"
        raise UnsupportedModelError(Problem("chat-template-fails", str(tokenizer.name_or_path), what)) from error
    return text


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
