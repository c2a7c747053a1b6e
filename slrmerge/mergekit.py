"""mergekit's configs as merges of two checkpoints: what stands for which side, and the weight of each tensor.

mergekit's words: https://github.com/arcee-ai/mergekit, docs of the config and of its methods. Its `layer_range`s are
half-open, and this module alone knows that. What it does with more than two models, or with layers in another order, is
no merge of two checkpoints and refused.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from slrmerge.errors import Problem, RecipeError, did_you_mean, raise_all
from slrmerge.written import Location, Strict, fault, problems_in, short

CONFIG_NAME = "mergekit_config.yml"

METHODS = ("passthrough", "linear", "task_arithmetic", "slerp")

Locate = Callable[[str], tuple[int, str] | None]
"""A tensor's name → its layer and its name in there."""


def is_config(content: Mapping[Any, Any]) -> bool:
    """Whether a YAML file's content is shaped like a mergekit config."""
    return "merge_method" in content


def _model(value: object) -> str:
    if isinstance(value, dict) and value.keys() <= {"path", "revision"} and "path" in value:
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
Parameters = dict[str, Any]
MergeDtype = Literal["float64", "float32", "float16", "bfloat16"]


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
    models: list[Source] | None = None
    slices: list[Slice] | None = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: MergeDtype | None = None
    out_dtype: MergeDtype | None = None
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


def _model_at(location: Location) -> type[BaseModel]:
    parts = [step for step in location if isinstance(step, str)]
    if parts in (["models"], ["slices", "sources"]):
        return Source
    return Slice if parts == ["slices"] else Config


_REFUSED_KEYS = {
    "modules": "mergekit would merge each module by a config of its own",
    "tokenizer": "mergekit would build a new tokenizer",
}
_PARAMETERS = {
    "passthrough": (),
    "linear": ("weight", "normalize"),
    "task_arithmetic": ("weight", "normalize", "lambda"),
    "slerp": ("t",),
}


def read_config(content: Mapping[Any, Any], where: str) -> tuple[dict[str, Any], "Rules"]:
    """A mergekit config as the content of a recipe without rules, and its rules.

    mergekit's base model gives config and tokenizer, so it is the post-trained side; without one, the first model that
    is named. Raises RecipeError with everything that cannot be said as a merge of two checkpoints.
    """
    problems = [
        Problem(f"{where}: $.{key}", "cannot be said as a merge of two checkpoints", why)
        for key, why in _REFUSED_KEYS.items()
        if key in content
    ]
    try:
        config = Config.model_validate({str(k): v for k, v in content.items() if k not in _REFUSED_KEYS})
    except ValidationError as error:
        raise RecipeError(*problems, *problems_in(where, error, _model_at)) from None
    raise_all([*problems, *_config_problems(config, where)], RecipeError)
    donor, other = config.named
    recipe: dict[str, Any] = {"pretrained": _from_here(other), "posttrained": _from_here(donor)}
    if dtype := config.out_dtype or config.dtype:
        recipe["dtype"] = dtype
    if config.merge_method == "slerp":
        recipe["blend"] = "slerp"
    if config.tokenizer_source == other:
        recipe["tokenizer"] = "pretrained"
    return recipe, Rules(config, other, where)


def _from_here(model: str) -> str:
    """A folder as mergekit finds it, which is from where it is run; anything else as it is."""
    return str(Path(model).absolute()) if os.path.exists(model) else model  # noqa: PTH110 (a name too long is no error)


