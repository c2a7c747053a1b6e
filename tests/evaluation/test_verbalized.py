"""Several answers in one call: what is asked for, and what of a reply counts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slrmerge.evaluation.texts import parse_verbalized, verbalize

SOUND = '{"answers": [{"text": "Ohio", "probability": 0.5}, {"text": "Utah", "probability": 0.25}]}'


def test_the_prompt_holds_the_question_the_count_and_the_form() -> None:
    assert verbalize("Name a state. {x}", 4) == (
        "Name a state. {x}\n\n"
        "Do not give one answer but 4 different ones, as you would if you were asked again and again, and with each "
        "the probability that you would give it. Reply with JSON in this form and with nothing else:\n"
        '{"answers": [{"text": "…", "probability": 0.0}, …]}'
    )


@pytest.mark.parametrize(
    ("reply", "answers"),
    [
        (SOUND, ["Ohio", "Utah"]),
        (f"Sure!\n```json\n{SOUND}\n```\nHope [this] helps {{:}}", ["Ohio", "Utah"]),
        (f"As in [1]: {SOUND}", ["Ohio", "Utah"]),
        ('[{"text": "Ohio", "probability": 1}]', ["Ohio", None]),
        ('{"answers": [{"text": "Ohio", "probability": 0.5}]}', ["Ohio", None]),
        ('{"answers": [{"text": "Ohio"}, {"text": "Utah", "probability": "50%"}]}', ["Ohio", "Utah"]),
        ('{"answers": [{"text": 3, "probability": 0.5}, "Utah"]}', [None, None]),
        ('{"answers": "Ohio"}', [None, None]),
        ('{"text": "Ohio"}\n{"text": "Utah"}', ["Ohio", "Utah"]),
        (SOUND[:-5], ["Ohio", None]),
        ('{"answers": [{"text": "…", "probability": 0.0}, …]}', [None, None]),
        (SOUND.replace("}]}", '}, {"text": "Iowa", "probability": 0.1}]}'), ["Ohio", "Utah"]),
        ("Ohio, Utah", [None, None]),
        ("", [None, None]),
        ("[" * 5000, [None, None]),
    ],
)
def test_what_counts_of_a_reply(reply: str, answers: list[str | None]) -> None:
    assert parse_verbalized(reply, 2) == answers


@pytest.mark.parametrize("unit", ["[x", "{", '["', '{"a": [', "{}"])
def test_a_reply_of_200_000_characters_is_parsed_in_linear_time(unit: str) -> None:
    assert parse_verbalized(unit * (200_000 // len(unit)), 2) == [None, None]


@given(st.text(), st.integers(1, 6))
def test_there_are_always_as_many_as_were_asked_for(reply: str, count: int) -> None:
    assert len(parse_verbalized(reply, count)) == count


@given(st.lists(st.tuples(st.text(), st.floats(0, 1)), min_size=1, max_size=6), st.text(alphabet="abc .:!\n`"))
def test_what_is_in_the_form_is_read_whole(answers: list[tuple[str, float]], around: str) -> None:
    values = [{"text": text, "probability": probability} for text, probability in answers]
    reply = around + json.dumps({"answers": values}) + around
    assert parse_verbalized(reply, len(answers)) == [text for text, _ in answers]


def test_a_reply_that_would_take_minutes_to_read_is_given_up() -> None:
    nested = ("[" + "0," * 2500) * 400  # from each bracket, all of the rest would be read in vain
    assert parse_verbalized(f"{nested[:20_000]} {SOUND}", 2) == ["Ohio", "Utah"]
    assert parse_verbalized(f"{nested} {SOUND}", 2) == [None, None]
