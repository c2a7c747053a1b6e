"""The files beside the weights: the post-trained side's config, tokenizer, chat template and licence, and the index."""

import json
from io import BytesIO
from typing import Any

from slrmerge.checkpoint.pair import ModelPair
from slrmerge.checkpoint.side_files import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, is_code, is_tokenizer_file
from slrmerge.merging.finding import TRADEOFF_NAME, Finding
from slrmerge.merging.plan.model import PlannedFile, PlannedShard
from slrmerge.recipe.load import AnyRecipe


def plan_files(
    recipe: AnyRecipe,
    pair: ModelPair,
    shards: tuple[PlannedShard, ...],
    *,
    allow_code: bool,
    finding: Finding | None = None,
) -> tuple[list[PlannedFile], list[str]]:
    """The files to write beside `shards`, sorted by name, and notes on code that is copied or left out."""
    sources = dict(pair.posttrained.side_files)
    if recipe.tokenizer == "pretrained":
        sources = {name: file for name, file in sources.items() if not is_tokenizer_file(name)}
        sources |= {name: file for name, file in pair.pretrained.side_files.items() if is_tokenizer_file(name)}
    code = [name for name in sources if is_code(name)]
    files = [PlannedFile(name, source) for name, source in sources.items() if allow_code or name not in code]
    if recipe.dtype or pair.posttrained.has_own_config:
        config = _dump(_with_dtype(pair.posttrained.config, recipe.dtype))
        files = [PlannedFile(file.name, content=config) if file.name == CONFIG_NAME else file for file in files]
    if finding and finding.figure:
        files.append(PlannedFile(TRADEOFF_NAME, finding.figure))
    if pair.posttrained.format == "safetensors" and [shard.name for shard in shards] != [SINGLE_NAME]:
        files.append(PlannedFile(INDEX_NAME, content=_index(shards)))
    return sorted(files, key=lambda file: file.name), _code_notes(code, pair, allow_code=allow_code)


def _index(shards: tuple[PlannedShard, ...]) -> bytes:
    """The index, an entry at a time: `_dump` would take four times its size."""
    total = sum(shard.data_bytes for shard in shards)
    before, _, after = _dump({"metadata": {"total_size": total}, "weight_map": {}}).rpartition(b"{}")
    index, separator, encode = BytesIO(), "{", json.JSONEncoder(ensure_ascii=False).encode
    index.write(before)
    for shard in shards:
        for tensor in shard.tensors:
            index.write(f'{separator}\n    {encode(tensor.name)}: "{shard.name}"'.encode())
            separator = ","
    index.write(b"\n  }" + after)
    return index.getvalue()


def _code_notes(code: list[str], pair: ModelPair, *, allow_code: bool) -> list[str]:
    if not code:
        return []
    if allow_code:
        return [f"code copied from the post-trained side: {', '.join(code)}"]
    needed = " (the config's auto_map needs it)" if pair.posttrained.config.get("auto_map") else ""
    return [f"code left out{needed}: {', '.join(code)}; pass allow_code=True to copy it"]


def _with_dtype(config: Any, dtype: str | None) -> Any:
    """A config that names `dtype`, if any, wherever it named another."""
    if not isinstance(config, dict) or dtype is None:
        return config
    return {
        key: dtype if key in ("dtype", "torch_dtype") and isinstance(value, str) else _with_dtype(value, dtype)
        for key, value in config.items()
    }


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
