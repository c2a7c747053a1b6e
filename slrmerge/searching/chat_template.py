"""What a chat template makes of a question, and of the answer to it."""

import re
from datetime import date, datetime
from typing import Any, NamedTuple

from slrmerge.errors import LimitError, Problem, UnsupportedModelError, first_line
from slrmerge.io.threads import TimeLimitError, memory_limit, time_limit

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


def render(tokenizer: Any, question: str) -> str:
    """A question as a user's turn, up to the start of the assistant's.

    Raises UnsupportedModelError where the template fails or leaves out the question.
    """
    return Turn(tokenizer, question).prompt


class CompleteTurn(NamedTuple):
    """A question and an answer as the template renders them.

    The prompt, which ends with `added`; then `space`, the answer, and `after`. Where the template renders a complete
    turn in another way than the start of one (`is_continued` is false), `after` is known, but not what is before.
    """

    prompt: str
    added: str
    space: str
    after: str
    is_continued: bool


class Turn:
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

    def complete(self) -> CompleteTurn:
        rendered = self._render(("user", self._question), ("assistant", _ANSWER), add_generation_prompt=False)
        before, found, after = rendered.rpartition(_ANSWER)
        if not (found and before.startswith(self.prompt)):
            return CompleteTurn(self.prompt, "", "", after if found else "", is_continued=False)
        between = before[len(self.prompt) :]
        added = between.rstrip(" ") if between.strip() else ""  # spaces belong to the answer's first token
        return CompleteTurn(self.prompt + added, added, between[len(added) :], after, is_continued=True)

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


def is_thinking(prompt: str, question: str) -> bool:
    """Whether a thinking block is open where the prompt ends."""
    marks = list(_THINKING_MARK.finditer(prompt, prompt.rindex(question.strip()) + len(question.strip())))
    return bool(marks) and marks[-1]["end"] is None


def pin_date(tokenizer: Any, day: date) -> date | None:
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
