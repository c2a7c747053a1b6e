"""Questions → tokens, through the post-trained model's own tokenizer and chat template."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slrmerge.checkpoint.files import unreadable
from slrmerge.checkpoint.safetensors import read_json
from slrmerge.checkpoint.vocabulary import MAX_TOKENIZER_BYTES, TOKENIZER_NAME
from slrmerge.errors import LimitError, Problem, UnsupportedModelError, first_line, raise_all
from slrmerge.io.sizes import format_bytes
from slrmerge.io.threads import TimeLimitError, memory_limit, time_limit
from slrmerge.searching.proxy_tasks import Question
from slrmerge.searching.sweep.contexts import Context

RENDERING_S = 20
"""Maximum time for a chat template to render one question."""

RENDERING_BYTES = 1 << 30
"""Maximum memory for it."""

MAX_RENDERED = 10_000_000
"""Maximum number of characters that a chat template renders to."""

_ANSWER = "qzxjkvw"
"""Stands for an answer while a template is examined; no template contains it."""

_THINKING_MARK = re.compile(
    r"(?P<end>[<\[◁]\|?(?:/|end_?(?:of_?)?)[\w:]*(?:think|thought|reason)\w*\|?[>\]▷]|<channel\|>|<\|?channel\|?>final)"
    r"|[<\[◁]\|?(?!no)[\w:]*(?:think|thought|reason)\w*\|?[>\]▷]|<\|?channel\|?>(?:thought|analysis)",
    re.IGNORECASE,
)
"""What starts or ends a thinking block in chat templates."""

_PART = re.compile(r"""['"]type['"]: ?['"]text['"]""")
"""A part of a message that a template wrote as it is, instead of the text in it."""

_STRFTIME_CODES = "aAbBcdefHIjmMpSUwWxXyY%"


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
    given = _pin_date(tokenizer, day or datetime.now().date())
    prompts: list[Prompt] = []
    problems: dict[str, Problem] = {}
    first_of: dict[tuple[int, ...], Question] = {}
    for question in questions:
        turn = _Turn(tokenizer, question.text, enable_thinking=False).complete()
        if _is_thinking(turn.prompt, question.text):
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


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The tokenizer of the chat model in `folder`. Raises UnsupportedModelError where it or its template is missing."""
    from transformers import AutoTokenizer

    file = Path(folder, TOKENIZER_NAME)
    if file.is_file() and file.stat().st_size > MAX_TOKENIZER_BYTES:  # loading it would take three times its size
        what = f"the tokenizer is larger than {format_bytes(MAX_TOKENIZER_BYTES)}"
        raise UnsupportedModelError(Problem("no-tokenizer", str(file), what, "download it again"))
    is_other_format = Path(folder, "tokenizer.model").is_file() and not file.is_file()
    is_lacking = is_other_format and not find_spec("sentencepiece")
    remedy = "pip install sentencepiece, which reads tokenizer.model" if is_lacking else ""
    if os.fsencode(folder).decode("utf-8", "replace") != os.fspath(folder):
        remedy = "rename the folder: tokenizers are only read from names that are UTF-8"
    with _translate_tokenizer_errors("no-tokenizer", str(folder), "the tokenizer cannot be loaded", remedy):
        tokenizer = AutoTokenizer.from_pretrained(
            folder,
            trust_remote_code=False,
            local_files_only=True,
            mistral_format=False,  # mistral-common, where it is installed, knows no chat templates
        )
    templates = tokenizer.chat_template = tokenizer.chat_template or _processor_template(Path(folder))
    if templates is None:
        what, remedy = "the tokenizer has no chat template", "add the chat_template that the model was trained with"
        raise UnsupportedModelError(Problem("no-chat-template", str(folder), what, remedy))
    named = templates if isinstance(templates, dict) else {"default": templates}
    if not all(isinstance(template, str) for template in named.values()):
        what, remedy = "the chat template is not text", "correct the model's chat template"
        raise UnsupportedModelError(Problem("chat-template-fails", str(folder), what, remedy))
    return tokenizer


def _processor_template(folder: Path) -> Any:
    """The chat template of an image-text model's processor, which its tokenizer may lack. Raises CheckpointError."""
    path = folder / "chat_template.json"
    try:
        return read_json(path).get("chat_template") if path.is_file() else None
    except OSError as error:
        raise unreadable(path, error) from error


@contextmanager
def _translate_tokenizer_errors(code: str, where: str, what: str, remedy: str) -> Iterator[None]:
    """Raise UnsupportedModelError for whatever a faulty tokenizer raises; a panic of its library is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        what = f"{what} ({type(error).__name__}: {first_line(error)})"
        raise UnsupportedModelError(Problem(code, where, what, remedy)) from error


@contextmanager
def tokenizing(tokenizer: Any) -> Iterator[None]:
    """Raise UnsupportedModelError where the tokenizer fails in the block."""
    where = str(tokenizer.name_or_path)
    with _translate_tokenizer_errors("tokenizer-fails", where, "the tokenizer fails", "download it again"):
        yield


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text. Raises UnsupportedModelError where the tokenizer fails."""
    with tokenizing(tokenizer):
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def decode(tokenizer: Any, ids: Sequence[int], **options: bool) -> str:
    """The text of tokens. Raises UnsupportedModelError where the tokenizer fails."""
    with tokenizing(tokenizer):
        text: str = tokenizer.decode(ids, **options)
    return text


def render(tokenizer: Any, question: str) -> str:
    """A question as a user's turn, up to the start of the assistant's.

    Raises UnsupportedModelError where the template fails or leaves out the question.
    """
    return _Turn(tokenizer, question).prompt


class _CompleteTurn(NamedTuple):
    """A question and an answer as the template renders them.

    The prompt, which ends with `added`; then `space`, the answer, and `after`. Where the template renders a complete
    turn in another way than the start of one (`is_continued` is false), `after` is known, but not what is before.
    """

    prompt: str
    added: str
    space: str
    after: str
    is_continued: bool


class _Turn:
    """A question rendered as a user's turn, as text or, for a template that iterates over contents, as parts."""

    def __init__(self, tokenizer: Any, question: str, **switches: object) -> None:
        self._tokenizer, self._question, self._switches = tokenizer, question, switches
        failures: list[UnsupportedModelError] = []
        for self._in_parts in (False, True):
            try:
                self.prompt = self._render(("user", question), add_generation_prompt=True)
            except UnsupportedModelError as error:
                failures.append(error)
                continue
            if question.strip() in self.prompt and not (self._in_parts and _PART.search(self.prompt)):
                return
        if failures:
            raise failures[0]
        what, remedy = "the chat template leaves out or changes the question", "correct the model's chat template"
        raise UnsupportedModelError(Problem("question-not-in-prompt", str(tokenizer.name_or_path), what, remedy))

    def complete(self) -> _CompleteTurn:
        rendered = self._render(("user", self._question), ("assistant", _ANSWER), add_generation_prompt=False)
        before, found, after = rendered.rpartition(_ANSWER)
        if not (found and before.startswith(self.prompt)):
            return _CompleteTurn(self.prompt, "", "", after if found else "", is_continued=False)
        between = before[len(self.prompt) :]
        added = between.rstrip(" ") if between.strip() else ""  # spaces belong to the answer's first token
        return _CompleteTurn(self.prompt + added, added, between[len(added) :], after, is_continued=True)

    def _render(self, *turns: tuple[str, str], add_generation_prompt: bool) -> str:
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if self._in_parts else text}
            for role, text in turns
        ]
        switches = {**self._switches, "add_generation_prompt": add_generation_prompt}
        try:
            # In this order: what ends a block may arrive while the block is left, and would leave the limit on memory.
            with memory_limit(RENDERING_BYTES), time_limit(RENDERING_S):
                rendered: str = self._tokenizer.apply_chat_template(messages, tokenize=False, **switches)
            if len(rendered) > MAX_RENDERED:
                raise ValueError(f"it makes {len(rendered):,} characters of one question")
        except LimitError:
            raise
        except (Exception, TimeLimitError) as error:  # a template is a program: it may raise anything
            what, where = f"the chat template fails ({first_line(error)})", str(self._tokenizer.name_or_path)
            raise UnsupportedModelError(Problem("chat-template-fails", where, what)) from error
        return rendered


