"""Questions → tokens, through the post-trained model's own tokenizer and chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slrmerge.crc import Question
from slrmerge.errors import Problem, UnsupportedModelError, first_line, raise_all


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as the model reads it, up to where its answer starts, and the tokens of the valid answers."""

    ids: tuple[int, ...]
    valid_ids: tuple[int, ...]


def tokenise(questions: Sequence[Question], folder: Path) -> list[Prompt]:
    """Prompts for the chat model in `folder`: the question as a user's turn, then the start of the assistant's.

    An answer's token is the one that the model was taught to write there: the template's own rendering of the answer
    decides about spaces before it. Thinking is switched off where a template has such a switch.

    Raises UnsupportedModelError where there is no chat template, or an answer is not one token right after the prompt.
    """
    where = str(folder)
    tokenizer = load_tokenizer(folder)
    prompts: list[Prompt] = []
    problems: dict[str, Problem] = {}
    for question in questions:
        text = render(tokenizer, question.text, enable_thinking=False)
        ids = _encode(tokenizer, text)
        valid = []
        for answer in question.answers:
            token = _answer_token(tokenizer, question, answer, text, ids)
            if isinstance(token, int):
                valid.append(token)
            else:
                problems.setdefault(token, Problem(where, token, "ask another task, or a model that answers at once"))
        prompts.append(Prompt(tuple(ids), tuple(valid)))
    raise_all(list(problems.values())[:3], UnsupportedModelError)
    return prompts


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of the chat model in `folder`. Raises UnsupportedModelError where it or its template is missing."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        what = f"its tokenizer cannot be loaded ({type(error).__name__}: {first_line(error)})"
        raise UnsupportedModelError(Problem(str(folder), what)) from error
    if tokenizer.chat_template is None:
        what = "its tokenizer has no chat template, so how to ask is not known"
        raise UnsupportedModelError(Problem(str(folder), what, "add the chat_template that the model was trained with"))
    return tokenizer


def render(tokenizer: Any, question: str, **switches: object) -> str:
    """A question as a user's turn, up to where the assistant's starts; `switches` are variables of the template."""
    return _render(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True, **switches)


def _answer_token(tokenizer: Any, question: Question, answer: str, text: str, ids: list[int]) -> int | str:
    """The token of an answer, or why there is none."""
    turns = [{"role": "user", "content": question.text}, {"role": "assistant", "content": answer}]
    taught = _render(tokenizer, turns, add_generation_prompt=False, enable_thinking=False)
    if not taught.startswith(text):  # a template that shows past turns otherwise
        taught = text + answer
    after = _encode(tokenizer, taught)
    if after[: len(ids)] != ids:
        return f"the answer {answer!r} changes the tokens of the prompt before it"
    first = after[len(ids) : len(ids) + 1]
    written = tokenizer.decode(first)
    if written.strip() != answer:
        return f"the answer {answer!r} is not a single token after the chat template; the first is {written!r}"
    return first[0]


def _render(tokenizer: Any, turns: list[dict[str, str]], **switches: object) -> str:
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, **switches)
    except Exception as error:
        what = f"its chat template cannot be used ({first_line(error)})"
        raise UnsupportedModelError(Problem(str(tokenizer.name_or_path), what)) from error
    return text


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
