"""Tokenizers of single characters with chat templates, and what questions become with them."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from slrmerge.errors import Problem, UnsupportedModelError
from slrmerge.searching.prompts import tokenize
from slrmerge.searching.proxy_tasks import Question

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
