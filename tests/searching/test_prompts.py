"""Questions become the right tokens, or are refused, with templates and tokenizers that have traps."""

from datetime import date
from pathlib import Path

import pytest

from slrmerge.errors import UnsupportedModelError
from slrmerge.searching.prompts import contexts_of, load_tokenizer, render, tokenize
from slrmerge.searching.proxy_tasks import TASKS, Question
from slrmerge.searching.sweep.contexts import Context
from tests.problems import refused
from tests.searching.chat_tokenizers import ASK, PLAIN, ask, paths, refusal_code, save


def test_a_prompt_is_the_question_and_the_start_of_the_answer(tmp_path: Path) -> None:
    assert ask(save(tmp_path, PLAIN), "A", "B") == (["<user>", *ASK, "</s>", "<bot>"], ["A", "B"])


def test_prompts_are_in_the_order_of_the_questions(tmp_path: Path) -> None:
    save(tmp_path, PLAIN)
    questions = [Question("1?", ("1", "2")), Question("A?", ("A", "B", "C"))]
    prompts = tokenize(questions, tmp_path)
    contexts = contexts_of(prompts)
    assert [len(context.ids) for context in contexts] == [5, 5]
    assert [len(context.targets) for context in contexts] == [2, 3]
    assert contexts[0].ids != contexts[1].ids
    assert prompts == [tokenize([question], tmp_path)[0] for question in questions]


def test_nothing_is_added_before_the_template(tmp_path: Path) -> None:
    """Also by a tokenizer that starts every text with <s>: the template has it already."""
    prompt, _ = ask(save(tmp_path, "<s>" + PLAIN, bos=True), "A")
    assert prompt == ["<s>", "<user>", *ASK, "</s>", "<bot>"]


SPACED = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def test_a_space_before_the_answer_belongs_to_its_token(tmp_path: Path) -> None:
    prompt, valid = ask(save(tmp_path, SPACED, spaced=True), "A", "B")
    assert prompt[-1] == "[/INST]"
    assert valid == ["▁A", "▁B"]


def test_without_a_space_in_the_template_the_answer_has_none(tmp_path: Path) -> None:
    _, valid = ask(save(tmp_path, SPACED.replace("%} {{", "%}{{"), spaced=True), "A", "B")
    assert valid == ["A", "B"]


def test_a_space_that_is_a_token_of_its_own_is_one_more_step(tmp_path: Path) -> None:
    """Q = P(space) · (P(A | space) + P(B | space))."""
    (prompt,) = tokenize([Question(ASK, ("A", "B"))], save(tmp_path, SPACED))
    space, answer = prompt.contexts
    assert answer.ids == space.ids + space.targets
    assert prompt.answers == (((0, 0), (1, 0)), ((0, 0), (1, 1)))
    assert paths(tmp_path, "A", "B") == ["  A", "  B"]


@pytest.mark.parametrize("end", ["\n", "\n\n", ": "])
def test_the_end_of_the_generation_prompt_is_kept(tmp_path: Path, end: str) -> None:
    template = PLAIN.replace("{{ m.content }}", "{{ end }}{{ m.content }}").replace("<bot>{%", "<bot>{{ end }}{%")
    prompt, valid = ask(save(tmp_path, f"{{% set end = {end!r} %}}{template}"), "A", "B")
    assert prompt == ["<user>", *end, *ASK, "</s>", "<bot>", *end]
    assert valid == ["A", "B"]


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


def test_the_prompts_of_crc_are_the_papers(tmp_path: Path) -> None:
    """One context for each question, and one token for each answer, in their order: nothing else is computed."""
    questions = TASKS["crc"]().questions()
    prompts = tokenize(questions, save(tmp_path, PLAIN))
    tokenizer = load_tokenizer(tmp_path)
    for question, prompt in zip(questions, prompts, strict=True):
        ids = tokenizer(f"<user>{question.text}</s><bot>", add_special_tokens=False)["input_ids"]
        targets = tokenizer.convert_tokens_to_ids(list(question.answers))
        assert prompt.contexts == (Context(tuple(ids), tuple(targets)),)
        assert prompt.answers == tuple(((0, number),) for number in range(len(targets)))


# the question in the prompt

PARTS = PLAIN.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")


def test_a_template_that_iterates_over_parts_gets_parts(tmp_path: Path) -> None:
    assert ask(save(tmp_path, PARTS), "A", "B") == (["<user>", *ASK, "</s>", "<bot>"], ["A", "B"])


def test_a_template_that_fails_with_text_gets_parts(tmp_path: Path) -> None:
    template = PLAIN.replace("{{ m.content }}", "{{ m.content[0]['text'].strip() }}")
    assert ask(save(tmp_path, template), "A", "B")[0] == ["<user>", *ASK, "</s>", "<bot>"]


@pytest.mark.parametrize("content", ["{{ m.text }}", "{{ m.content | upper }}", "{{ m.content[:5] }}"])
def test_a_template_that_leaves_out_the_question_is_refused(tmp_path: Path, content: str) -> None:
    assert refusal_code(save(tmp_path, PLAIN.replace("{{ m.content }}", content))) == "question-not-in-prompt"


def test_questions_with_the_same_tokens_are_refused(tmp_path: Path) -> None:
    save(tmp_path, PLAIN)
    with refused(UnsupportedModelError, "prompts-alike"):
        tokenize([Question("é?", ("A", "B")), Question("ü?", ("A", "B"))], tmp_path)


# the date

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
