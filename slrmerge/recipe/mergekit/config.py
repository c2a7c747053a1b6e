"""mergekit's config format, as far as it describes merges of two models."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from slrmerge.io.model import InvalidValue, Model
from slrmerge.io.sizes import shorten
from slrmerge.recipe.model import Dtype


def _as_model(value: object) -> object:
    """A model's name as a string: mergekit also writes it as a mapping of path and revision, or of model and LoRA."""
    if isinstance(value, dict) and value.keys() <= {"path", "revision"} and isinstance(value.get("path"), str):
        value = value["path"] + (f"@{value['revision']}" if value.get("revision") else "")
    if isinstance(value, dict) and "model" in value and value.keys() <= {"model", "lora"}:
        model, lora = _as_model(value["model"]), value.get("lora")
        return f"{model}+{_as_model(lora)}" if lora is not None else model
    if not isinstance(value, str) or not value:
        what = f"{shorten(value)} is not a model"
        raise InvalidValue("invalid-model", what, "name a folder or a repository")
    return value


def _as_layer_range(value: object) -> object:
    ends = value if isinstance(value, list | tuple) else ()
    if len(ends) != 2 or not all(type(end) is int for end in ends) or not 0 <= ends[0] <= ends[1]:
        what = f"{shorten(value)} is not a layer_range"
        raise InvalidValue("invalid-interval", what, "write [first, last + 1]")
    return tuple(ends)


def _as_parameters(value: object) -> object:
    return {} if value is None else value


ModelName = Annotated[str, BeforeValidator(_as_model)]
LayerRange = Annotated[tuple[int, int], BeforeValidator(_as_layer_range)]
Parameters = Annotated[dict[str, Any], BeforeValidator(_as_parameters)]


class SliceSource(Model):
    """A model, or some of its layers, with its own parameters."""

    model: ModelName
    layer_range: LayerRange | None = None
    parameters: Parameters = Field(default={})


Sources = Annotated[tuple[SliceSource, ...], Field(min_length=1)]


class Slice(Model):
    """Layers of the output, and the models that they come from."""

    sources: Sources
    base_model: ModelName | None = None
    parameters: Parameters = Field(default={})


class MergekitConfig(Model):
    """A config as it is written."""

    merge_method: str
    base_model: ModelName | None = None
    models: Sources | None = None
    slices: Annotated[tuple[Slice, ...], Field(min_length=1)] | None = None
    parameters: Parameters = Field(default={})
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: str | None = None
    chat_template: Literal["auto"] | None = None

    def model_post_init(self, _: Any) -> None:
        if (self.models is None) == (self.slices is None):
            raise InvalidValue("models-or-slices", "needs either models or slices", "give one of them")

    @property
    def parts(self) -> tuple[Slice, ...]:
        """The slices; `models` are one slice over all layers."""
        return self.slices or (Slice(sources=self.models or ()),)

    @property
    def model_names(self) -> list[str]:
        """Every model, the base model first: it supplies config and tokenizer."""
        first = [self.base_model] if self.base_model else []
        return list(dict.fromkeys([*first, *(source.model for part in self.parts for source in part.sources)]))

    def rename_models(self, rename: Callable[[str], str]) -> dict[str, Any]:
        """The config as plain values, with other names for its models."""

        def renamed(value: Any, key: str = "") -> Any:
            if isinstance(value, dict):
                inside_parameters = key == "parameters"
                return {k: v if inside_parameters else renamed(v, k) for k, v in value.items()}
            if isinstance(value, list):
                return [renamed(entry, key) for entry in value]
            return rename(value) if key in ("model", "base_model", "tokenizer_source") else value

        content: dict[str, Any] = renamed(self.model_dump(mode="json", exclude_defaults=True))
        return content
