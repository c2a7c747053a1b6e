"""Texts are read from the sample file when they are asked for."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from slrmerge.errors import OutputError
from slrmerge.evaluation.samples import REFUSED, Answer, SampleFile, SampleKey, Settings
from slrmerge.evaluation.texts import StoredTexts
from tests.problems import refused

SETTINGS = Settings("a-model", 1.0, 0.1, 64)
VERBALIZED = json.dumps({"answers": [{"text": "one"}, {"text": "two"}]})


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SampleFile]:
    with SampleFile(tmp_path / "samples.jsonl") as file:
        for number, text in enumerate(["größer", "", VERBALIZED]):
            for model in ("post", "slr"):
                file.append(SampleKey(model, "p", number), Answer(text, "stop"), SETTINGS)
        file.append(SampleKey("post", "p", 3), Answer("", REFUSED, "too long"), SETTINGS)
        yield file


def test_texts_are_those_of_the_model_and_the_prompt_in_order(file: SampleFile) -> None:
    texts = StoredTexts(file, "post", "p", requests=4, verbalized=None)
    assert list(texts) == ["größer", "", VERBALIZED, None]
    assert (len(texts), texts[0], texts[-1], texts[1:3]) == (4, "größer", None, ["", VERBALIZED])
    assert "größer" in texts
    assert "größer" in repr(texts)


def test_verbalized_replies_are_parsed_and_refusals_have_no_answers(file: SampleFile) -> None:
    texts = StoredTexts(file, "post", "p", requests=4, verbalized=2)
    assert list(texts) == [None, None, None, None, "one", "two", None, None]
    assert len(texts) == 8
    assert [texts[number] for number in (0, 4, 5, -3, -1)] == [None, "one", "two", "two", None]
    with pytest.raises(IndexError):
        texts[8]


def test_texts_can_be_read_when_the_file_is_closed_or_longer(file: SampleFile) -> None:
    texts = StoredTexts(file, "slr", "p", requests=3, verbalized=None)
    file.append(SampleKey("slr", "q", 0), Answer("another", "stop"), SETTINGS)
    expected = ["größer", "", VERBALIZED]
    assert list(texts) == expected
    file.__exit__()
    assert list(texts) == expected


@pytest.mark.parametrize("content", [b"", b"{}\n", None])
def test_a_file_that_was_changed_is_an_error(file: SampleFile, content: bytes | None) -> None:
    texts = StoredTexts(file, "slr", "p", requests=3, verbalized=None)
    if content is None:
        file.path.unlink()
    else:
        file.path.write_bytes(content)
    with refused(OutputError, "io-error" if content is None else "samples-changed"):
        list(texts)


def test_a_line_that_is_no_sample_is_an_error(file: SampleFile) -> None:
    lines = file.path.read_bytes().splitlines()
    file.path.write_bytes(b"".join(b"{}".ljust(len(line)) + b"\n" for line in lines))
    with refused(OutputError, "samples-changed"):
        list(StoredTexts(file, "slr", "p", requests=3, verbalized=None))


def test_a_sample_in_the_place_of_another_is_an_error(file: SampleFile) -> None:
    lines = file.path.read_bytes().splitlines(keepends=True)
    file.path.write_bytes(b"".join(lines[2:]) + b"".join(lines[:2]))
    with refused(OutputError, "samples-changed"):
        list(StoredTexts(file, "slr", "p", requests=3, verbalized=None))


def test_texts_are_not_held_in_memory(tmp_path: Path) -> None:
    """Ten million characters of samples, of which an open file keeps little."""
    import tracemalloc

    with SampleFile(tmp_path / "samples.jsonl") as file:
        for number in range(1000):
            file.append(SampleKey("post", str(number // 10), number % 10), Answer("x" * 10_000, "stop"), SETTINGS)
    gc.collect()
    tracemalloc.start()
    try:
        with SampleFile(tmp_path / "samples.jsonl") as file:
            texts = [StoredTexts(file, "post", str(prompt), requests=10, verbalized=None) for prompt in range(100)]
            count = sum(len(text or "") for each in texts for text in each)
            held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 10_000_000
    assert held < 1_000_000
