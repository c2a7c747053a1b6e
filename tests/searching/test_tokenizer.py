"""Tokenizers that cannot be used are refused with their reason."""

import json
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers.models.auto import tokenization_auto

from slrmerge.errors import UnsupportedModelError
from slrmerge.searching import tokenizer
from slrmerge.searching.tokenizer import encode, load_tokenizer
from tests.conftest import TINY
from tests.problems import refused
from tests.searching.chat_models import PLAIN, ask, refusal_code, refusals, save


def test_a_tokenizer_that_is_no_tokenizer_by_its_size_is_not_loaded(tmp_path: Path) -> None:
    save(tmp_path, PLAIN)
    os.truncate(tmp_path / "tokenizer.json", 3_000_000_000)
    with refused(UnsupportedModelError, "no-tokenizer"):
        load_tokenizer(tmp_path)


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
    monkeypatch.setattr(tokenizer, "find_spec", lambda _: is_installed or None)
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


def test_a_tokenizer_that_cannot_decode_is_reported() -> None:
    def fail(*_: object, **__: object) -> str:
        raise OverflowError("out of range")

    with refused(UnsupportedModelError, "tokenizer-fails"):
        tokenizer.decode(SimpleNamespace(decode=fail, name_or_path="x"), [1])


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


def test_a_text_that_is_longer_than_a_model_reads_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    """It is an error, or a note of a refused prompt, in our own words."""
    loaded = load_tokenizer(TINY / "posttrained")
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert len(encode(loaded, "Name a colour. " * 60)) > loaded.model_max_length
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.records == []
