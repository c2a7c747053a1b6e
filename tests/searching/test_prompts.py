"""Questions become the right tokens, or are refused, with templates and tokenizers that have traps."""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers.models.auto import tokenization_auto

from slrmerge.errors import Problem, UnsupportedModelError
from slrmerge.io.threads import TimeLimitError
from slrmerge.searching import prompts
from slrmerge.searching.prompts import Prompt, answer_log_probs, contexts_of, load_tokenizer, render, tokenize
from slrmerge.searching.proxy_tasks import TASKS, Question
from slrmerge.searching.sweep.contexts import Context
from tests.conftest import TINY
from tests.problems import refused

ASK = "Pick A or B."
MARKS = ("<s>", "</s>", "<user>", "<bot>", "<think>", "</think>", "[INST]", "[/INST]")

PLAIN = "{% for m in messages %}<{{ 'bot' if m.role == 'assistant' else 'user' }}>{{ m.content }}</s>{% endfor %}"
PLAIN += "{% if add_generation_prompt %}<bot>{% endif %}"


def save(
    folder: Path, template: str | None, *, words: tuple[str, ...] = (), spaced: bool = False, bos: bool = False
) -> Path:
    """A tokenizer of single characters, `words` and MARKS; with `spaced`, " A" is one token, "▁A"."""
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = ["<unk>", *characters, *("▁" + character for character in characters), "▁", *words]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
    pattern = "|".join([*words, *(["▁[^▁]"] if spaced else []), "[\\s\\S]"])
    splitter = pre_tokenizers.Split(Regex(pattern), "isolated")
    if spaced:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    else:
        tokenizer.decoder = decoders.Fuse()
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    if bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def ask(folder: Path, *answers: str, text: str = ASK) -> tuple[list[str], list[str]]:
    """The tokens of the prompt and of its valid answers."""
    from transformers import AutoTokenizer

    (prompt,) = tokenize([Question(text, answers)], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (context,) = prompt.contexts
    assert prompt.answers == tuple(((0, number),) for number in range(len(answers)))
    prompt_tokens, answer_tokens = map(tokenizer.convert_ids_to_tokens, (list(context.ids), list(context.targets)))
    return prompt_tokens, answer_tokens


def refusals(folder: Path, *answers: str) -> list[Problem]:
    """The problems of a question with these answers; all are of the model's folder."""
    with pytest.raises(UnsupportedModelError) as caught:
        tokenize([Question(ASK, answers)], folder)
    assert {problem.where for problem in caught.value.problems} == {str(folder)}
    return list(caught.value.problems)


def paths(folder: Path, *answers: str) -> list[str]:
    """The tokens of each answer along its path, and the context that each of them follows."""
    from transformers import AutoTokenizer

    (prompt,) = tokenize([Question(ASK, answers)], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = len(prompt.contexts[0].ids)
    for path in prompt.answers:
        written: tuple[int, ...] = ()
        for number, target in path:
            context = prompt.contexts[number]
            assert context.ids == prompt.contexts[0].ids + written
            written = (*context.ids[start:], context.targets[target])
    return [
        " ".join(tokenizer.convert_ids_to_tokens([prompt.contexts[c].targets[t] for c, t in path]))
        for path in prompt.answers
    ]


def refused_answers(folder: Path, *answers: str) -> list[str]:
    """The answers that are refused because they have no tokens of their own."""
    problems = refusals(folder, *answers)
    assert {problem.code for problem in problems} == {"answer-not-a-token"}
    return [problem.what.split("'")[1] for problem in problems]


def refusal_code(folder: Path) -> str:
    (problem,) = refusals(folder, "A")
    return problem.code


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


def test_a_tokenizer_that_is_no_tokenizer_by_its_size_is_not_loaded(tmp_path: Path) -> None:
    save(tmp_path, PLAIN)
    os.truncate(tmp_path / "tokenizer.json", 3_000_000_000)
    with refused(UnsupportedModelError, "no-tokenizer"):
        load_tokenizer(tmp_path)


# answers of several tokens


def test_answers_of_several_tokens_are_paths(tmp_path: Path) -> None:
    assert paths(save(tmp_path, PLAIN), "12", "13", "2") == ["1 2", "1 3", "2"]


def test_an_answer_that_is_the_start_of_another_ends_with_the_turn(tmp_path: Path) -> None:
    assert paths(save(tmp_path, PLAIN), "1", "10", "2") == ["1 </s>", "1 0", "2"]


def test_the_end_of_a_turn_is_everything_up_to_its_mark(tmp_path: Path) -> None:
    save(tmp_path, PLAIN.replace("{{ m.content }}</s>", "{{ m.content }}.</s>\n"))
    assert paths(tmp_path, "1", "10") == ["1 . </s>", "1 0"]


def test_without_a_mark_the_end_of_a_turn_is_its_first_token(tmp_path: Path) -> None:
    save(tmp_path, PLAIN.replace("{{ m.content }}</s>", "{{ m.content }};\n"))
    assert paths(tmp_path, "1", "10") == ["1 ;", "1 0"]


def test_a_template_that_renders_past_turns_differently_ends_them_all_the_same(tmp_path: Path) -> None:
    assert paths(save(tmp_path, "{{ '<s>' if messages|length == 2 }}" + PLAIN), "1", "10") == ["1 </s>", "1 0"]


def test_answers_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    """The turn ends with 0, so that 1 and its end look like 10."""
    save(tmp_path, PLAIN.replace("{{ m.content }}</s>", "{{ m.content }}0\n"))
    with refused(UnsupportedModelError, "ambiguous-answers"):
        tokenize([Question(ASK, ("1", "10"))], tmp_path)


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=2, max_size=8, unique=True))
@settings(deadline=None, max_examples=25)
def test_no_answer_is_the_start_of_another(plain_folder: Path, answers: list[str]) -> None:
    """So the probabilities of answers add up to at most one."""
    found = [tuple(path.split()) for path in paths(plain_folder, *answers)]
    for path, answer in zip(found, answers, strict=True):
        assert "".join(path).removesuffix("</s>") == answer
        assert not any(other != path and other[: len(path)] == path for other in found)


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("plain"), PLAIN)


