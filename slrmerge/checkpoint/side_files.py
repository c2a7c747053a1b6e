"""What belongs to a model besides its weights: config, tokenizer, chat templates, licence, code."""

import os
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

from slrmerge.checkpoint.files import LocalFile, SourceFile
from slrmerge.errors import CheckpointError, Problem, collect, raise_all

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
CARD_NAME = "README.md"

MANIFEST_NAME = "slrmerge.json"
RECIPE_NAME = "slrmerge.yaml"
"""Files that a merge writes itself."""

CHAT_TEMPLATE_FOLDERS = ("additional_chat_templates", "chat_templates")

COPIED_SUFFIXES = frozenset({".json", ".jinja", ".model", ".spm", ".tiktoken", ".txt", ".vocab", ".bpe"})
LOADED_SUFFIXES = COPIED_SUFFIXES | {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py"}
"""Suffixes of files that a loader may read from a model's folder."""

COPIED_STEMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
"""Terms of use belong to the weights, whatever their suffix."""

_NOT_COPIED = frozenset({MANIFEST_NAME, RECIPE_NAME, CARD_NAME, "adapter_config.json", "trainer_state.json"})

_COMMON_FILE = re.compile(
    r"((generation|preprocessor|video_preprocessor|processor|quantize|quantization)_)?config\.json"
    r"|(model|pytorch_model|consolidated)([-.]\d+(-of-\d+)?)?\.(safetensors|bin)(\.index\.json)?"
    r"|(tokenizer(_config)?|special_tokens_map|added_tokens|vocab|merges|tekken|chat_template|spiece|sentencepiece\.bpe"
    r"|qwen)\.(json|jinja|txt|model|model\.v\d+|bpe|spm|tiktoken|vocab)"
    r"|(modeling|configuration|tokenization|processing|image_processing)_\w+\.py"
    r"|(README|LICEN[CS]E|NOTICE|USE_POLICY|COPYING)(\.(md|txt))?"
    r"|(additional_)?chat_templates/[^/]+\.jinja"
    r"|slrmerge\.yaml|mergekit_config\.yml|\.gitattributes|\.cache/huggingface"
)

_TOKENIZER_STEMS = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "tekken", "chat_template")
_TOKENIZER_SUFFIXES = frozenset({".model", ".spm", ".tiktoken", ".vocab", ".bpe", ".jinja"})


def local_side_files(folder: Path) -> dict[str, SourceFile]:
    """The side files in a folder, code included, by name.

    Raises CheckpointError with every one that is not a regular file or that a link leads out of the checkpoint to
    (see `open_within`), the model card included; OSError.
    """
    names = [path.name for path in folder.iterdir() if not _is_other_folder(path)]
    problems: list[Problem] = []
    for inner in (folder / name for name in CHAT_TEMPLATE_FOLDERS):
        if inner.is_dir():
            names += [f"{inner.name}/{path.name}" for path in inner.iterdir() if not _is_other_folder(path)]
        elif os.path.lexists(inner):
            problems.append(Problem("not-a-folder", str(inner), "is not a folder", "replace it, or move it away"))
    files: dict[str, SourceFile] = {}
    for name in (*select_side_files(names), *{CARD_NAME}.intersection(names)):
        if file := collect(problems, partial(LocalFile.within, folder, name), None):
            files[name] = file
    raise_all(problems, CheckpointError)
    files.pop(CARD_NAME, None)
    return files


def select_side_files(names: Iterable[str]) -> list[str]:
    """Those of a repository's or folder's files that are side files, sorted."""
    return sorted(filter(_is_side_file, names))


def is_code(name: str) -> bool:
    return PurePosixPath(name).suffix == ".py"


def is_tokenizer_file(name: str) -> bool:
    """Whether a side file belongs to the tokenizer or is a chat template."""
    path = PurePosixPath(name)
    in_folder = path.parent.name in CHAT_TEMPLATE_FOLDERS
    return in_folder or path.name.startswith(_TOKENIZER_STEMS) or path.suffix in _TOKENIZER_SUFFIXES


def is_common_file(name: str) -> bool:
    """Whether this is the name of a file that checkpoints have, and not of someone's notes or logs."""
    return _COMMON_FILE.fullmatch(name) is not None


def fetch_side_files(side_files: Mapping[str, SourceFile]) -> None:
    """Download side files that are on the Hub into its cache. Raises HubError."""
    for file in side_files.values():
        file.fetch()


def _is_other_folder(path: Path) -> bool:
    """Whether a path is a folder that has not the name of a file, such as `LICENSES` or `onnx`."""
    return path.is_dir() and not path.suffix and path.name.upper() not in (*COPIED_STEMS, CARD_NAME.upper())


def _is_side_file(name: str) -> bool:
    path = PurePosixPath(name)
    if str(path.parent) not in (".", *CHAT_TEMPLATE_FOLDERS):
        return False
    if is_code(name):
        return True
    if path.name in _NOT_COPIED or path.name.startswith(".") or path.name.endswith(".index.json"):
        return False
    return path.suffix in COPIED_SUFFIXES or path.name.upper().startswith(COPIED_STEMS)
