"""A config as it is written."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from slrmerge.structure import Fault, Prepare, Read, filled, short
from slrmerge.written import Dtype


def _model(value: object) -> str:
    if isinstance(value, dict) and value.keys() <= {"path", "revision"} and isinstance(value.get("path"), str):
        value = value["path"] + (f"@{value['revision']}" if value.get("revision") else "")
    if isinstance(value, dict) and set(value) == {"model"}:
        return _model(value["model"])
    if not isinstance(value, str) or not value:
        raise Fault(f"{short(value)} is not a model that can be merged here", "name a folder or a repository")
    if "+" in value:
        raise Fault(f"{value} adds a LoRA", "mergekit would merge it first; do so, and name the result")
    return value


def _layer_range(value: object) -> tuple[int, int]:
    ends = value if isinstance(value, list | tuple) else ()
    if len(ends) != 2 or not all(type(end) is int for end in ends) or not 0 <= ends[0] <= ends[1]:
        raise Fault(f"{short(value)} is not a layer_range", "write [first, one past the last]")
    return ends[0], ends[1]


def _parameters(value: object) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise Fault(f"{short(value)} is not valid", "write a map of keys to values")
    return {str(key): entry for key, entry in (value or {}).items()}


Model = Annotated[str, Read(_model)]
LayerRange = Annotated[tuple[int, int], Read(_layer_range)]
Parameters = Annotated[dict[str, Any], Read(_parameters)]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model, or some of its layers, with parameters of its own."""

    model: Model
    layer_range: LayerRange | None = None
    parameters: Parameters = field(default_factory=dict)


Sources = Annotated[tuple[Source, ...], Prepare(filled)]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Layers of the output, and what they are made of."""

    sources: Sources
    base_model: Model | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A config as it is written."""

    merge_method: str
    base_model: Model | None = None
    models: Sources | None = None
    slices: Annotated[tuple[Slice, ...], Prepare(filled)] | None = None
    parameters: Parameters = field(default_factory=dict)
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: str | None = None
    chat_template: Literal["auto"] | None = None

    def __post_init__(self) -> None:
        if (self.models is None) == (self.slices is None):
            raise Fault("needs either models or slices", "give one of them")

    @property
    def layers(self) -> tuple[Slice, ...]:
        """The slices; `models` are one slice over all layers."""
        return self.slices or (Slice(sources=self.models or ()),)

    @property
    def named(self) -> list[str]:
        """Every model, the donor of config and tokenizer first."""
        first = [self.base_model] if self.base_model else []
        return list(dict.fromkeys([*first, *(source.model for part in self.layers for source in part.sources)]))
