"""Recipes: what to merge, as people write it."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PrivateAttr,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)

from slrmerge.checkpoint.location import AdapterOnBase, Place, Source, parse_source
from slrmerge.checkpoint.opening import open_pair
from slrmerge.checkpoint.pair import ModelPair, Side
from slrmerge.checkpoint.side_files import RECIPE_NAME
from slrmerge.errors import Problem, RecipeError
from slrmerge.io.files import as_path, write_text
from slrmerge.io.model import InvalidValue, plain
from slrmerge.io.pieces import translate_os_errors
from slrmerge.io.sizes import InvalidSizeError, parse_bytes, shorten
from slrmerge.io.strict_yaml import write_yaml
from slrmerge.recipe.alphas import Resolution, resolve_rules
from slrmerge.recipe.blend import BLEND_RULES
from slrmerge.recipe.rules import Rules, Text

DEFAULT_SHARD_BYTES = 5_000_000_000

_MAX_COMPARED, _MAX_COMPARED_TENSORS = 20, 50_000
"""Recipes with more rules than a person writes are not searched for rules without effect, nor are all rules of a model
with so many tensors that it would take seconds: rules times tensors.
"""

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


_MISSING = object()
"""Stands for a pre-trained side that is missing, and not left out as the base of an adapter."""


def _require_given(value: object) -> object:
    if value is _MISSING:
        raise InvalidValue("missing-key", "is missing", "add it")
    return value


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

    pretrained: Annotated[CheckpointName, BeforeValidator(_require_given, json_schema_input_type=Text)] = Field(
        default=None,  # type: ignore[assignment]  # where it is left out; None cannot be written
        description="The pre-trained checkpoint: a folder, a GGUF file, or organisation/name@revision on the Hub. "
        "Default: the base of the post-trained side, where that is an adapter.",
    )
    posttrained: CheckpointName = Field(
        description="The post-trained checkpoint. It supplies names, shapes, dtypes, config and tokenizer. It may be a "
        "LoRA adapter, on the base that its config names or, as base+adapter, on another."
    )
    dtype: Dtype | None = Field(
        default=None, description="Output dtype of floating tensors. Default: each tensor's post-trained dtype."
    )
    blend: Annotated[str, AfterValidator(_check_blend), WithJsonSchema({"enum": [*BLEND_RULES], "type": "string"})] = (
        Field(default="linear", description="What an alpha between 0 and 1 means.")
    )
    tokenizer: Side = Field(default="posttrained", description="The side that supplies tokenizer and chat template.")
    vocabulary: Literal["same", "shared"] = Field(
        default="same",
        description="With `shared`, vocabularies may differ in size: rows that only one side has stay post-trained.",
    )
    max_shard_size: Annotated[int, BeforeValidator(_check_size, json_schema_input_type=int | str)] = Field(
        default=DEFAULT_SHARD_BYTES, description="The most bytes in one file, such as 5GB (10**9) or 2GiB (2**30)."
    )

    is_mergekit: ClassVar[bool] = False

    _file: Path | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _require_a_side(cls, content: Any) -> Any:
        """Where no side is named, both are missing."""
        if isinstance(content, Mapping) and content.keys().isdisjoint(("pretrained", "posttrained")):
            return {**content, "pretrained": _MISSING}
        return content

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
        """Where a side's checkpoint is. Raises RecipeError where only an open pair tells."""
        written = getattr(self, side)
        if written is None:
            raise RecipeError(Problem("missing-key", self.place(f"$.{side}"), "is missing", "add it"))
        return parse_source(written, base=self.file.parent if self.file else Path())

    def open_pair(self, *, local_files_only: bool = False) -> ModelPair:
        """Open both checkpoints; see `slrmerge.open_pair`."""
        below = self.source("pretrained") if self.pretrained else None
        return open_pair(below, self.source("posttrained"), local_files_only=local_files_only)

    def resolve(self, pair: ModelPair) -> Resolution:
        """The alpha of every tensor of a pair."""
        tied = pair.correspondence.tied
        return resolve_rules(self, pair.posttrained, pair.stack, tied=tied, blend=self.blend, place=self.place)

    def notes(self, pair: ModelPair) -> Iterator[str]:
        """What a reader of the plan should know about the recipe: rules without which it would say the same."""
        lists = {"layers": self.layers, "tensors": self.tensors}
        single = [key for key in ("alpha", "restore") if getattr(self, key) is not None]
        count = len(single) + sum(map(len, lists.values()))
        if not 1 < count <= min(_MAX_COMPARED, _MAX_COMPARED_TENSORS // max(len(pair.posttrained), 1)):
            return  # a rule that is the only one decides
        without: dict[str, dict[str, object]] = {f"$.{key}": {key: None} for key in single}
        for key, rules in lists.items():
            for number in range(len(rules)):
                without[f"$.{key}[{number}]"] = {key: (*rules[:number], *rules[number + 1 :])}
        alphas = self.resolve(pair).alphas
        if not any(alphas.values()):
            return
        for path, update in without.items():
            if self.model_copy(update=update).resolve(pair).alphas == alphas:
                yield f"{path} changes nothing: the other rules decide the same for all of its tensors"

    def as_run(self, pair: ModelPair, folder: Path) -> dict[str, Any]:
        """`to_dict` for a file in `folder`, with repositories pinned to the commits of `pair`."""
        return self.relative_to(folder, pair)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, without what is at its default; sizes in bytes."""
        named = {} if self.pretrained is None else {"pretrained": self.pretrained}
        return {**named, "posttrained": self.posttrained, **plain(self)}

    def relative_to(self, folder: Path, pair: ModelPair | None = None) -> dict[str, Any]:
        """`to_dict` for a file in `folder`: relative sources count from there; with `pair`, repositories are pinned."""
        sides: tuple[Side, ...] = ("pretrained", "posttrained") if self.pretrained or pair else ("posttrained",)
        return {**self.to_dict(), **{side: self._source_from(side, folder, pair) for side in sides}}

    def _source_from(self, side: Side, folder: Path, pair: ModelPair | None) -> str:
        written = getattr(self, side)
        if written is None and pair:
            return pair[side].reference
        source = self.source(side)
        if isinstance(source, AdapterOnBase):
            if pair and not (isinstance(source.base, Path) and isinstance(source.adapter, Path)):
                return pair[side].reference
            base, _, adapter = written.rpartition("+")
            return f"{_from(folder, base, source.base)}+{_from(folder, adapter, source.adapter)}"
        if not isinstance(source, Path):
            return pair[side].reference if pair else written
        return _from(folder, written, source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as YAML; relative sources are rewritten to count from the file's folder.

        Raises OutputError.
        """
        target = as_path("path", path)
        text = write_yaml(self.relative_to(target.parent))
        with translate_os_errors(target):
            write_text(target, text)

    def __repr_args__(self) -> Iterable[tuple[str, Any]]:
        return self.to_dict().items()


def _from(folder: Path, written: str, place: Place) -> str:
    """What names in `folder` the place that is `written` elsewhere."""
    if not isinstance(place, Path) or Path(os.path.expanduser(written)).is_absolute():  # noqa: PTH111 (an unknown user is not an error here)
        return written
    return Path(os.path.relpath(os.path.realpath(place), os.path.realpath(folder))).as_posix()


def generate_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors; recipe.schema.json in this package is its copy."""
    schema = Recipe.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID, **schema}
