"""A config's parameters → the weight of each tensor."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from slrmerge.errors import Problem
from slrmerge.mergekit.config import Config, Slice, Source
from slrmerge.structure import short

Locate = Callable[[str], tuple[int, str] | None]
"""A tensor's name → its layer and its name in there."""


@dataclass(frozen=True)
class Rules:
    """A config's weights: for every tensor the share of the side that is not the donor."""

    config: Config
    other: str
    where: str

    def alphas(self, names: Iterable[str], locate: Locate, layers: int) -> tuple[dict[str, float], list[Problem]]:
        """The alpha of every tensor, and what is wrong with the config for a model of so many layers."""
        spans = list(self._spans(layers))
        problems = list(self._span_problems(spans, layers))
        alphas: dict[str, float] = {}
        faults: dict[str, None] = {}
        for name in () if problems else names:
            place = locate(name)
            part, position = self._place(name, place[0] if place else None, spans)
            try:
                alphas[name] = self._alpha(part, name, position)
            except _NoWeightError as error:
                faults[str(error)] = None
        return alphas, problems + [
            Problem(self.where, what, "see mergekit's documentation of the method") for what in faults
        ]

    def _spans(self, layers: int) -> Iterator[tuple[Slice, int, int]]:
        for part in self.config.layers:
            first, stop = part.sources[0].layer_range or (0, layers)
            yield part, first, stop

    def _span_problems(self, spans: list[tuple[Slice, int, int]], layers: int) -> Iterator[Problem]:
        expected = 0
        for number, (part, first, stop) in enumerate(spans):
            place = f"{self.where}: ${f'.slices[{number}]' if self.config.slices else '.models'}"
            if any((source.layer_range or (0, layers)) != (first, stop) for source in part.sources):
                what = "takes different layers of its sources"
                yield Problem(place, what, "mergekit would mix layers of different depth; give them one layer_range")
            if first != expected:
                what = f"starts at layer {first} where {expected} is next"
                yield Problem(place, what, "mergekit would stack the layers in that order, as another model")
                return
            expected = stop
        if expected != layers:
            total = f"{self.where}: ${'.slices' if self.config.slices else ''}"
            what = f"makes {expected} layer{'s' if expected != 1 else ''} of a model that has {layers}"
            yield Problem(total, what, "mergekit would write a model of another depth")

    def _place(self, name: str, layer: int | None, spans: list[tuple[Slice, int, int]]) -> tuple[Slice, float]:
        """The slice that a tensor belongs to and its place in it, from 0 to 1.

        What stands before the layers belongs to the first slice, what stands behind them to the last, both at 0.
        """
        if layer is None:
            return spans[0 if is_before_layers(name) else -1][0], 0.0
        part, first, stop = next(span for span in spans if span[1] <= layer < span[2])
        return part, (layer - first) / (stop - first - 1) if stop - first > 1 else 1.0

    def _alpha(self, part: Slice, name: str, position: float) -> float:
        def value(key: str, source: Source | None, default: float | None) -> float:
            return self._value(key, source, part, name, position, default)

        method, sources = self.config.merge_method, part.sources
        if method == "passthrough":
            if len(sources) > 1:
                raise _NoWeightError("passthrough takes one source a slice")
            alpha = float(sources[0].model == self.other)
        elif method == "slerp":
            self._require_both(part)
            alpha = value("t", None, None)
        elif method == "task_arithmetic":
            task = next((source for source in sources if source.model == self.other), None)
            weight = value("weight", task, None) if task else 0.0
            alpha = 1.0 if value("normalize", None, 0.0) and weight else weight
            alpha *= value("lambda", None, 1.0)
        else:
            base = self.config.base_model
            if self.config.models and base and base not in {source.model for source in sources}:
                sources = (*sources, Source(model=base))
            weights = {source.model: value("weight", source, None) for source in reversed(sources)}
            total = sum(weights.values())
            if not value("normalize", None, 1.0) and abs(total - 1) > 1e-9:
                raise _NoWeightError(f"the weights sum to {total:g} and normalize is false, which is no mean")
            if total == 0:
                raise _NoWeightError("the weights sum to 0")
            alpha = weights.get(self.other, 0.0) / total
        if not -1e-9 <= alpha <= 1 + 1e-9:
            raise _NoWeightError(f"{alpha:g} of {self.other} is past one of the two models")
        return min(max(alpha, 0.0), 1.0)

    def _require_both(self, part: Slice) -> None:
        models = {source.model for source in part.sources} | {self.config.named[0]}
        if models != {self.config.named[0], self.other} or len(part.sources) > 2:
            raise _NoWeightError("slerp goes from the base model to one other")

    def _value(
        self, key: str, source: Source | None, part: Slice, name: str, position: float, default: float | None
    ) -> float:
        """A parameter: the source's own, the slice's or the config's; the first that says something of `name`."""
        levels = [source.parameters if source else {}, part.parameters, self.config.parameters]
        for setting in (level[key] for level in levels if key in level):
            found = _evaluated(setting, name, position)
            if found is not None:
                return found
        if default is None:
            of = f" of {source.model}" if source else ""
            raise _NoWeightError(f"there is no {key}{of}")
        return default


class _NoWeightError(Exception):
    """Why a tensor's weight cannot be told."""


def is_before_layers(name: str) -> bool:
    return any(part in name for part in ("embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "embeddings"))


def _number(value: bool | float | str) -> float:
    """YAML takes 1e-3 for a text; it is meant as a number."""
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise _NoWeightError(f"{short(value)} is not a number") from None


def _evaluated(setting: object, name: str, position: float) -> float | None:
    """A setting at a place: a number, a gradient over the slice, or the first filter that the name contains."""
    if isinstance(setting, bool | int | float | str):
        return _number(setting)
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list) or not setting:
        raise _NoWeightError(f"{short(setting)} is not a number, a gradient or a list of filters")
    if all(isinstance(value, int | float | str) for value in setting):
        values = [_number(value) for value in setting]
        scaled = position * (len(values) - 1)
        lower = int(scaled)
        upper = min(lower + 1, len(values) - 1)
        return (1 - (scaled - lower)) * values[lower] + (scaled - lower) * values[upper]
    for entry in setting:
        if not isinstance(entry, dict) or not entry.keys() <= {"filter", "value"} or "value" not in entry:
            raise _NoWeightError(f"{short(entry)} is not {{filter: …, value: …}}")
        if entry.get("filter") in (None, "*") or str(entry["filter"]) in name:
            return _evaluated(entry["value"], name, position)
    return None
