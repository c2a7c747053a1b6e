"""From questions to tokens, through templates and tokenizers that have traps; right ids, or the refusal in full."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from slrmerge.chat import tokenise
from slrmerge.crc import Question
from slrmerge.errors import UnsupportedModelError

ASK = "Pick A or B."
REMEDY = "ask another task, or a model that answers at once"
MARKS = ("<s>", "</s>", "<user>", "<bot>", "<think>", "</think>", "[INST]", "[/INST]")

PLAIN = "{% for m in messages %}<{{ 'bot' if m.role == 'assistant' else 'user' }}>{{ m.content }}</s>{% endfor %}"
PLAIN += "{% if add_generation_prompt %}<bot>{% endif %}"


def save(
    folder: Path, template: str | None, *, words: tuple[str, ...] = (), spaced: bool = False, bos: bool = False
) -> Path:
    """A tokenizer of single characters, the `words`, and the MARKS; `spaced` ones see " A" as one word, "▁A"."""
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

    (prompt,) = tokenise([Question(text, answers)], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = tokenizer.convert_ids_to_tokens
    return read(list(prompt.ids)), read(list(prompt.valid_ids))


def refusal(folder: Path, *answers: str) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        tokenise([Question(ASK, answers)], folder)
    return str(caught.value)


def test_a_prompt_is_the_question_and_the_start_of_the_answer(tmp_path: Path) -> None:
    assert ask(save(tmp_path, PLAIN), "A", "B") == (["<user>", *ASK, "</s>", "<bot>"], ["A", "B"])


def test_every_question_gets_a_prompt_in_turn(tmp_path: Path) -> None:
    save(tmp_path, PLAIN)
    questions = [Question("1?", ("1", "2")), Question("A?", ("A", "B", "C"))]
    prompts = tokenise(questions, tmp_path)
    assert [len(prompt.ids) for prompt in prompts] == [5, 5]
    assert [len(prompt.valid_ids) for prompt in prompts] == [2, 3]
    assert prompts[0].ids != prompts[1].ids
    assert prompts == [tokenise([question], tmp_path)[0] for question in questions]


def test_nothing_is_put_before_what_the_template_says(tmp_path: Path) -> None:
    """A tokenizer that would start every text with <s> has it from the template, once."""
    prompt, _ = ask(save(tmp_path, "<s>" + PLAIN, bos=True), "A")
    assert prompt == ["<s>", "<user>", *ASK, "</s>", "<bot>"]


SPACED = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def test_a_space_that_was_taught_before_the_answer_belongs_to_its_token(tmp_path: Path) -> None:
    prompt, valid = ask(save(tmp_path, SPACED, spaced=True), "A", "B")
    assert prompt[-1] == "[/INST]"
    assert valid == ["▁A", "▁B"]


def test_without_a_taught_space_the_answer_has_none(tmp_path: Path) -> None:
    _, valid = ask(save(tmp_path, SPACED.replace("%} {{", "%}{{"), spaced=True), "A", "B")
    assert valid == ["A", "B"]


def test_a_space_that_is_a_token_of_its_own_is_refused(tmp_path: Path) -> None:
    what = "is not a single token after the chat template; the first is ' '"
    assert refusal(save(tmp_path, SPACED), "A", "B") == (
        f"{tmp_path}: the answer 'A' {what}; {REMEDY}\n{tmp_path}: the answer 'B' {what}; {REMEDY}"
    )


@pytest.mark.parametrize("end", ["\n", "\n\n", ": "])
def test_what_the_generation_prompt_ends_with_is_kept(tmp_path: Path, end: str) -> None:
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


def test_a_template_that_shows_past_turns_otherwise_is_asked_without_them(tmp_path: Path) -> None:
    assert ask(save(tmp_path, "{{ '<s>' if messages|length == 2 }}" + PLAIN), "A", "B") == (
        ["<user>", *ASK, "</s>", "<bot>"],
        ["A", "B"],
    )


def test_a_model_that_was_taught_to_think_first_is_refused(tmp_path: Path) -> None:
    template = PLAIN.replace("{{ m.content }}", "{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}")
    what = "the answer 'A' is not a single token after the chat template; the first is '<think>'"
    assert refusal(save(tmp_path, template), "A") == f"{tmp_path}: {what}; {REMEDY}"


def test_answers_of_several_tokens_are_refused(tmp_path: Path) -> None:
    what = "the answer '10' is not a single token after the chat template; the first is '1'"
    assert refusal(save(tmp_path, PLAIN), "1", "10") == f"{tmp_path}: {what}; {REMEDY}"


def test_answers_of_several_characters_that_are_one_token_are_fine(tmp_path: Path) -> None:
    assert ask(save(tmp_path, PLAIN, words=("10",)), "1", "10")[1] == ["1", "10"]


def test_an_answer_that_melts_into_the_prompt_is_refused(tmp_path: Path) -> None:
    save(tmp_path, PLAIN.replace("<bot>{%", "<bot>:{%").replace("{{ m.content }}", ":{{ m.content }}"), words=(":A",))
    what = "the answer 'A' changes the tokens of the prompt before it"
    assert ask(tmp_path, "B")[1] == ["B"]
    assert refusal(tmp_path, "A", "B") == f"{tmp_path}: {what}; {REMEDY}"


def test_an_answer_that_melts_into_what_follows_it_is_refused(tmp_path: Path) -> None:
    save(tmp_path, PLAIN.replace("{{ m.content }}</s>", "{{ m.content }}.</s>"), words=("A.",))
    what = "the answer 'A' is not a single token after the chat template; the first is 'A.'"
    assert refusal(tmp_path, "A", "B") == f"{tmp_path}: {what}; {REMEDY}"


def test_an_answer_that_the_tokenizer_does_not_know_is_refused(tmp_path: Path) -> None:
    what = "the answer 'é' is not a single token after the chat template; the first is '<unk>'"
    assert refusal(save(tmp_path, PLAIN), "é") == f"{tmp_path}: {what}; {REMEDY}"


def test_of_many_refused_answers_three_are_named(tmp_path: Path) -> None:
    said = refusal(save(tmp_path, PLAIN), "10", "11", "12", "13", "1")
    assert [line.split("'")[1] for line in said.splitlines()] == ["10", "11", "12"]


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    assert refusal(save(tmp_path, None), "A") == (
        f"{tmp_path}: its tokenizer has no chat template, so how to ask is not known; "
        "add the chat_template that the model was trained with"
    )


def test_a_chat_template_that_refuses_the_question_is_an_error_with_its_reason(tmp_path: Path) -> None:
    save(tmp_path, "{{ raise_exception('a system turn is needed') }}")
    with pytest.raises(UnsupportedModelError) as caught:
        tokenise([Question(ASK, ("A",))], tmp_path)
    assert "a system turn is needed" in str(caught.value)


def test_a_chat_template_that_fails_in_its_own_way_is_an_error_too(tmp_path: Path) -> None:
    said = refusal(save(tmp_path, "{{ messages + 1 }}"), "A")
    assert said.startswith(f"{tmp_path}: its chat template cannot be used (")


UNKNOWN_KIND = '{"version": "1.0", "added_tokens": [], "model": {"type": "Rumour"}}'


@pytest.mark.parametrize("content", [None, "{", "{}", UNKNOWN_KIND])
def test_a_folder_without_a_sound_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    said = refusal(tmp_path, "A")
    assert said.startswith(f"{tmp_path}: its tokenizer cannot be loaded (")
    assert "()" not in said
    assert "\n" not in said
