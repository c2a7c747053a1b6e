"""Recipes: what to merge, as people write it."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PrivateAttr,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)

from slrmerge.checkpoint.location import Source, parse_source
from slrmerge.checkpoint.pair import ModelPair, Side, open_pair
from slrmerge.checkpoint.side_files import RECIPE_NAME
from slrmerge.io.model import InvalidValue, plain
from slrmerge.io.pieces import translate_os_errors
from slrmerge.io.sizes import InvalidSizeError, parse_bytes, shorten
from slrmerge.io.strict_yaml import write_yaml
from slrmerge.recipe.alphas import Resolution, resolve_rules
from slrmerge.recipe.blend import BLEND_RULES
from slrmerge.recipe.rules import Rules, Text

DEFAULT_SHARD_BYTES = 5_000_000_000

SCHEMA_ID = "urn:slrmerge:recipe"


def _check_size(value: object) -> int:
    try:
        return parse_bytes(value)
    except InvalidSizeError as error:
        raise InvalidValue("invalid-size", error.what, error.remedy) from None


def _check_blend(value: str) -> str:
    if value not in BLEND_RULES:
        expected = " or ".join(map(repr, BLEND_RULES))
        raise InvalidValue("invalid-choice", f"expected {expected}, got {shorten(value)}")
    return value


def _as_text(value: object) -> object:
    """A path object as text that names a folder, never a repository."""
    if not isinstance(value, os.PathLike):
        return value
    path = os.fsdecode(value)
    return path if os.path.isabs(path) else os.path.join(os.curdir, path)  # noqa: PTH117 (Path drops the ./)


Dtype = Literal["float64", "float32", "float16", "bfloat16"]
"""Floating dtypes, as torch names them."""


def _with_any_bytes(value: object, validate: ValidatorFunctionWrapHandler) -> object:
    """A folder's name may have bytes that are not UTF-8 (surrogates in Python), which pydantic's str refuses."""
    return value if isinstance(value, str) and re.search("[\udc80-\udcff]", value) else validate(value)


CheckpointName = Annotated[
    Text,
    WrapValidator(_with_any_bytes, json_schema_input_type=Text),
    PlainSerializer(lambda name: name, return_type=Any, when_used="json"),
    BeforeValidator(_as_text, json_schema_input_type=Text),
]


class Recipe(Rules):
    """Two checkpoints, the rules of their merge, and the format of the output.

    Relative folders count from the folder of `file`, the file that it was loaded from, or else from the current folder.
    Raises RecipeError with every problem.
    """

    pretrained: CheckpointName = Field(
        description="The pre-trained checkpoint: a folder, a GGUF file, or organisation/name@revision on the Hub."
    )
    posttrained: CheckpointName = Field(
        description="The post-trained checkpoint. It supplies names, shapes, dtypes, config and tokenizer."
    )
    dtype: Dtype | None = Field(
        default=None, description="Output dtype of floating tensors. Default: each tensor's post-trained dtype."
    )
    blend: Annotated[str, AfterValidator(_check_blend), WithJsonSchema({"enum": [*BLEND_RULES], "type": "string"})] = (
        Field(default="linear", description="What an alpha between 0 and 1 means.")
    )
    tokenizer: Side = Field(default="posttrained", description="The side that supplies tokenizer and chat template.")
    max_shard_size: Annotated[int, BeforeValidator(_check_size, json_schema_input_type=int | str)] = Field(
        default=DEFAULT_SHARD_BYTES, description="The most bytes in one file, such as 5GB (10**9) or 2GiB (2**30)."
    )

    _file: Path | None = PrivateAttr(default=None)

    @property
    def written_as(self) -> tuple[str, ...]:
        """The names under which a merge writes the recipe as it was run."""
        return (RECIPE_NAME,)

    @property
    def file(self) -> Path | None:
        """The file that the recipe was loaded from."""
        return self._file

    def loaded_from(self, file: Path) -> "Recipe":
        """The same recipe, with `file` as the file that it was loaded from."""
        made = self.model_copy()
        made._file = file
        return made

    def place(self, path: str) -> str:
        """A place in the recipe as messages name it, with the file where there is one."""
        return f"{self.file or 'recipe'}: {path}"

    def source(self, side: Side) -> Source:
        """Where a side's checkpoint is."""
        return parse_source(getattr(self, side), base=self.file.parent if self.file else Path())

    def open_pair(self, *, local_files_only: bool = False) -> ModelPair:
        """Open both checkpoints; see `slrmerge.open_pair`."""
        return open_pair(self.source("pretrained"), self.source("posttrained"), local_files_only=local_files_only)

    def resolve(self, pair: ModelPair) -> Resolution:
        """The alpha of every tensor of a pair."""
        return resolve_rules(self, pair.posttrained, pair.stack, blend=self.blend, place=self.place)

    def notes(self, pair: ModelPair) -> Iterator[str]:
        """What a reader of the plan should know about the recipe."""
        del pair
        yield from ()

    def as_run(self, pair: ModelPair, folder: Path) -> dict[str, Any]:
        """`to_dict` for a file in `folder`, with repositories pinned to the commits of `pair`."""
        return self.relative_to(folder, pair)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, without what is at its default; sizes in bytes."""
        return {"pretrained": self.pretrained, "posttrained": self.posttrained, **plain(self)}

    def relative_to(self, folder: Path, pair: ModelPair | None = None) -> dict[str, Any]:
        """`to_dict` for a file in `folder`: relative sources count from there; with `pair`, repositories are pinned."""
        return {
            **self.to_dict(),
            **{side: self._source_from(side, folder, pair) for side in ("pretrained", "posttrained")},
        }

    def _source_from(self, side: Side, folder: Path, pair: ModelPair | None) -> str:
        written: str = getattr(self, side)
        source = self.source(side)
        if not isinstance(source, Path):
            return pair[side].reference if pair else written
        if Path(os.path.expanduser(written)).is_absolute():  # noqa: PTH111 (an unknown user is not an error here)
            return written
        return Path(os.path.relpath(os.path.realpath(source), os.path.realpath(folder))).as_posix()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as YAML; relative sources are rewritten to count from the file's folder.

        Raises OutputError.
        """
        target = Path(path)
        text = write_yaml(self.relative_to(target.parent))
        with translate_os_errors(target):
            target.write_text(text, encoding="utf-8")

    def __repr_args__(self) -> Iterable[tuple[str, Any]]:
        return self.to_dict().items()


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors (JSON Schema 2020-12)."""
    schema: dict[str, Any] = json.loads(files("slrmerge.recipe").joinpath("recipe.schema.json").read_text("utf-8"))
    return schema


def generate_schema() -> dict[str, Any]:
    """The schema as pydantic generates it; recipe.schema.json in this package is its copy."""
    schema = Recipe.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID, **schema}
