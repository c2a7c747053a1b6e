"""What goes along beside the weights: the post-trained side's config, tokenizer, chat template and licence."""

import json
from collections.abc import Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from slrmerge.checkpoint import CHAT_TEMPLATE_FOLDERS, CONFIG_NAME, INDEX_NAME, Checkpoint, Identity, RemoteFile
from slrmerge.mergekit import CONFIG_NAME as MERGEKIT_NAME
from slrmerge.plan.findings import PICTURE_NAME
from slrmerge.plan.model import PlannedFile, PlannedShard

COPIED_SUFFIXES = frozenset({".json", ".jinja", ".model", ".spm", ".tiktoken", ".txt", ".vocab", ".bpe"})
LOADED_SUFFIXES = COPIED_SUFFIXES | {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py"}
"""What a loader may look for in a model's folder."""

COPIED_STEMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
"""Terms of use go along with the weights, whatever their ending."""

MANIFEST_NAME = "slrmerge.json"
RECIPE_NAME = "slrmerge.yaml"
CARD_NAME = "README.md"

_TOKENIZER_STEMS = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "tekken", "chat_template")
_TOKENIZER_SUFFIXES = frozenset({".model", ".spm", ".tiktoken", ".vocab", ".bpe", ".jinja"})

_NOT_COPIED = frozenset({MANIFEST_NAME, RECIPE_NAME, CARD_NAME, "adapter_config.json", "trainer_state.json"})


def plan_files(
    posttrained: Checkpoint,
    shards: tuple[PlannedShard, ...],
    *,
    dtype: str | None,
    allow_code: bool,
    picture: Path | None = None,
    tokenizer: Checkpoint | None = None,
    mergekit_text: bytes | None = None,
) -> tuple[list[PlannedFile], list[str]]:
    """The files to write beside `shards`, and notes on code that goes along or stays behind.

    The files of the tokenizer are those of `tokenizer`, where that is not the post-trained side. `picture` and
    `mergekit_text` go along.
    """
    files: list[PlannedFile] = []
    code: list[PlannedFile] = []
    beside = dict(side_files(posttrained))
    if tokenizer not in (None, posttrained):
        beside = {name: source for name, source in beside.items() if not _is_tokenizers(name)}
        beside |= {name: source for name, source in side_files(tokenizer) if _is_tokenizers(name)}
    for name, source in beside.items():
        if Path(name).suffix == ".py":
            code.append(_copy_of(source, name))
        elif name == CONFIG_NAME and dtype:
            content = _dump(_with_dtype(posttrained.config, dtype))
            files.append(PlannedFile(name, len(content), content=content))
        else:
            files.append(_copy_of(source, name))
    if allow_code:
        files += code
    if mergekit_text is not None:
        files.append(PlannedFile(MERGEKIT_NAME, len(mergekit_text), content=mergekit_text))
    if picture is not None:
        files.append(_copy_of(picture, PICTURE_NAME))
    if len(shards) > 1:
        index = _dump(
            {
                "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
                "weight_map": {tensor.name: shard.name for shard in shards for tensor in shard.tensors},
            }
        )
        files.append(PlannedFile(INDEX_NAME, len(index), content=index))
    names = [file.name for file in code]
    return sorted(files, key=lambda file: file.name), _code_notes(names, posttrained, allow_code=allow_code)


def side_files(checkpoint: Checkpoint) -> Iterator[tuple[str, Path | RemoteFile]]:
    """What belongs to a model beside its weights, code included, with where it is."""
    here = dict(_files_in(checkpoint.folder))
    elsewhere = checkpoint.snapshot.files if checkpoint.snapshot else {}
    for name in sorted({**here, **elsewhere}):
        path = PurePosixPath(name)
        if str(path.parent) in (".", *CHAT_TEMPLATE_FOLDERS) and (path.suffix == ".py" or _is_copied(path)):
            yield name, elsewhere.get(name) or here[name]  # even if it is in the cache: fetching finds it sound


def fetch_side_files(checkpoint: Checkpoint) -> None:
    """Bring what belongs to a model beside its weights into its folder, where it is on the Hub. Raises HubError."""
    for _, file in side_files(checkpoint):
        if not isinstance(file, Path):
            file.fetch()


def _is_tokenizers(name: str) -> bool:
    path = PurePosixPath(name)
    in_folder = path.parent.name in CHAT_TEMPLATE_FOLDERS
    return in_folder or path.name.startswith(_TOKENIZER_STEMS) or path.suffix in _TOKENIZER_SUFFIXES


def _files_in(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in folder.iterdir():
        if path.is_file():
            yield path.name, path
        elif path.is_dir() and path.name in CHAT_TEMPLATE_FOLDERS:
            yield from ((f"{path.name}/{inner.name}", inner) for inner in path.iterdir() if inner.is_file())


def _copy_of(source: Path | RemoteFile, name: str) -> PlannedFile:
    if not isinstance(source, Path):
        return PlannedFile(name, source.file_bytes, source=source)
    identity = Identity.of(source.stat())
    return PlannedFile(name, identity.file_bytes, source=source, identity=identity)


def _is_copied(path: PurePath) -> bool:
    if path.name in _NOT_COPIED or path.name.startswith(".") or path.name.endswith(".index.json"):
        return False
    return path.suffix in COPIED_SUFFIXES or path.name.upper().startswith(COPIED_STEMS)


def _code_notes(code: list[str], posttrained: Checkpoint, *, allow_code: bool) -> list[str]:
    if not code:
        return []
    if allow_code:
        return [f"code copied from the post-trained side: {', '.join(code)}"]
    needed = " (the config's auto_map names it)" if posttrained.config.get("auto_map") else ""
    return [f"code left behind{needed}: {', '.join(code)}; --allow-code copies it"]


def _with_dtype(config: Any, dtype: str) -> Any:
    """A config that says `dtype` wherever it said another."""
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in ("dtype", "torch_dtype") and isinstance(value, str) else _with_dtype(value, dtype)
        for key, value in config.items()
    }


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
