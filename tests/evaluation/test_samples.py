"""A file of samples: whole lines, in any order, never for other settings."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slrmerge.errors import NoSpaceError, OutputError
from slrmerge.evaluation import lines, samples
from slrmerge.evaluation.samples import REFUSED, Answer, SampleFile, SampleKey, Settings, seed_of
from tests.problems import refused

SETTINGS = Settings("a-model", 1.0, 0.1, 64, seed=5)
VALID = json.dumps(
    {
        "model": "a",
        "prompt": "p",
        "sample": 0,
        "seed": 1,
        "settings": SETTINGS._asdict(),
        "text": "x",
        "finish_reason": "stop",
    }
)
KEY, ANSWER = SampleKey("post", "p1", 0), Answer("Ohio\n“Utah”", "stop")


def append(file: SampleFile, key: SampleKey = KEY, answer: Answer = ANSWER, settings: Settings = SETTINGS) -> None:
    file.append(key, answer, settings)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "samples.jsonl"


def test_a_line_holds_everything_that_a_sample_depends_on(path: Path) -> None:
    with SampleFile(path) as file:
        append(file)
    settings = {
        "model_id": "a-model",
        "temperature": 1.0,
        "min_p": 0.1,
        "max_tokens": 64,
        "seed": 5,
        "verbalized": None,
        "dtype": None,
    }
    assert json.loads(path.read_text()) == {
        "model": "post", "prompt": "p1", "sample": 0, "seed": seed_of(5, "p1", 0), "settings": settings,
        "text": "Ohio\n“Utah”", "finish_reason": "stop",
    }  # fmt: skip


@pytest.mark.parametrize("content", [b"", b'{"model": "po'])
def test_a_file_without_samples_is_removed_in_the_end(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with SampleFile(path) as file:
        assert len(file) == 0
    assert not path.exists()


def test_a_refusal_keeps_its_error(path: Path) -> None:
    refusal = Answer("", REFUSED, "rejected the request (too long)")
    with SampleFile(path) as file:
        append(file, answer=refusal)
    assert json.loads(path.read_text())["error"] == refusal.error
    with SampleFile(path) as file:
        assert file.answer(KEY) == refusal
        assert file.answer(KEY).is_refusal
    assert not ANSWER.is_refusal


def test_samples_are_read_when_the_file_is_opened_again(path: Path) -> None:
    with SampleFile(path) as file:
        append(file)
    with SampleFile(path) as file:
        other = KEY._replace(sample=1)
        assert file.missing([KEY, other]) == [other]
        assert file.answer(KEY) == ANSWER
        assert len(file) == 1


def test_samples_without_a_dtype_are_those_of_float32(path: Path) -> None:
    with SampleFile(path) as file:
        append(file)
    line = json.loads(path.read_text())
    assert line["settings"].pop("dtype") is None
    path.write_text(json.dumps(line) + "\n")
    with SampleFile(path) as file:
        file.require_same([KEY], SETTINGS)
        with refused(OutputError, "settings-changed"):
            file.require_same([KEY], SETTINGS._replace(dtype="bfloat16"))


@given(st.text(), st.integers(0, 400))
def test_cut_off_anywhere_it_holds_the_whole_lines_and_takes_the_rest_again(text: str, cut: int) -> None:
    with TemporaryDirectory() as folder:
        _cut_off(Path(folder) / "samples.jsonl", text, cut)


def _cut_off(path: Path, text: str, cut: int) -> None:
    keys = [KEY._replace(sample=number) for number in range(3)]
    with SampleFile(path) as file:
        for key in keys:
            append(file, key, Answer(text, "stop"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    with SampleFile(path) as file:
        for key in file.missing(keys):
            append(file, key, Answer(text, "stop"))
    with SampleFile(path) as file:
        assert not file.missing(keys)
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize(
    ("change", "described"),
    [
        ({"temperature": 1.5}, "temperature 1.0, now 1.5"),
        ({"min_p": 0.0, "max_tokens": 32}, "min_p 0.1, now 0.0, max_tokens 64, now 32"),
        ({"model_id": "another"}, "model_id a-model, now another"),
        ({"verbalized": 4}, "verbalized None, now 4"),
        ({"seed": 6}, "seed 5, now 6"),
    ],
)
def test_samples_with_other_settings_are_refused(path: Path, change: dict[str, Any], described: str) -> None:
    with SampleFile(path) as file:
        append(file)
        file.require_same([KEY, KEY._replace(model="slr")], SETTINGS)
        with refused(OutputError, "settings-changed") as caught:
            file.require_same([KEY._replace(sample=7), KEY], SETTINGS._replace(**change))
    (problem,) = caught.value.problems
    assert problem.where == str(path)
    assert f"({described})" in problem.what


@pytest.mark.parametrize(
    "line",
    [
        "",
        "3",
        "{}",
        "[1]",
        '{"model": "post"}',
        "nonsense",
        '{"settings": {"more": 1}}',
        "\x00",
        "[" * 100_000,
        VALID.replace('"sample": 0', '"sample": 1e400'),
        VALID.replace('"sample": 0', '"sample": 1.5'),
        VALID.replace('"sample": 0', '"sample": NaN'),
        VALID.replace('"sample": 0', '"sample": true'),
        VALID.replace('"text": "x"', '"text": null'),
        VALID.replace('"text": "x"', '"text": "\\ud800"'),
        VALID.replace('"temperature": 1.0', '"temperature": [1]'),
        VALID.replace('"min_p": 0.1, ', ""),
        VALID.replace('"text"', '"model"'),
    ],
    ids=lambda line: repr(line[:200]),
)
def test_an_invalid_line_is_named(path: Path, line: str) -> None:
    with SampleFile(path) as file:
        append(file)
    path.write_text(path.read_text() + line + "\n")
    with refused(OutputError, "not-a-sample") as caught:
        SampleFile(path)
    assert caught.value.problems[0].where == f"{path}:2"


def test_all_invalid_lines_are_named_up_to_ten(path: Path) -> None:
    path.write_text(f"{VALID}\nx\n{VALID}\n" + "y\n" * 20 + "an incomplete line")
    before = path.read_bytes()
    with refused(OutputError, "not-a-sample") as caught:
        SampleFile(path)
    assert [problem.where for problem in caught.value.problems] == [f"{path}:{line}" for line in (2, *range(4, 13))]
    assert path.read_bytes() == before


def test_a_line_without_end_is_not_read_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lines, samples):
        monkeypatch.setattr(module, "MAX_LINE_BYTES", 1000)
    path.write_text(f"{VALID}\n" + "x" * 5000)
    with refused(OutputError, "not-a-sample") as caught:
        SampleFile(path)
    assert caught.value.problems[0].where == f"{path}:2"


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_regular_file_is_refused(path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with refused(OutputError, "not-a-file"):
        SampleFile(path)


@pytest.mark.parametrize("content", [b"a token without an end of line", b"", None])
def test_a_link_is_not_written_through(path: Path, content: bytes | None) -> None:
    target = path.with_name("target")
    if content is not None:
        target.write_bytes(content)
    path.symlink_to(target)
    with refused(OutputError, "not-a-file"):
        SampleFile(path)
    assert (target.read_bytes() if target.exists() else None) == content


def test_half_a_letter_is_kept_as_a_question_mark_and_read_again(path: Path) -> None:
    with SampleFile(path) as file:
        append(file, KEY, Answer("a\ud83d", "b\udc00"))
        assert file.answer(KEY) == Answer("a?", "b?")
    with SampleFile(path) as file:
        assert file.answer(KEY) == Answer("a?", "b?")


def fill(file: SampleFile) -> None:
    for number in range(1000):
        append(file, KEY._replace(sample=number), Answer("x" * 1000, "length"))


def test_a_full_disk_leaves_whole_lines_only(small_disk: Path) -> None:
    path = small_disk / "samples.jsonl"
    with SampleFile(path) as file:
        with refused(NoSpaceError, "no-space") as caught:
            fill(file)
        kept = len(file)
    assert caught.value.problems[0].where == str(path)
    assert kept > 10
    assert path.read_bytes().endswith(b"}\n")
    with SampleFile(path) as file:
        assert len(file) == kept


def test_a_folder_instead_of_a_file_is_refused(path: Path) -> None:
    path.mkdir()
    with refused(OutputError, "io-error"):
        SampleFile(path)


@given(st.integers(0, 2**40), st.text(), st.integers(0, 10**6))
def test_a_seed_has_31_bits_and_depends_on_all_three(seed: int, prompt: str, sample: int) -> None:
    found = seed_of(seed, prompt, sample)
    assert 0 <= found < 2**31
    assert len({found, seed_of(seed + 1, prompt, sample), seed_of(seed, prompt, sample + 1)}) == 3