def test_answers_of_several_characters_and_one_token_are_supported(tmp_path: Path) -> None:
    assert ask(save(tmp_path, PLAIN, words=("10",)), "1", "10")[1] == ["1", "10"]


def test_an_answer_that_merges_with_the_prompt_is_refused(tmp_path: Path) -> None:
    save(tmp_path, PLAIN.replace("<bot>{%", "<bot>:{%").replace("{{ m.content }}", ":{{ m.content }}"), words=(":A",))
    assert ask(tmp_path, "B")[1] == ["B"]
    assert refused_answers(tmp_path, "A", "B") == ["A"]


def test_a_prompt_that_ends_in_a_space_is_refused_and_the_remedy_helps(tmp_path: Path) -> None:
    answered = PLAIN.replace("{{ m.content }}", "{{ ' ' if m.role == 'assistant' }}{{ m.content }}")
    save(tmp_path, answered.replace("<bot>{% endif", "<bot> {% endif"), spaced=True)
    (problem,) = refusals(tmp_path, "A")
    assert "space" in problem.remedy
    assert ask(save(tmp_path, answered, spaced=True), "A", "B")[1] == ["▁A", "▁B"]


def test_an_answer_that_merges_with_what_follows_is_refused(tmp_path: Path) -> None:
    save(tmp_path, PLAIN.replace("{{ m.content }}</s>", "{{ m.content }}.</s>"), words=("A.",))
    assert refused_answers(tmp_path, "A", "B") == ["A"]


def test_an_unknown_token_is_refused(tmp_path: Path) -> None:
    assert refused_answers(save(tmp_path, PLAIN), "é") == ["é"]


def test_three_refused_answers_are_reported(tmp_path: Path) -> None:
    assert refused_answers(save(tmp_path, PLAIN), "é", "ü", "ö", "ä", "1") == ["é", "ü", "ö"]


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    assert refusal_code(save(tmp_path, None)) == "no-chat-template"


def test_the_chat_template_may_be_the_processors(tmp_path: Path) -> None:
    (save(tmp_path, None) / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))
    assert load_tokenizer(tmp_path).chat_template == PLAIN
    assert ask(tmp_path, "A", "B") == ask(save(tmp_path / "other", PLAIN), "A", "B")


def test_a_tokenizer_in_a_folder_whose_name_is_not_utf8_names_the_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "caf\udce9"
    shutil.copytree(TINY / "posttrained", folder)
    with refused(UnsupportedModelError, "no-tokenizer") as caught:
        load_tokenizer(folder)
    assert "UTF-8" in caught.value.problems[0].remedy


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_tokenizer_that_needs_sentencepiece_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_installed: bool
) -> None:
    """Without the package, transformers takes the file for one in another format."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    monkeypatch.setattr(prompts, "find_spec", lambda _: is_installed or None)
    with refused(UnsupportedModelError, "no-tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert ("sentencepiece" in caught.value.problems[0].remedy) != is_installed


def test_a_tokenizer_has_its_chat_template_with_mistral_common_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With mistral-common installed, transformers reads Mistral's own format by default."""
    save(tmp_path, PLAIN)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    monkeypatch.setitem(tokenization_auto.TOKENIZER_MAPPING_NAMES, "mistral", "MistralCommonBackend")
    asked: list[object] = []
    monkeypatch.setattr(
        tokenization_auto, "_use_mistral_format", lambda *_, mistral_format=None, **__: asked.append(mistral_format)
    )
    assert load_tokenizer(tmp_path).chat_template == PLAIN
    assert asked == [False]


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
    monkeypatch.setattr(prompts, "RENDERING_S", 0.2)
    assert refusal_code(save(tmp_path, template)) == "chat-template-fails"


