"""Questions reach the model as they are meant: in its chat template, with the date, in known tokens."""

import json

import pytest

from slrmerge.checkpoint.pair import ModelPair
from slrmerge.errors import UnsupportedModelError
from slrmerge.searching.results_folder import read_result
from tests.merging.faults import Stop, leftovers, snapshot, stop
from tests.problems import refused
from tests.searching.pairs import ALL, ALL_STAGES, TEMPLATE, SmallPair, Watcher, hurried


def spoil_template(pair: SmallPair, template: str) -> None:
    (pair.folder / "post" / "chat_template.jinja").write_text(template)


DATED = "{{ 'integer' if strftime_now('%d') == '07' else 'letter' }}" + TEMPLATE


@hurried
@pytest.mark.parametrize("code", ["question-not-in-prompt", "open-thinking"])
def test_a_wrong_prompt_is_refused_before_anything_is_downloaded_or_written(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    changed = {
        "question-not-in-prompt": TEMPLATE.replace("message.content", "message.text"),
        "open-thinking": TEMPLATE.replace("<|assistant|>{%", "<|assistant|><think>{%"),
    }
    spoil_template(small, changed[code])
    downloads: list[object] = []
    monkeypatch.setattr(ModelPair, "download", lambda *args, **_: downloads.append(args))
    for attempt in (lambda: small.run(), lambda: small.search().estimate()):
        with refused(UnsupportedModelError, code):
            attempt()
    assert downloads == []
    assert leftovers(small.out) == []


@hurried
def test_a_token_without_a_row_in_the_embedding_is_refused(small: SmallPair) -> None:
    path = small.folder / "post" / "tokenizer.json"
    content = json.loads(path.read_bytes())
    content["model"]["vocab"]["integer"] = 9999
    path.write_text(json.dumps(content))
    with refused(UnsupportedModelError, "token-without-embedding"):
        small.search().estimate()


@hurried
def test_the_summary_has_a_prompt_and_the_date_in_it(small: SmallPair) -> None:
    spoil_template(small, DATED)
    result = small.run(spaces=(), date="2025-03-07")
    assert (result.date, result.prompt[:21]) == ("2025-03-07", "integer<|user|>Genera")
    summary = json.loads((small.out / "summary.json").read_bytes())
    assert (summary["date"], summary["prompt"]) == (result.date, result.prompt)
    assert read_result(small.out).summary() == result.summary()


@hurried
def test_a_search_that_resumes_on_another_day_keeps_its_date(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_template(small, DATED)
    with pytest.raises(Stop):
        small.run(progress=Watcher(3, stop), date="2025-03-07")
    again = Watcher()
    result = small.run(progress=again)
    assert (result.date, len(again.stages)) == ("2025-03-07", ALL_STAGES - 2)
    assert sorted(snapshot(small.out) or {}) == ALL


@hurried
def test_another_date_starts_a_search_anew(small: SmallPair) -> None:
    spoil_template(small, DATED)
    with pytest.raises(Stop):
        small.run(progress=Watcher(3, stop), date="2025-03-07")
    again = Watcher()
    assert small.run(progress=again, date="2025-03-08").date == "2025-03-08"
    assert len(again.stages) == ALL_STAGES
