"""Questions → tokens, through the post-trained model's own tokenizer and chat template."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slrmerge.errors import Problem, UnsupportedModelError, raise_all
from slrmerge.searching.chat_template import CompleteTurn, Turn, is_thinking, pin_date
from slrmerge.searching.proxy_tasks import Question
from slrmerge.searching.sweep.trie import Context
from slrmerge.searching.tokenizer import decode, encode, load_tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as the model reads it, and the contexts of its answers' tokens.

    `answers[a]` is the path of answer a: the context and the target of each of its tokens, as indices. `text` is the
    rendered prompt. It ends with `added`, which the generation prompt lacks: what the template writes before an answer.
    `day` is the date that the template was given, None for a template that does not ask for it. With an answer, the
    template continues the prompt, unless `is_continued` is false.
    """

    contexts: tuple[Context, ...]
    answers: tuple[tuple[tuple[int, int], ...], ...]
    text: str = ""
    added: str = ""
    day: date | None = None
    is_continued: bool = True


def tokenize(questions: Sequence[Question], folder: Path, *, day: date | None = None) -> list[Prompt]:
    """Prompts for the chat model in `folder`: the question as a user's turn, then the start of the assistant's.

    The tokens of an answer are those that the model was trained to write there: the template's own rendering of an
    answer decides about spaces before it. An answer whose tokens are the start of another's ends with the end of the
    turn. Thinking is switched off where a template has such a switch, and what a template writes before every answer,
    such as the end of a thinking block, belongs to the prompt. A template that asks for the current date gets `day`,
    today by default.

    Raises UnsupportedModelError where there is no chat template, where it leaves out the question or does not end a
    thinking block, where two prompts are alike, or an answer has no tokens of its own.
    """
    tokenizer = load_tokenizer(folder)
    given = pin_date(tokenizer, day or datetime.now().date())
    prompts: list[Prompt] = []
    problems: dict[str, Problem] = {}
    first_of: dict[tuple[int, ...], Question] = {}
    for question in questions:
        turn = Turn(tokenizer, question.text, enable_thinking=False).complete()
        if is_thinking(turn.prompt, question.text):
            what = "the chat template starts a thinking block and does not end it before the answer"
            remedy = "let the template end it where enable_thinking is false"
            raise UnsupportedModelError(Problem("open-thinking", str(folder), what, remedy))
        ids = tuple(encode(tokenizer, turn.prompt))
        other = first_of.setdefault(ids, question)
        if other is not question:
            what = f"the questions {other.text!r} and {question.text!r} have the same tokens"
            problems.setdefault(what, Problem("prompts-alike", str(folder), what, "ask different questions"))
        answers = [_answer_tokens(tokenizer, turn, ids, answer) for answer in question.answers]
        refused = [answer for answer in answers if isinstance(answer, Problem)]
        tokens = _end_prefixes([answer for answer in answers if not isinstance(answer, Problem)])
        for problem in refused or _ambiguities(question, tokens, str(folder)):
            problems.setdefault(problem.what, problem)
        prompts.append(_make_prompt(ids, tokens, turn, given))
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


class _AnswerTokens(NamedTuple):
    """The tokens of an answer, and those that end the turn after it; none where the template does not show its end."""

    tokens: tuple[int, ...]
    end: tuple[int, ...]


def _answer_tokens(tokenizer: Any, turn: CompleteTurn, ids: tuple[int, ...], answer: str) -> _AnswerTokens | Problem:
    """An answer's tokens after the prompt, whose tokens are `ids`; a Problem where it has none of its own."""
    after = turn.after if turn.is_continued else ""
    encoded = tuple(encode(tokenizer, turn.prompt + turn.space + answer + after))
    where, remedy = str(tokenizer.name_or_path), "use another proxy task"
    if encoded[: len(ids)] != ids:
        if turn.prompt.endswith(" "):  # which the tokenizer joins with any answer
            remedy = "remove the space at the end of the chat template's generation prompt"
        what = f"the answer {answer!r} changes the tokens of the prompt before it"
        return Problem("answer-not-a-token", where, what, remedy)
    rest = encoded[len(ids) :]
    wanted = "".join(answer.split())
    written = (decode(tokenizer, rest[:count], clean_up_tokenization_spaces=False) for count in range(1, len(rest) + 1))
    count = next((count for count, text in enumerate(written, 1) if "".join(text.split()) == wanted), None)
    if count is None:
        what = f"the answer {answer!r} has no tokens of its own; its first token is {decode(tokenizer, rest[:1])!r}"
        return Problem("answer-not-a-token", where, what, remedy)
    end = rest[count:] if turn.is_continued else tuple(encode(tokenizer, turn.after))
    special = next((place for place, token in enumerate(end) if token in tokenizer.all_special_ids), 0)
    if not end and tokenizer.eos_token_id is not None:
        end = (tokenizer.eos_token_id,)
    return _AnswerTokens(rest[:count], end[: special + 1])


def _end_prefixes(answers: Sequence[_AnswerTokens]) -> list[tuple[int, ...]]:
    """The tokens of each answer, with the end of the turn where they are the start of another answer's."""
    return [
        each.tokens + (each.end if any(_continues(other.tokens, each.tokens) for other in answers) else ())
        for each in answers
    ]


def _ambiguities(question: Question, answers: Sequence[tuple[int, ...]], where: str) -> Iterator[Problem]:
    """Answers that cannot be told apart, because the tokens of one are still the start of another's."""
    for answer, tokens in zip(question.answers, answers, strict=True):
        for other, others in zip(question.answers, answers, strict=True):
            if answer != other and (tokens == others or _continues(others, tokens)):
                what = f"the answers {answer!r} and {other!r} cannot be told apart: the template does not end a turn"
                yield Problem("ambiguous-answers", where, what, "leave out one of them")


def _continues(tokens: tuple[int, ...], start: tuple[int, ...]) -> bool:
    return len(tokens) > len(start) and tokens[: len(start)] == start


def _make_prompt(
    ids: tuple[int, ...], answers: Sequence[tuple[int, ...]], turn: CompleteTurn, day: date | None
) -> Prompt:
    """A context for the prompt and one for every start of an answer, each with the tokens that may follow."""
    targets: dict[tuple[int, ...], dict[int, int]] = {(): {}}
    for tokens in answers:
        for place, token in enumerate(tokens):
            known = targets.setdefault(tokens[:place], {})
            known.setdefault(token, len(known))
    numbers = {start: number for number, start in enumerate(targets)}
    paths = tuple(
        tuple((numbers[tokens[:place]], targets[tokens[:place]][token]) for place, token in enumerate(tokens))
        for tokens in answers
    )
    contexts = tuple(Context(ids + start, tuple(known)) for start, known in targets.items())
    return Prompt(contexts, paths, turn.prompt, turn.added, day, turn.is_continued)
