"""A LoRA adapter in a folder (peft's format): its config and its header, or why it is not supported.

The keys and their meaning are those of peft's `LoraConfig`. A key that changes the weights in a way that is not
implemented here is refused by its name, and so is an unknown key with a value.
"""

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field
from pydantic_core import SchemaError, SchemaValidator, core_schema

from slrmerge.checkpoint.files import unreadable
from slrmerge.checkpoint.header import Shard
from slrmerge.checkpoint.safetensors import exists, read_json, read_local_shard
from slrmerge.checkpoint.side_files import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_PICKLE_NAME,
    ADAPTER_WEIGHTS_NAME,
    INDEX_NAME,
    SINGLE_NAME,
)
from slrmerge.errors import CheckpointError, Problem, raise_all
from slrmerge.io.model import Model, validate_as
from slrmerge.io.sizes import shorten

_NO_EFFECT = frozenset({
    "task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "megatron_core", "runtime_config",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
    "ensure_weight_tying",  # the tensors in the file say which modules are adapted, and which are stored whole
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # of an `init_lora_weights`
    "qalora_group_size",  # of `use_qalora`
    "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr",  # written by ms-swift
})  # fmt: skip
"""Keys that do not change what the stored tensors mean."""

_UNSUPPORTED = {
    "use_dora": "DoRA also rescales each row of the weights",
    "trainable_token_indices": "some rows of the embedding are stored by themselves",
    "target_parameters": "its tensors belong to parameters, not to modules",
    "layer_replication": "layers of the base are repeated",
    "alora_invocation_tokens": "an activated LoRA applies to some tokens only",
    "use_qalora": "QALoRA pools the inputs",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "KaSA truncates the base's weights",
    "arrow_config": "it chooses between several adapters",
    "enable_lora": "it adapts parts of a fused module",
}
"""Keys that change the weights, and how."""

_INITIALISATIONS = frozenset({True, False, "true", "false", "gaussian", "eva", "orthogonal", "mica"})
"""Values of `init_lora_weights` that leave the base's weights as they are."""

MERGE_WITH_PEFT = "merge it into its base with peft's `merge_and_unload`, and name the folder of the result"
_UNLESS_TIED = ", unless the base ties its head to its embedding: then the result may be another model"
NAME_BASE = "write BASE+ADAPTER in place of the adapter, as in ./llama-3.1-8b+./my-lora"
NO_REMEDY = "it cannot be merged into its base: name a plain LoRA or a whole model as the post-trained side"

_NOT_WEIGHTS = frozenset({
    "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT", "CARTRIDGE", "CPT",
    "POLY", "XLORA", "SHADOW",
})  # fmt: skip
"""Values of `peft_type` that peft cannot merge either: prompts, states, or a mixture that depends on the input."""

_UNMERGEABLE = frozenset({"alora_invocation_tokens", "arrow_config", "layer_replication", "use_qalora"})
"""Keys of `_UNSUPPORTED` that peft cannot merge, or for which it gives no model of the base's layers."""

_MAY_BE_TIED = re.compile("emb|wte|head|shared")
"""In the names of modules that may be the embedding or the head."""

_MAX_PATTERNS = 10_000
"""More than the modules of any model that adapters are trained on: each is compared with each pattern."""

_NESTED_SET = re.compile(r"\[[^\]]*(?:\[|&&|--|~~)")
"""Syntax that regular expressions in Python and Rust read differently."""

