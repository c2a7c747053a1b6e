"""What a chat template makes of a question is the prompt, or is refused."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest

from slrmerge.errors import UnsupportedModelError
from slrmerge.io.threads import TimeLimitError
from slrmerge.searching import chat_template
from slrmerge.searching.chat_template import render
from slrmerge.searching.prompts import tokenize
from slrmerge.searching.proxy_tasks import Question
from slrmerge.searching.tokenizer import load_tokenizer
from tests.problems import refused
from tests.searching.chat_models import ASK, PLAIN, ask, refusal_code, refusals, save

THINKING = PLAIN.replace(
    "<bot>{% endif %}",
    "<bot>{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}",
)


def test_thinking_is_switched_off_where_there_is_a_switch(tmp_path: Path) -> None:
    prompt, valid = ask(save(tmp_path, THINKING), "A", "B")
    assert prompt[-3:] == ["<bot>", "<think>", "</think>"]
    assert valid == ["A", "B"]


def test_a_template_that_renders_past_turns_differently_is_supported(tmp_path: Path) -> None:
    assert ask(save(tmp_path, "{{ '<s>' if messages|length == 2 }}" + PLAIN), "A", "B") == (
        ["<user>", *ASK, "</s>", "<bot>"],
        ["A", "B"],
    )


EMPTY_THOUGHT = PLAIN.replace("{{ m.content }}", "{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}")


@pytest.mark.parametrize(
    ("template", "added"),
    [(EMPTY_THOUGHT, "<think></think>"), (EMPTY_THOUGHT.replace("<bot>{%", "<bot><think>{%"), "</think>")],
    ids=["a whole block", "its end"],
)
def test_what_the_template_writes_before_every_answer_belongs_to_the_prompt(
    tmp_path: Path, template: str, added: str
) -> None:
    (prompt,) = tokenize([Question(ASK, ("A", "B"))], save(tmp_path, template))
    assert (prompt.added, prompt.text) == (added, f"<user>{ASK}</s><bot><think></think>")
    assert ask(tmp_path, "A", "B") == (["<user>", *ASK, "</s>", "<bot>", "<think>", "</think>"], ["A", "B"])


def test_a_channel_of_the_answer_belongs_to_the_prompt(tmp_path: Path) -> None:
    channel = "{{ '<|channel|>final<|message|>' if m.role == 'assistant' }}{{ m.content }}"
    (prompt,) = tokenize([Question(ASK, ("a", "f"))], save(tmp_path, PLAIN.replace("{{ m.content }}", channel)))
    assert prompt.added == "<|channel|>final<|message|>"
    assert [len(path) for path in prompt.answers] == [1, 1]


OPEN_BLOCKS = [
    "<think>\n",
    "<|begin_of_thought|>",
    "<|START_THINKING|>",
    "[THINK]",
    "<seed:think>",
    "<|channel|>analysis<|message|>",
    "◁think▷",
]


@pytest.mark.parametrize("mark", OPEN_BLOCKS)
def test_a_thinking_block_that_stays_open_is_refused(tmp_path: Path, mark: str) -> None:
    save(tmp_path, f"{{% set mark = {mark!r} %}}" + PLAIN.replace("<bot>{% endif %}", "<bot>{{ mark }}{% endif %}"))
    assert refusal_code(tmp_path) == "open-thinking"


CLOSED_BLOCKS = [
    "<think></think>",
    "<no_think>",
    "[THINK][/THINK]",
    "<|begin_of_thought|><|end_of_thought|>",
    "<|START_THINKING|><|END_THINKING|>",
]


@pytest.mark.parametrize("mark", CLOSED_BLOCKS)
def test_a_thinking_block_that_ends_is_no_reason_to_refuse(tmp_path: Path, mark: str) -> None:
    save(tmp_path, PLAIN.replace("<bot>{% endif %}", f"<bot>{mark}{{% endif %}}"))
    (prompt,) = tokenize([Question(ASK, ("A", "B"))], tmp_path)
    assert (prompt.text.endswith(mark), prompt.added) == (True, "")


def test_the_remedy_for_an_open_thinking_block_helps(tmp_path: Path) -> None:
    end = "<bot><think>{{ '</think>' if enable_thinking is false }}{% endif %}"
    assert ask(save(tmp_path, PLAIN.replace("<bot>{% endif %}", end)), "A", "B")[0][-2:] == ["<think>", "</think>"]


def test_a_question_about_thinking_opens_no_block(tmp_path: Path) -> None:
    save(tmp_path, PLAIN)
    (prompt,) = tokenize([Question("What does <think> mean, A or B?", ("A", "B"))], tmp_path)
    assert prompt.added == ""


PARTS = PLAIN.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")


def test_a_template_that_iterates_over_parts_gets_parts(tmp_path: Path) -> None:
    assert ask(save(tmp_path, PARTS), "A", "B") == (["<user>", *ASK, "</s>", "<bot>"], ["A", "B"])


def test_a_template_that_fails_with_text_gets_parts(tmp_path: Path) -> None:
    template = PLAIN.replace("{{ m.content }}", "{{ m.content[0]['text'].strip() }}")
    assert ask(save(tmp_path, template), "A", "B")[0] == ["<user>", *ASK, "</s>", "<bot>"]


@pytest.mark.parametrize("content", ["{{ m.text }}", "{{ m.content | upper }}", "{{ m.content[:5] }}"])
def test_a_template_that_leaves_out_the_question_is_refused(tmp_path: Path, content: str) -> None:
    assert refusal_code(save(tmp_path, PLAIN.replace("{{ m.content }}", content))) == "question-not-in-prompt"


DATED = "\n   {% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %-d/%m, 100%%') }}{% endif %}" + PLAIN


def test_a_template_gets_the_date_that_is_given(tmp_path: Path) -> None:
    (prompt,) = tokenize([Question(ASK, ("A", "B"))], save(tmp_path, DATED), day=date(2025, 3, 7))
    assert prompt.day == date(2025, 3, 7)
    assert prompt.text == f"\n07 Mar 2025, 7/03, 100%<user>{ASK}</s><bot>"


def test_the_date_today_gives_the_prompt_that_transformers_renders(tmp_path: Path) -> None:
    save(tmp_path, DATED)
    today = date.today()
    (prompt,) = tokenize([Question(ASK, ("A", "B"))], tmp_path)
    plain = render(load_tokenizer(tmp_path), ASK)
    if date.today() == today:  # not at midnight
        assert (prompt.text, prompt.day) == (plain, today)


def test_a_template_that_asks_for_no_date_has_none(tmp_path: Path) -> None:
    (prompt,) = tokenize([Question(ASK, ("A", "B"))], save(tmp_path, PLAIN), day=date(2025, 3, 7))
    assert prompt.day is None


def test_a_chat_template_that_raises_is_reported_with_its_reason(tmp_path: Path) -> None:
    save(tmp_path, "{{ raise_exception('a system turn is needed') }}")
    (problem,) = refusals(tmp_path, "A")
    assert problem.code == "chat-template-fails"
    assert "a system turn is needed" in problem.what  # the template's own words


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{{ '' }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template", [LOOPS, "{{ 'x' * 20000000 }}", "{{ ('x' * 20000000000) | length }}"])
def test_a_chat_template_that_takes_too_long_or_is_too_long_or_takes_much_memory_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(chat_template, "RENDERING_S", 0.2)
    assert refusal_code(save(tmp_path, template)) == "chat-template-fails"


def test_a_time_limit_that_ends_while_a_template_fails_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def late(_: float) -> Iterator[None]:
        yield
        raise TimeLimitError

    monkeypatch.setattr(chat_template, "time_limit", late)
    assert refusal_code(save(tmp_path, PLAIN)) == "chat-template-fails"


def test_a_chat_template_that_is_wrong_is_reported(tmp_path: Path) -> None:
    assert refusal_code(save(tmp_path, "{{ messages + 1 }}")) == "chat-template-fails"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory")
def test_a_time_limit_that_ends_a_block_while_it_fails_leaves_no_limit_on_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import resource

    def fail_late(*_: object, **__: object) -> bool:
        return any(map(time.sleep, [0.2, "x"]))  # type: ignore[arg-type]  # no Python code runs in between

    before = resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(chat_template, "RENDERING_S", 0.05)
    with refused(UnsupportedModelError, "chat-template-fails") as caught:
        render(SimpleNamespace(apply_chat_template=fail_late, name_or_path="x"), "Name a city.")
    error = caught.value
    assert resource.getrlimit(resource.RLIMIT_AS) == before, error
