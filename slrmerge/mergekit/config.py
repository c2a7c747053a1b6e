"""A config as it is written."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from slrmerge.written import Dtype, Location, Strict, fault, short


def _model(value: object) -> str:
    if isinstance(value, dict) and value.keys() <= {"path", "revision"} and isinstance(value.get("path"), str):
        value = value["path"] + (f"@{value['revision']}" if value.get("revision") else "")
    if isinstance(value, dict) and set(value) == {"model"}:
        return _model(value["model"])
    if not isinstance(value, str) or not value:
        raise fault(f"{short(value)} is not a model that can be merged here", "name a folder or a repository")
    if "+" in value:
        raise fault(f"{value} adds a LoRA", "mergekit would merge it first; do so, and name the result")
    return value


def _layer_range(value: object) -> tuple[int, int]:
    ends = value if isinstance(value, list | tuple) else ()
    if len(ends) != 2 or not all(type(end) is int for end in ends) or not 0 <= ends[0] <= ends[1]:
        raise fault(f"{short(value)} is not a layer_range", "write [first, one past the last]")
    return ends[0], ends[1]


Model = Annotated[str, BeforeValidator(_model)]
LayerRange = Annotated[tuple[int, int], BeforeValidator(_layer_range)]
Parameters = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]


class Source(Strict):
    """A model, or some of its layers, with parameters of its own."""

    model: Model
    layer_range: LayerRange | None = None
    parameters: Parameters = Field(default_factory=dict)


class Slice(Strict):
    """Layers of the output, and what they are made of."""

    sources: list[Source] = Field(min_length=1)
    base_model: Model | None = None
    parameters: Parameters = Field(default_factory=dict)


class Config(Strict):
    """A config as it is written."""

    merge_method: str
    base_model: Model | None = None
    models: list[Source] | None = Field(default=None, min_length=1)
    slices: list[Slice] | None = Field(default=None, min_length=1)
    parameters: Parameters = Field(default_factory=dict)
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: str | None = None
    chat_template: Literal["auto"] | None = None

    @model_validator(mode="after")
    def _one_of_models_and_slices(self) -> Self:
        if (self.models is None) == (self.slices is None):
            raise fault("needs either models or slices", "give one of them")
        return self

    @property
    def layers(self) -> list[Slice]:
        """The slices; `models` are one slice over all layers."""
        return self.slices or [Slice(sources=self.models or [])]

    @property
    def named(self) -> list[str]:
        """Every model, the donor of config and tokenizer first."""
        first = [self.base_model] if self.base_model else []
        return list(dict.fromkeys([*first, *(source.model for part in self.layers for source in part.sources)]))


def model_at(location: Location) -> type[BaseModel]:
    parts = [step for step in location if isinstance(step, str)]
    if parts in (["models"], ["slices", "sources"]):
        return Source
    return Slice if parts == ["slices"] else Config