N = TypeVar("N", int, float)
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class AdapterConfig(Model):
    """What the config says about the weights."""

    error = CheckpointError

    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int = Field(default=8, gt=0, strict=True)
    lora_alpha: _Finite = 8
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    rank_pattern: dict[str, int] = Field(default={})
    alpha_pattern: dict[str, _Finite] = Field(default={})

    def rank(self, module: str) -> int:
        """The rank of the factors of a module, named as in the model."""
        return _by_pattern(self._ranks, module, self.r)

    def scale(self, module: str) -> float:
        """The factor of B·A for a module, named as in the model."""
        rank = self.rank(module)
        return _by_pattern(self._alphas, module, self.lora_alpha) / (sqrt(rank) if self.use_rslora else rank)

    @cached_property
    def _ranks(self) -> list[tuple[SchemaValidator, int]]:
        return [(_compiled(pattern), rank) for pattern, rank in self.rank_pattern.items()]

    @cached_property
    def _alphas(self) -> list[tuple[SchemaValidator, float]]:
        return [(_compiled(pattern), alpha) for pattern, alpha in self.alpha_pattern.items()]


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter whose base is not open yet. `reference`, `name` and `provenance` are those of one on the Hub."""

    folder: Path
    content: Mapping[str, Any]
    config: AdapterConfig
    shard: Shard
    reference: str = ""
    name: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name or str(self.folder)


def is_adapter(names: Set[str]) -> bool:
    """Whether a folder or repository with files of these names is an adapter and not a whole model."""
    return ADAPTER_CONFIG_NAME in names and names.isdisjoint((SINGLE_NAME, INDEX_NAME))


def read_adapter_folder(folder: Path, **more: Any) -> AdapterFolder:
    """The config and the header of the adapter in `folder`. Raises CheckpointError with everything unsupported."""
    try:
        content = read_json(folder / ADAPTER_CONFIG_NAME)
        config = parse_adapter_config(content, folder / ADAPTER_CONFIG_NAME)
        path = folder / ADAPTER_WEIGHTS_NAME
        if not exists(path):
            what, remedy = "is missing", "complete the download"
            if exists(folder / ADAPTER_PICKLE_NAME):
                what = f"is missing; {ADAPTER_PICKLE_NAME} is a pickle, which is not read"
                remedy = "load the adapter with peft and save it again, which writes safetensors"
            raise CheckpointError(Problem("adapter-weights-missing", str(path), what, remedy))
        return AdapterFolder(folder, content, config, read_local_shard(path), **more)
    except OSError as error:
        raise unreadable(folder, error) from error


def parse_adapter_config(content: Mapping[str, Any], path: Path) -> AdapterConfig:
    """The config in `path`. Raises CheckpointError with everything that is not supported."""
    raise_all(_unsupported(content, str(path)), CheckpointError)
    known = {key: value for key, value in content.items() if key in AdapterConfig.model_fields and value is not None}
    config = validate_as(AdapterConfig, known, str(path))
    raise_all(_invalid_patterns(config, str(path)), CheckpointError)
    return config


def _unsupported(content: Mapping[str, Any], where: str) -> Iterator[Problem]:
    kind = content.get("peft_type")
    modules = f"{content.get('target_modules')} {content.get('modules_to_save')}"
    merge = MERGE_WITH_PEFT + (_UNLESS_TIED if _MAY_BE_TIED.search(modules) else "")
    if kind is None:
        what = "has no peft_type: the adapter is not in peft's format"
        remedy = "merge it into its base with the program that trained it, such as mlx_lm.fuse, and name the result"
        yield Problem("unsupported-adapter", where, what, remedy)
        return
    if kind != "LORA":
        what = f"peft_type {shorten(kind)} is not supported, only LORA is"
        is_mergeable = not isinstance(kind, str) or kind not in _NOT_WEIGHTS
        yield Problem("unsupported-adapter", where, what, merge if is_mergeable else NO_REMEDY)
        return
    initialisation = content.get("init_lora_weights", True)
    if not isinstance(initialisation, bool | str) or initialisation not in _INITIALISATIONS:
        what = f"init_lora_weights {shorten(initialisation)} changes the base's weights, or may"
        remedy = f"convert it to a plain LoRA (peft: `path_initial_model_for_weight_conversion`), or {merge}"
        yield Problem("unsupported-adapter", where, what, remedy)
    for key, value in content.items():
        if not value or key in _NO_EFFECT or key in AdapterConfig.model_fields:
            continue
        if key in _UNSUPPORTED:
            what = f"{key} is not supported: {_UNSUPPORTED[key]}"
            yield Problem("unsupported-adapter", where, what, NO_REMEDY if key in _UNMERGEABLE else merge)
        elif key not in ("peft_type", "init_lora_weights"):
            what = f"{shorten(key)} is not a known key of a LoRA adapter, and may change the weights"
            yield Problem("unsupported-adapter", where, what, merge)


def _invalid_patterns(config: AdapterConfig, where: str) -> Iterator[Problem]:
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, key)
        if len(patterns) > _MAX_PATTERNS:
            what = f"{key} has {len(patterns):,} patterns; at most {_MAX_PATTERNS:,} are supported"
            yield Problem("invalid-adapter", where, what)
            continue
        for pattern, value in patterns.items():
            try:
                _compiled(pattern)
            except ValueError as error:
                what = f"{shorten(pattern)} in {key} is not a regular expression that is supported ({error})"
                yield Problem("invalid-adapter", where, what)
            if key == "rank_pattern" and value < 1:
                yield Problem("invalid-adapter", where, f"rank {shorten(value)} of {shorten(pattern)} is not possible")


def _compiled(pattern: str) -> SchemaValidator:
    """Matches names of modules that end with a pattern, from any component on. Raises ValueError.

    The regular expressions are Rust's, which take linear time; Python's may take exponential time.
    """
    if _NESTED_SET.search(pattern):
        raise ValueError("sets inside sets are not supported")
    try:
        return SchemaValidator(core_schema.str_schema(pattern=rf"^(.*\.)?({pattern})$"))
    except SchemaError as error:
        raise ValueError(str(error).strip().splitlines()[-1].strip()) from None


def _by_pattern(patterns: Sequence[tuple[SchemaValidator, N]], module: str, default: N) -> N:
    """The value of the first pattern that matches the name of a module."""
    return next((value for pattern, value in patterns if pattern.isinstance_python(module)), default)
