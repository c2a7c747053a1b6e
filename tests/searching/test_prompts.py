"""Questions become the right tokens, or are refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slrmerge.errors import UnsupportedModelError
from slrmerge.searching.prompts import Prompt, answer_log_probs, contexts_of, tokenize
from slrmerge.searching.proxy_tasks import TASKS, Question
from slrmerge.searching.sweep.trie import Context
from slrmerge.searching.tokenizer import load_tokenizer
from tests.problems import refused
from tests.searching.chat_models import ASK, PLAIN, ask, paths, refusals, refused_answers, save


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


def test_questions_with_the_same_tokens_are_refused(tmp_path: Path) -> None:
    save(tmp_path, PLAIN)
    with refused(UnsupportedModelError, "prompts-alike"):
        tokenize([Question("é?", ("A", "B")), Question("ü?", ("A", "B"))], tmp_path)


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
