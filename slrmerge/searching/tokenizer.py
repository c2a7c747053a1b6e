"""A chat model's tokenizer: loaded without running its code, and failing with one error."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slrmerge.checkpoint.files import unreadable
from slrmerge.checkpoint.safetensors import read_json
from slrmerge.checkpoint.vocabulary import MAX_TOKENIZER_BYTES, TOKENIZER_NAME
from slrmerge.errors import Problem, UnsupportedModelError, first_line
from slrmerge.io.sizes import format_bytes


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The tokenizer of the chat model in `folder`. Raises UnsupportedModelError where it or its template is missing."""
    from transformers import AutoTokenizer

    file = Path(folder, TOKENIZER_NAME)
    if file.is_file() and file.stat().st_size > MAX_TOKENIZER_BYTES:  # loading it would take three times its size
        what = f"the tokenizer is larger than {format_bytes(MAX_TOKENIZER_BYTES)}"
        raise UnsupportedModelError(Problem("no-tokenizer", str(file), what, "download it again"))
    is_other_format = Path(folder, "tokenizer.model").is_file() and not file.is_file()
    is_lacking = is_other_format and not find_spec("sentencepiece")
    remedy = "pip install sentencepiece, which reads tokenizer.model" if is_lacking else ""
    if os.fsencode(folder).decode("utf-8", "replace") != os.fspath(folder):
        remedy = "rename the folder: tokenizers are only read from names that are UTF-8"
    with _translate_tokenizer_errors("no-tokenizer", str(folder), "the tokenizer cannot be loaded", remedy):
        tokenizer = AutoTokenizer.from_pretrained(
            folder,
            trust_remote_code=False,
            local_files_only=True,
            mistral_format=False,  # mistral-common, where it is installed, knows no chat templates
        )
    templates = tokenizer.chat_template = tokenizer.chat_template or _processor_template(Path(folder))
    if templates is None:
        what, remedy = "the tokenizer has no chat template", "add the chat_template that the model was trained with"
        raise UnsupportedModelError(Problem("no-chat-template", str(folder), what, remedy))
    named = templates if isinstance(templates, dict) else {"default": templates}
    if not all(isinstance(template, str) for template in named.values()):
        what, remedy = "the chat template is not text", "correct the model's chat template"
        raise UnsupportedModelError(Problem("chat-template-fails", str(folder), what, remedy))
    return tokenizer


def _processor_template(folder: Path) -> Any:
    """The chat template of an image-text model's processor, which its tokenizer may lack. Raises CheckpointError."""
    path = folder / "chat_template.json"
    try:
        return read_json(path).get("chat_template") if path.is_file() else None
    except OSError as error:
        raise unreadable(path, error) from error


@contextmanager
def _translate_tokenizer_errors(code: str, where: str, what: str, remedy: str) -> Iterator[None]:
    """Raise UnsupportedModelError for whatever a faulty tokenizer raises; a panic of its library is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        what = f"{what} ({type(error).__name__}: {first_line(error)})"
        raise UnsupportedModelError(Problem(code, where, what, remedy)) from error


@contextmanager
def tokenizing(tokenizer: Any) -> Iterator[None]:
    """Raise UnsupportedModelError where the tokenizer fails in the block."""
    where = str(tokenizer.name_or_path)
    with _translate_tokenizer_errors("tokenizer-fails", where, "the tokenizer fails", "download it again"):
        yield


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text. Raises UnsupportedModelError where the tokenizer fails."""
    with tokenizing(tokenizer):
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def decode(tokenizer: Any, ids: Sequence[int], **options: bool) -> str:
    """The text of tokens. Raises UnsupportedModelError where the tokenizer fails."""
    with tokenizing(tokenizer):
        text: str = tokenizer.decode(ids, **options)
    return text
