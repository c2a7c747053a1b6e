"""What belongs to a model besides its weights: config, tokenizer, chat templates, licence, code."""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath

from slrmerge.checkpoint.files import LocalFile, SourceFile, open_within
from slrmerge.errors import CheckpointError, Problem, collect, raise_all
from slrmerge.io.names import is_inside
from slrmerge.io.sizes import shorten
from slrmerge.io.strict_json import InvalidJsonError, parse_json

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTER_PICKLE_NAME = "adapter_model.bin"

MANIFEST_NAME = "slrmerge.json"
RECIPE_NAME = "slrmerge.yaml"
"""Files that a merge writes itself."""

CHAT_TEMPLATE_FOLDERS = ("additional_chat_templates", "chat_templates")

COPIED_SUFFIXES = frozenset({".json", ".jinja", ".model", ".spm", ".tiktoken", ".txt", ".vocab", ".bpe"})
LOADED_SUFFIXES = COPIED_SUFFIXES | {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py"}
"""Suffixes of files that a loader may read from a model's folder."""

MODULES_NAME = "modules.json"
"""Lists the modules of a sentence-transformers model; each may have a folder, such as `1_Pooling`."""

COPIED_STEMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
_TERMS = re.compile(rf"([A-Z0-9]+[-_. ])*({'|'.join(COPIED_STEMS)}).*", re.DOTALL)
"""Upper-case names of terms of use, which belong to the weights, whatever their suffix."""

_MAX_MODULES_BYTES = 1_000_000
_MAX_DEPTH = 20

_NOT_COPIED = frozenset({
    MANIFEST_NAME, RECIPE_NAME, CARD_NAME, ADAPTER_CONFIG_NAME,
    "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json",  # of the post-trained model
})  # fmt: skip

_INDEX = re.compile(r".+\.index(\..+)?\.json", re.DOTALL)
"""Indices of weights, also of a variant: `model.safetensors.index.fp16.json`."""

_COMMON_FILE = re.compile(
    r"((generation|preprocessor|video_preprocessor|processor|quantize|quantization)_)?config\.json"
    r"|(model|pytorch_model|consolidated)([-.]\d+(-of-\d+)?)?\.(safetensors|bin)(\.index\.json)?"
    r"|(tokenizer(_config)?|special_tokens_map|added_tokens|vocab|merges|tekken|chat_template|spiece|sentencepiece\.bpe"
    r"|qwen)\.(json|jinja|txt|model|model\.v\d+|bpe|spm|tiktoken|vocab)"
    r"|(modeling|configuration|tokenization|processing|image_processing)_\w+\.py"
    r"|tokenizer(\.mm)?\.model\.v\w+|(params|modules|config_sentence_transformers|sentence_bert_config)\.json"
    r"|(hf_)?quant_config\.json|README(\.(md|txt))?"
    r"|(additional_)?chat_templates/[^/]+\.jinja"
    r"|slrmerge\.yaml|mergekit_config\.yml|\.gitattributes|\.cache/huggingface"
)

_TOKENIZER_STEMS = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "tekken", "chat_template")
_TOKENIZER_SUFFIXES = frozenset({".model", ".spm", ".tiktoken", ".vocab", ".bpe", ".jinja"})
_VERSIONED_TOKENIZER = re.compile(r"tokenizer(\.mm)?\.model\.v\w+")
"""Mistral's: `tokenizer.model.v3`, `tokenizer.mm.model.v7m1`."""


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
    modules = module_folders(folder)
    for module in (folder / name for name in modules if os.path.lexists(folder / name)):
        if module.is_dir() and module.resolve() == folder.resolve() / module.relative_to(folder):
            names += [path.relative_to(folder).as_posix() for path in _files_below(module)]
        else:
            problems.append(
                Problem("not-a-folder", str(module), "is not a folder of the checkpoint", "replace it, or move it away")
            )
    files: dict[str, SourceFile] = {}
    for name in (*select_side_files(names, modules), *{CARD_NAME}.intersection(names)):
        if file := collect(problems, partial(LocalFile.within, folder, name), None):
            files[name] = file
    raise_all(problems, CheckpointError)
    files.pop(CARD_NAME, None)
    return files