class _AnswerTokens(NamedTuple):
    """The tokens of an answer, and those that end the turn after it; none where the template does not show its end."""

    tokens: tuple[int, ...]
    end: tuple[int, ...]


def _answer_tokens(tokenizer: Any, turn: _CompleteTurn, ids: tuple[int, ...], answer: str) -> _AnswerTokens | Problem:
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
    ids: tuple[int, ...], answers: Sequence[tuple[int, ...]], turn: _CompleteTurn, day: date | None
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


def _is_thinking(prompt: str, question: str) -> bool:
    """Whether a thinking block is open where the prompt ends."""
    marks = list(_THINKING_MARK.finditer(prompt, prompt.rindex(question.strip()) + len(question.strip())))
    return bool(marks) and marks[-1]["end"] is None


def _pin_date(tokenizer: Any, day: date) -> date | None:
    """Give the chat template `day` for today. Returns None for a template that does not ask.

    transformers' `strftime_now` reads the clock. A macro of the same name before the template hides it.
    """
    templates = tokenizer.chat_template
    template = templates.get("default", "") if isinstance(templates, dict) else templates
    if "strftime_now" not in template:
        return None
    midnight = datetime(day.year, day.month, day.day)
    codes = {code: midnight.strftime(f"%{code}") for code in _STRFTIME_CODES}
    codes |= {f"-{code}": text.lstrip("0") or "0" for code, text in codes.items()}
    macro = (
        "{%- macro strftime_now(format) -%}{%- set now = namespace(text='', code='') -%}{%- for c in format -%}"
        "{%- if now.code -%}{%- set now.code = now.code ~ c -%}"
        "{%- if c != '-' -%}{%- set now.text = now.text ~ CODES.get(now.code[1:], now.code) -%}"
        "{%- set now.code = '' -%}{%- endif -%}"
        "{%- elif c == '%' -%}{%- set now.code = c -%}{%- else -%}{%- set now.text = now.text ~ c -%}{%- endif -%}"
        "{%- endfor -%}{{ now.text }}{%- endmacro %}\n"  # trim_blocks removes the line break
    )
    tokenizer.chat_template = macro.replace("CODES", repr(codes)) + template
    return day
