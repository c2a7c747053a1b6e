"""The rules of a recipe: which side each tensor comes from, as people write it."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from slrmerge.io.model import InvalidValue, Model, plain
from slrmerge.io.sizes import shorten

_MAX_LAYER = 10**9
"""Past any model; numbers beyond it are refused before they are printed or counted up to."""


def _check_interval(value: object) -> object:
    if not (isinstance(value, list | tuple) and len(value) == 2 and all(type(end) is int for end in value)):
        remedy = "write [first, last], both included"
        ends = re.fullmatch(r"(\d{1,9})\s*[:–-]\s*(\d{1,9})", value) if isinstance(value, str) else None
        remedy += f", such as [{int(ends[1])}, {int(ends[2])}]" if ends else ""
        raise InvalidValue("invalid-interval", f"{shorten(value)} is not an interval", remedy)
    first, last = value
    if first < 0:
        raise InvalidValue("invalid-interval", f"layer {shorten(first)} does not exist", "the first layer is 0")
    if max(first, last) > _MAX_LAYER:
        raise InvalidValue("invalid-interval", f"layer {shorten(max(first, last))} does not exist")
    if first > last:
        raise InvalidValue("invalid-interval", f"[{first}, {last}] is reversed", f"did you mean [{last}, {first}]?")
    return first, last


def _as_intervals(value: object) -> object:
    """One interval or several, as several."""
    several = isinstance(value, list | tuple) and any(isinstance(entry, list | tuple) for entry in value)
    return value if several or value is None else (_check_interval(value),)


def _as_written(intervals: tuple[tuple[int, int], ...] | None) -> object:
    """One interval by itself."""
    return intervals[0] if intervals and len(intervals) == 1 else intervals


def _check_alpha(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        remedy = "alpha is the weight of the pre-trained side, from 0 to 1"
        raise InvalidValue("invalid-alpha", f"{shorten(value)} is not an alpha", remedy)
    return float(value)


def _check_alpha_or_gradient(value: object) -> object:
    if not isinstance(value, list | tuple):
        return _check_alpha(value)
    if len(value) != 2:
        remedy = "write [alpha of the first layer, alpha of the last]"
        raise InvalidValue("invalid-alpha", f"{shorten(value)} is not a gradient", remedy)
    return tuple(map(_check_alpha, value))


Text = Annotated[str, Field(min_length=1, strict=True)]
_LayerNumber = Annotated[int, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[
    tuple[int, int], BeforeValidator(_check_interval, json_schema_input_type=tuple[_LayerNumber, _LayerNumber])
]
_Intervals = Annotated[list[Interval], Field(min_length=1)]
Alpha = Annotated[float, BeforeValidator(_check_alpha, json_schema_input_type=_Share)]


class LayerRule(Model):
    """An alpha for a range of layers, or for some modules inside them."""

    range: Interval = Field(description="First and last layer, both included.")
    alpha: Annotated[
        float | tuple[float, float],
        BeforeValidator(_check_alpha_or_gradient, json_schema_input_type=_Share | tuple[_Share, _Share]),
    ] = Field(description="The weight of the pre-trained side, or [at the first layer, at the last].")
    modules: tuple[Text, ...] = Field(
        default=("*",),
        min_length=1,
        description="Module names (self_attn, q_proj) or globs (mlp.*_proj) inside the layer; default: all of it.",
    )

    def model_post_init(self, _: Any) -> None:
        first, last = self.range
        if isinstance(self.alpha, tuple) and first == last:
            what = f"a gradient needs more than the single layer {first}"
            raise InvalidValue("invalid-alpha", what, "write one alpha")

    def alpha_at(self, layer: int) -> float:
        """The alpha of one layer of the range: linear between the ends of a gradient, which are met exactly."""
        if not isinstance(self.alpha, tuple):
            return self.alpha
        first, last = self.range
        start, end = self.alpha
        return end if layer == last else start + (end - start) * (layer - first) / (last - first)


class TensorRule(Model):
    """An alpha for every tensor whose full name matches a glob."""

    match: Text = Field(description="A glob over full tensor names, such as model.embed_tokens.*")
    alpha: Alpha = Field(description="The weight of the pre-trained side, from 0 to 1.")


class Rules(Model):
    """What to take from which side: `alpha`, then `restore`, `layers`, `tensors`; the last that names a tensor wins."""

    restore: Annotated[
        tuple[Interval, ...] | None,
        BeforeValidator(_as_intervals, json_schema_input_type=Interval | _Intervals | None),
        PlainSerializer(_as_written),  # not a field_serializer: with one, pydantic does not leave out the default
    ] = Field(
        default=None,
        description="Layers to reset to their pre-trained weights: [first, last], both included, or a list of such.",
    )
    alpha: Alpha | None = Field(
        default=None, description="The weight of the pre-trained side for every tensor: a soup. Default: 0."
    )
    layers: tuple[LayerRule, ...] = Field(default=(), description="Alphas by layer and module; later entries win.")
    tensors: tuple[TensorRule, ...] = Field(default=(), description="Alphas by tensor name; later entries win.")

    @property
    def has_rules(self) -> bool:
        """Whether it says what to merge, and not only which two checkpoints."""
        return self.restore is not None or self.alpha is not None or bool(self.layers or self.tensors)

    def rules(self) -> dict[str, Any]:
        """The rules alone, as plain values, without what is at its default."""
        return dict(plain(self, include=set(Rules.model_fields)))