def _config_problems(config: Config, where: str) -> Iterator[Problem]:
    method, models = config.merge_method, config.named
    if method not in METHODS:
        what = f"{method} is no merge that takes each tensor from two checkpoints alike"
        yield Problem(f"{where}: $.merge_method", what, f"known: {', '.join(METHODS)}; for others use mergekit")
        return
    if len(models) != 2:
        said = "names only one model" if len(models) < 2 else f"names {len(models)} models: {', '.join(models)}"
        yield Problem(f"{where}: $", said, "a merge here is of two")
    if method in ("slerp", "task_arithmetic") and config.base_model is None:
        yield Problem(f"{where}: $.base_model", "is missing", f"{method} starts from it")
    bases = {part.base_model for part in config.layers} - {None, config.base_model}
    if bases:
        what = f"a slice has {bases.pop()} as its base"
        yield Problem(f"{where}: $.slices", what, "mergekit would start some layers from another model")
    if config.tokenizer_source not in (None, "base", *models):
        what = f"{config.tokenizer_source} is neither base nor one of the two models"
        why = "mergekit would build a new tokenizer" if config.tokenizer_source == "union" else "name one of them"
        yield Problem(f"{where}: $.tokenizer_source", what, why)
    known = _PARAMETERS[method]
    levels = [config.parameters, *(part.parameters for part in config.layers)]
    levels += [source.parameters for part in config.layers for source in part.sources]
    for key in dict.fromkeys(key for level in levels for key in level if key not in known):
        remedy = did_you_mean(key, known) if known else "leave it out"
        yield Problem(f"{where}: $.parameters", f"{method} has no {key} here", remedy)


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
        inner_names: set[str] = set()
        for name in () if problems else names:
            place = locate(name)
            inner_names.add(place[1] if place else name)
            part, position = self._place(name, place[0] if place else None, spans)
            try:
                alphas[name] = self._alpha(part, name, position)
            except _NoWeightError as error:
                faults.setdefault(f"{error}")
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
            place = f"{self.where}: $.slices[{number}]"
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
            what = f"makes {expected} layers of a model that has {layers}"
            yield Problem(total, what, "mergekit would write a model of another depth")

    def _place(self, name: str, layer: int | None, spans: list[tuple[Slice, int, int]]) -> tuple[Slice, float]:
        """The slice that a tensor belongs to and its place in it, from 0 to 1.

        What stands before the layers belongs to the first slice, what stands behind them to the last, both at 0.
        """
        if layer is None:
            return spans[0 if _is_before_layers(name) else -1][0], 0.0
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
            if self.config.models and self.config.base_model not in (None, *(source.model for source in sources)):
                raise _NoWeightError(f"there is no weight of the base model {self.config.base_model}")
            weights = {source.model: value("weight", source, None) for source in sources}
            total = sum(weights.values())
            if not value("normalize", None, 1.0) and abs(total - 1) > 1e-9:
                raise _NoWeightError(f"the weights of {name} sum to {total:g} and normalize is false, which is no mean")
            if total == 0:
                raise _NoWeightError(f"the weights of {name} sum to 0")
            alpha = weights.get(self.other, 0.0) / total
        if not -1e-9 <= alpha <= 1 + 1e-9:
            raise _NoWeightError(f"{name} gets {alpha:g} of {self.other}, which is past one of the two models")
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
            raise _NoWeightError(f"there is no {key}{of} for {name}")
        return default


class _NoWeightError(Exception):
    """Why a tensor's weight cannot be told."""


