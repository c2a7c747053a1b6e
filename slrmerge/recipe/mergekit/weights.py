"""A config's parameters → the alpha of each tensor."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from slrmerge.checkpoint.layers import LayerStack
from slrmerge.errors import Problem
from slrmerge.io.sizes import shorten
from slrmerge.recipe.alphas import Resolution, TensorAlphas
from slrmerge.recipe.blend import BLEND_RULES
from slrmerge.recipe.mergekit.config import MergekitConfig, Slice, SliceSource

INTERPOLATIONS = {rule.mergekit_method: rule for rule in BLEND_RULES.values() if rule.mergekit_parameter}
"""Methods with one parameter that is alpha, rather than a weight for each model."""

_INPUT_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "embeddings")


_EXPECTED = "write a number, a gradient [first, …, last], or a list of {filter: …, value: …}"


def is_before_layers(name: str) -> bool:
    """Whether mergekit counts a tensor outside the layers to the first slice; the others belong to the last."""
    return any(part in name for part in _INPUT_EMBEDDINGS)


@dataclass(frozen=True, slots=True)
class Span:
    """A slice and the layers that it makes: `first` to `stop`, half-open."""

    part: Slice
    first: int
    stop: int


class InvalidWeightError(Exception):
    """Why the alpha of a tensor cannot be determined; becomes a Problem about the config."""

    def __init__(self, code: str, what: str, remedy: str) -> None:
        super().__init__(what)
        self.code, self.what, self.remedy = code, what, remedy


def resolve_config(
    config: MergekitConfig, other: str, names: Iterable[str], stack: LayerStack, *, blend: str, where: str
) -> Resolution:
    """The alpha of every tensor: the share of `other`, the model that is not the base model."""
    spans = [Span(part, *(part.sources[0].layer_range or (0, stack.count))) for part in config.parts]
    problems = list(_span_problems(config, spans, stack.count, where))
    alphas: dict[str, float] = {}
    invalid: dict[str, InvalidWeightError] = {}
    for name in () if problems else names:
        located = stack.locate(name)
        part, position = _place_of(name, located[0] if located else None, spans)
        try:
            alphas[name] = _alpha(_Parameters(config, part, name, position), other)
        except InvalidWeightError as error:
            invalid.setdefault(error.what, error)
    problems += [Problem(error.code, where, error.what, error.remedy) for error in invalid.values()]
    return Resolution(TensorAlphas(alphas, blend=blend), problems)


def _span_problems(config: MergekitConfig, spans: list[Span], layers: int, where: str) -> Iterator[Problem]:
    expected = 0
    for number, span in enumerate(spans):
        place = f"{where}: ${f'.slices[{number}]' if config.slices else '.models'}"
        if any((source.layer_range or (0, layers)) != (span.first, span.stop) for source in span.part.sources):
            remedy = "give them one layer_range: layers of different depth cannot be merged here"
            yield Problem("layers-misaligned", place, "its sources have different layer ranges", remedy)
        if span.first != expected:
            what = f"starts at layer {span.first}, expected {expected}"
            yield Problem("layers-reordered", place, what, "use mergekit to stack layers in another order")
            return
        expected = span.stop
    if expected != layers:
        what = f"makes {expected} layer{'s' if expected != 1 else ''} of a model that has {layers}"
        place = f"{where}: ${'.slices' if config.slices else ''}"
        yield Problem("layers-reordered", place, what, "use mergekit to make a model of another depth")


def _place_of(name: str, layer: int | None, spans: list[Span]) -> tuple[Slice, float]:
    """The slice of a tensor and its position in it, from 0 to 1; outside the layers the position is 0."""
    if layer is None:
        return spans[0 if is_before_layers(name) else -1].part, 0.0
    span = next(span for span in spans if span.first <= layer < span.stop)
    length = span.stop - span.first
    return span.part, (layer - span.first) / (length - 1) if length > 1 else 1.0


@dataclass(frozen=True, slots=True)
class _Parameters:
    """The parameters of the tensor `name`, at a position in a slice from 0 to 1."""

    config: MergekitConfig
    part: Slice
    name: str
    position: float

    def value(self, key: str, source: SliceSource | None = None, *, default: float | None = None) -> float:
        """A parameter: the source's, the slice's or the config's; the first that has a value for the tensor."""
        levels = [source.parameters if source else {}, self.part.parameters, self.config.parameters]
        for setting in (level[key] for level in levels if key in level):
            found = _evaluate(setting, self.name, self.position)
            if found is not None:
                return found
        if default is None:
            what = f"no {key} is given" + (f" for {source.model}" if source else "")
            raise InvalidWeightError("missing-weight", what, "add it to the parameters")
        return default