def module_folders(folder: Path) -> tuple[str, ...]:
    """The folders that modules.json in `folder` names; empty without one.

    Raises CheckpointError where it is not such a list, or where the model itself is in one of the folders.
    """
    path = folder / MODULES_NAME
    if not os.path.lexists(path):
        return ()
    with open_within(folder, MODULES_NAME) as file:
        raw = file.read(_MAX_MODULES_BYTES)
    remedy = "download it again"
    try:
        modules = parse_json(raw)
    except InvalidJsonError as error:
        raise CheckpointError(Problem("invalid-json", str(path), f"invalid JSON ({error})", remedy)) from None
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        return ()  # another program's file
    found: dict[str, None] = {}
    for module in modules:
        name = module.get("path")
        if not name or not isinstance(name, str):
            continue
        name = name.rstrip("/")
        if not is_inside(name) or name.startswith(".") or not name.isprintable():
            what = f"names the folder {shorten(name)}, outside of the checkpoint"
            raise CheckpointError(Problem("invalid-modules", str(path), what, remedy))
        if str(module.get("type", "")).endswith(".Transformer"):
            what = f"says that the model is in the folder {name}, not in this one"
            raise CheckpointError(Problem("invalid-modules", str(path), what, "name that folder as the checkpoint"))
        found[name] = None
    return tuple(found)


def select_side_files(names: Iterable[str], folders: Iterable[str] = ()) -> list[str]:
    """Those of a repository's or folder's files that are side files, sorted; `folders` are those of its modules."""
    beginnings = tuple(f"{folder}/" for folder in folders)
    return sorted(name for name in names if _is_side_file(name) or _is_of_module(name, beginnings))


def list_left_out(names: Iterable[str], kept: Collection[str]) -> tuple[str, ...]:
    """What a merge leaves behind of a checkpoint's `names` (a folder's ends in `/`), given the files that it reads.

    Not the files that every merge writes anew, hidden ones, and code, which has a note of its own.
    """
    folders = {f"{part}/" for name in kept for part in map(str, PurePosixPath(name).parents) if part != "."}
    others = {*names} - {*kept} - folders - {INDEX_NAME, CARD_NAME, MANIFEST_NAME, RECIPE_NAME}
    return tuple(sorted(name for name in others if not (name.startswith(".") or "/" in name[:-1] or is_code(name))))


def is_code(name: str) -> bool:
    return PurePosixPath(name).suffix == ".py"


def is_tokenizer_file(name: str) -> bool:
    """Whether a side file belongs to the tokenizer or is a chat template."""
    path = PurePosixPath(name)
    if "/" in name:
        return str(path.parent) in CHAT_TEMPLATE_FOLDERS
    return path.name.startswith(_TOKENIZER_STEMS) or path.suffix in _TOKENIZER_SUFFIXES


def is_common_file(name: str) -> bool:
    """Whether this is the name of a file that checkpoints have, and not of someone's notes or logs."""
    return bool(_COMMON_FILE.fullmatch(name) or ("/" not in name and _TERMS.fullmatch(name.upper())))


def fetch_side_files(side_files: Mapping[str, SourceFile]) -> None:
    """Download side files that are on the Hub into its cache. Raises HubError."""
    for file in side_files.values():
        file.fetch()


def _files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and the folders in it; a link is a file, wherever it leads. Raises CheckpointError."""
    left = [folder]
    while left:
        for path in left.pop().iterdir():
            if path.is_dir() and not path.is_symlink():
                if len(path.parts) > len(folder.parts) + _MAX_DEPTH:
                    what = f"has folders in folders, more than {_MAX_DEPTH} deep"
                    raise CheckpointError(Problem("nested-too-deeply", str(folder), what, "move them away"))
                left.append(path)
            else:
                yield path


def _is_other_folder(path: Path) -> bool:
    """Whether a path is a folder that has not the name of a file, such as `LICENSES` or `onnx`."""
    return path.is_dir() and not path.suffix and path.name.upper() not in (*COPIED_STEMS, CARD_NAME.upper())


def _is_of_module(name: str, beginnings: tuple[str, ...]) -> bool:
    """Whether a file is in the folder of a module: its config and its own weights."""
    return name.startswith(beginnings) and not any(part.startswith(".") for part in PurePosixPath(name).parts)


def _is_side_file(name: str) -> bool:
    path = PurePosixPath(name)
    if str(path.parent) not in (".", *CHAT_TEMPLATE_FOLDERS):
        return False
    if is_code(name):
        return True
    if path.name in _NOT_COPIED or path.name.startswith(".") or _INDEX.fullmatch(path.name):
        return False
    if path.suffix in COPIED_SUFFIXES or _VERSIONED_TOKENIZER.fullmatch(path.name):
        return True
    return path.suffix not in LOADED_SUFFIXES and _TERMS.fullmatch(path.name.upper()) is not None