def _is_before_layers(name: str) -> bool:
    return any(part in name for part in ("embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "embeddings"))


def _evaluated(setting: object, name: str, position: float) -> float | None:
    """A setting at a place: a number, a gradient over the slice, or the first filter that the name contains."""
    if isinstance(setting, bool | int | float):
        return float(setting)
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list) or not setting:
        raise _NoWeightError(f"{short(setting)} is not a number, a gradient or a list of filters")
    if all(isinstance(value, int | float) for value in setting):
        scaled = position * (len(setting) - 1)
        lower = int(scaled)
        upper = min(lower + 1, len(setting) - 1)
        return float(setting[lower] + (setting[upper] - setting[lower]) * (scaled - lower))
    for entry in setting:
        if not isinstance(entry, dict) or not entry.keys() <= {"filter", "value"} or "value" not in entry:
            raise _NoWeightError(f"{short(entry)} is not {{filter: …, value: …}}")
        if entry.get("filter") in (None, "*") or str(entry["filter"]) in name:
            return _evaluated(entry["value"], name, position)
    return None


def write_config(
    alphas: Mapping[str, float], locate: Locate, layers: int, *, pretrained: str, posttrained: str, blend: str
) -> dict[str, Any]:
    """A mergekit config that gives every tensor its alpha; `pretrained` and `posttrained` are what to call the sides.

    Raises RecipeError where mergekit has no words for that, with tensors that would come out otherwise.
    """
    runs = _runs(alphas, locate, layers)
    ends = [
        _only({alpha for name, alpha in alphas.items() if not locate(name) and _is_before_layers(name) == before})
        for before in (True, False)
    ]
    method = "slerp" if blend == "slerp" else "linear"
    if all(alpha in (0, 1) for alpha in alphas.values()):
        method = "passthrough"
    spans = [(_only(set(inner.values())), inner, first, stop) for inner, first, stop in runs]
    if ends[0] is not None and (not spans or spans[0][0] != ends[0]):
        spans.insert(0, (ends[0], {}, 0, 0))
    if ends[1] is not None and spans[-1][0] != ends[1]:
        spans.append((ends[1], {}, layers, layers))
    sides = {"pretrained": pretrained, "posttrained": posttrained, "method": method}
    config: dict[str, Any] = {"merge_method": method, "base_model": posttrained}
    whole = len(spans) == 1 and method != "passthrough"
    parts = [_part(alpha, inner, None if whole else (first, stop), **sides) for alpha, inner, first, stop in spans]
    if whole:
        config["models"] = parts[0]["sources"]
        config |= {key: value for key, value in parts[0].items() if key == "parameters"}
    else:
        config["slices"] = parts
    _, rules = read_config(config, "the config")
    again, problems = rules.alphas(alphas, locate, layers)
    lost = [name for name in alphas if abs(again.get(name, -1) - alphas[name]) > 1e-12]
    if problems or lost:
        named = ", ".join(lost[:3]) + (", …" if len(lost) > 3 else "")
        what = f"mergekit has no words for this: {len(lost)} tensors would come out otherwise ({named})"
        raise RecipeError(Problem("the recipe", what, "it knows layers, and names by what they contain"))
    return config


def _runs(alphas: Mapping[str, float], locate: Locate, layers: int) -> list[tuple[dict[str, float], int, int]]:
    """Neighbouring layers that are treated alike: alphas by inner name, first layer, one past the last."""
    inside: list[dict[str, float]] = [{} for _ in range(layers)]
    for name, alpha in alphas.items():
        if place := locate(name):
            inside[place[0]][place[1]] = alpha
    runs: list[tuple[dict[str, float], int, int]] = []
    for layer, inner in enumerate(inside):
        if runs and runs[-1][0] == inner:
            runs[-1] = (inner, runs[-1][1], layer + 1)
        else:
            runs.append((inner, layer, layer + 1))
    return runs


def _only(values: set[float]) -> float | None:
    return next(iter(values)) if len(values) == 1 else None


def _part(
    alpha: float | None,
    inner: Mapping[str, float],
    span: tuple[int, int] | None,
    *,
    pretrained: str,
    posttrained: str,
    method: str,
) -> dict[str, Any]:
    """A slice of the output, or without a `span` what stands for all layers."""

    def source(model: str, **more: Any) -> dict[str, Any]:
        return {"model": model, **({"layer_range": list(span)} if span else {}), **more}

    if method == "passthrough":
        return {"sources": [source(pretrained if alpha else posttrained)]}
    share = _setting(alpha, inner, lambda value: value)
    if method == "slerp":
        return {"sources": [source(posttrained), source(pretrained)], "parameters": {"t": share}}
    rest = _setting(alpha, inner, lambda value: round(1 - value, 15))
    weights = ((posttrained, rest), (pretrained, share))
    return {"sources": [source(model, parameters={"weight": weight}) for model, weight in weights]}


def _setting(alpha: float | None, inner: Mapping[str, float], of: Callable[[float], float]) -> Any:
    """One number, or a filter for every module that is treated otherwise than most."""
    if alpha is not None:
        return of(alpha)
    usual = max(set(inner.values()), key=list(inner.values()).count)
    modules = {name.rpartition(".")[0].partition(".")[0] or name: value for name, value in inner.items()}
    others = [{"filter": f".{module}.", "value": of(value)} for module, value in modules.items() if value != usual]
    return [*others, {"value": of(usual)}]