def _alpha(parameters: _Parameters, other: str) -> float:
    """The share of `other` in a tensor, by the method of the config."""
    method = parameters.config.merge_method
    compute = _interpolated if method in INTERPOLATIONS else _SHARES[method]
    alpha = compute(parameters, other)
    if not -1e-9 <= alpha <= 1 + 1e-9:
        what = f"the share of {other} is {alpha:g}, which is not between 0 and 1"
        raise InvalidWeightError("alpha-out-of-range", what, "use mergekit to extrapolate")
    return min(max(alpha, 0.0), 1.0)


def _passed_through(parameters: _Parameters, other: str) -> float:
    source, *others = parameters.part.sources
    if others:
        raise InvalidWeightError("unsupported-sources", "passthrough takes one source per slice", "remove the others")
    return float(source.model == other)


def _interpolated(parameters: _Parameters, other: str) -> float:
    method, base = parameters.config.merge_method, parameters.config.base_model
    models = [source.model for source in parameters.part.sources]
    if {*models, base} != {base, other} or len(models) > 2:
        what = f"{method} goes from the base model to one other"
        raise InvalidWeightError("unsupported-sources", what, "give each slice both models, each once")
    return parameters.value(INTERPOLATIONS[method].mergekit_parameter or "")


def _task_arithmetic(parameters: _Parameters, other: str) -> float:
    task = next((source for source in parameters.part.sources if source.model == other), None)
    weight = parameters.value("weight", task) if task else 0.0
    share = 1.0 if parameters.value("normalize", default=0.0) and weight else weight
    return share * parameters.value("lambda", default=1.0)


def _mean(parameters: _Parameters, other: str) -> float:
    config, sources = parameters.config, parameters.part.sources
    if config.models and config.base_model and config.base_model not in {source.model for source in sources}:
        sources = (*sources, SliceSource(model=config.base_model))
    weights = {source.model: parameters.value("weight", source) for source in reversed(sources)}
    total = sum(weights.values())
    if not parameters.value("normalize", default=1.0) and abs(total - 1) > 1e-9:
        what = f"the weights sum to {total:g} and normalize is false"
        raise InvalidWeightError("not-a-mean", what, "remove normalize, or let the weights sum to 1")
    if total == 0:
        raise InvalidWeightError("not-a-mean", "the weights sum to 0", "give the models weights with another sum")
    return weights.get(other, 0.0) / total


_SHARES = {"passthrough": _passed_through, "task_arithmetic": _task_arithmetic, "linear": _mean}
"""The share of the other model in a tensor, by the methods that are not in `INTERPOLATIONS`."""


def _evaluate(setting: object, name: str, position: float) -> float | None:
    """A setting at a position: a number, a gradient over the slice, or the first filter that the name contains."""
    if isinstance(setting, bool | int | float | str):
        return _number(setting)
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list) or not setting:
        raise InvalidWeightError("invalid-weight", f"{shorten(setting)} is not a weight", _EXPECTED)
    if all(isinstance(value, int | float | str) for value in setting):
        values = [_number(value) for value in setting]
        scaled = position * (len(values) - 1)
        lower = int(scaled)
        upper = min(lower + 1, len(values) - 1)
        return (1 - (scaled - lower)) * values[lower] + (scaled - lower) * values[upper]
    for entry in setting:
        if not isinstance(entry, dict) or not entry.keys() <= {"filter", "value"} or "value" not in entry:
            raise InvalidWeightError("invalid-weight", f"{shorten(entry)} is not a filter", _EXPECTED)
        if entry.get("filter") in (None, "*") or str(entry["filter"]) in name:
            return _evaluate(entry["value"], name, position)
    return None


def _number(value: bool | float | str) -> float:
    """A number, or a string that is one: YAML 1.1 reads 1e-3 as a string."""
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise InvalidWeightError("invalid-weight", f"{shorten(value)} is not a number", _EXPECTED) from None