def test_a_time_limit_that_ends_while_a_template_fails_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def late(_: float) -> Iterator[None]:
        yield
        raise TimeLimitError

    monkeypatch.setattr(prompts, "time_limit", late)
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
    monkeypatch.setattr(prompts, "RENDERING_S", 0.05)
    with refused(UnsupportedModelError, "chat-template-fails") as caught:
        render(SimpleNamespace(apply_chat_template=fail_late, name_or_path="x"), "Name a city.")
    error = caught.value
    assert resource.getrlimit(resource.RLIMIT_AS) == before, error


def test_a_tokenizer_that_cannot_decode_is_reported() -> None:
    def fail(*_: object, **__: object) -> str:
        raise OverflowError("out of range")

    with refused(UnsupportedModelError, "tokenizer-fails"):
        prompts.decode(SimpleNamespace(decode=fail, name_or_path="x"), [1])


@pytest.mark.parametrize("template", [5, {"default": 5}])
def test_a_chat_template_that_is_not_text_is_reported(tmp_path: Path, template: object) -> None:
    config_file = save(tmp_path, None) / "tokenizer_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"chat_template": template}))
    assert refusal_code(tmp_path) == "chat-template-fails"


@pytest.mark.parametrize(
    ("part", "value", "code"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "no-tokenizer"),  # a panic
        ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "missing"}, "tokenizer-fails"),
    ],
)
def test_a_tokenizer_that_fails_is_reported(tmp_path: Path, part: str, value: object, code: str) -> None:
    file = save(tmp_path, PLAIN) / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: value}))
    assert refusal_code(tmp_path) == code


UNKNOWN_KIND = '{"version": "1.0", "added_tokens": [], "model": {"type": "Rumour"}}'


@pytest.mark.parametrize("content", [None, "{", "{}", UNKNOWN_KIND])
def test_a_folder_without_a_valid_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    (problem,) = refusals(tmp_path, "A")
    assert problem.code == "no-tokenizer"
    assert "()" not in problem.what  # it has a reason, on one line
    assert "\n" not in problem.what


# log-probabilities of whole answers


def prompt_of(*contexts: Context, answers: tuple[tuple[tuple[int, int], ...], ...]) -> Prompt:
    return Prompt(contexts, answers)


def test_log_probs_of_single_token_answers_are_those_of_their_tokens(tmp_path: Path) -> None:
    save(tmp_path, PLAIN)
    prompts = tokenize([Question("1?", ("1", "2")), Question("A?", ("A", "B", "C"))], tmp_path)
    log_probs = np.log(np.random.default_rng(0).random((4, 2, 3)))
    log_probs[:, 0, 2] = np.nan
    assert np.array_equal(answer_log_probs(prompts, log_probs), log_probs, equal_nan=True)


def test_log_probs_of_an_answer_of_several_tokens_are_summed_along_its_path() -> None:
    """Answers 1, 10 and 12 after the prompt 7: the tokens 1; 1, 0; 1, 2. The second prompt has one context."""
    several = prompt_of(
        Context((7,), (1,)), Context((7, 1), (0, 2)), answers=(((0, 0),), ((0, 0), (1, 0)), ((0, 0), (1, 1)))
    )
    single = prompt_of(Context((8,), (1, 2)), answers=(((0, 0),), ((0, 1),)))
    assert [context.ids for context in contexts_of([several, single])] == [(7,), (7, 1), (8,)]
    probabilities = np.array([[[0.5, np.nan], [0.25, 0.5], [0.1, 0.2]], [[0.8, np.nan], [0.5, 0.1], [0.3, 0.4]]])
    found = np.exp(answer_log_probs([several, single], np.log(probabilities)))
    expected = [[[0.5, 0.125, 0.25], [0.1, 0.2, np.nan]], [[0.8, 0.4, 0.08], [0.3, 0.4, np.nan]]]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_log_probs_of_prompts_in_another_order_are_in_that_order() -> None:
    first = prompt_of(Context((1,), (1,)), Context((1, 1), (2,)), answers=(((0, 0), (1, 0)),))
    second = prompt_of(Context((3,), (4,)), answers=(((0, 0),),))
    log_probs = np.array([[[-1.0], [-2.0], [-4.0]]])
    assert answer_log_probs([first, second], log_probs).tolist() == [[[-3.0], [-4.0]]]
    assert answer_log_probs([second, first], log_probs).tolist() == [[[-1.0], [-6.0]]]
