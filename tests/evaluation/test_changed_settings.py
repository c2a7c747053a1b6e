"""Samples that were requested with other settings are refused, before anything is requested."""

from typing import Any

import pytest

from slrmerge.errors import OutputError
from tests.evaluation.openai_server import MODELS
from tests.evaluation.work import ALL, SAMPLES, Work, held
from tests.problems import refused

CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"temperature": 0.5}, "temperature 1.0, now 0.5"),
    "max_tokens": ({"max_tokens": 8}, "max_tokens 64, now 8"),
    "min_p": ({"min_p": 0.0}, "min_p 0.1, now 0.0"),
    "verbalized": ({"verbalized": SAMPLES}, f"max_tokens 64, now 1024, verbalized None, now {SAMPLES}"),
    "two": ({"temperature": 0.0, "min_p": 0.0}, "temperature 1.0, now 0.0, min_p 0.1, now 0.0"),
    "seed": ({"seed": 1}, "seed 0, now 1"),
}


def refuses_settings(work: Work, change: str, **options: Any) -> None:
    """The evaluation is refused because of this change, without a note that running again continues."""
    with refused(OutputError, "settings-changed") as caught:
        work.evaluate(**options)
    (problem,) = caught.value.problems
    assert problem.where == str(work.out / "samples.jsonl")
    assert f"({change})" in problem.what
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("changed", CHANGES)
def test_samples_with_other_settings_are_refused(work: Work, changed: str) -> None:
    options, change = CHANGES[changed]
    work.evaluate()
    requests, file = len(work.server.requests), (work.out / "samples.jsonl").read_bytes()
    refuses_settings(work, change, **options)
    assert len(work.server.requests) == requests
    assert (work.out / "samples.jsonl").read_bytes() == file
    assert work.asked() == []  # the earlier settings still work


@pytest.mark.parametrize("changed", CHANGES)
def test_nothing_is_requested_with_other_settings_where_some_is_missing(work: Work, changed: str) -> None:
    options, change = CHANGES[changed]
    work.stop_after(ALL - 1)
    before = len(work.server.asked)
    refuses_settings(work, change, **options)
    assert len(work.server.asked) == before
    assert len(held(work.out)) == ALL - 1


def test_samples_of_another_model_with_the_same_label_are_refused(work: Work) -> None:
    work.evaluate()
    requests = len(work.server.requests)
    refuses_settings(work, "model_id m, now n", models={"post": work.at("n")})
    assert len(work.server.requests) == requests
    work.server.models = ["n"]  # another model, started at the same address
    refuses_settings(work, "model_id m, now n", models={"post": work.server.url})
    assert [request.path for request in work.server.requests[requests:]] == [MODELS]


def test_nothing_is_requested_where_a_later_model_has_other_settings(work: Work) -> None:
    work.evaluate()
    before = len(work.server.asked)
    models = {"new": work.at("n"), "post": work.at("m")}
    refuses_settings(work, "temperature 1.0, now 0.5", models=models, temperature=0.5)
    assert len(work.server.asked) == before
