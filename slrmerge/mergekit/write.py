"""Alphas → a config that gives them."""

from collections.abc import Callable, Mapping
from typing import Any

from slrmerge.errors import Problem, RecipeError
from slrmerge.mergekit.read import read_config
from slrmerge.mergekit.rules import Locate, is_before_layers


def write_config(
    alphas: Mapping[str, float], locate: Locate, layers: int, *, pretrained: str, posttrained: str, blend: str
) -> dict[str, Any]:
    """A mergekit config that gives every tensor its alpha; `pretrained` and `posttrained` are what to call the sides.

    Raises RecipeError where mergekit has no words for that, with tensors that would come out otherwise.
    """
    spans = [(_only(inner), inner, first, stop) for inner, first, stop in _runs(alphas, locate, layers)]
    before, after = (
        {name: alpha for name, alpha in alphas.items() if not locate(name) and is_before_layers(name) == side}
        for side in (True, False)
    )
    if before and (_only(before) is None or not spans or spans[0][0] != _only(before)):
        spans.insert(0, (_only(before), before, 0, 0))
    if after and (_only(after) is None or spans[-1][0] != _only(after)):
        spans.append((_only(after), after, layers, layers))
    between = any(0 < alpha < 1 for alpha in alphas.values())
    method = "slerp" if between and blend == "slerp" else "linear"
    if not between and all(alpha is not None for alpha, *_ in spans):
        method = "passthrough"
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
        count = "1 tensor" if len(lost) == 1 else f"{len(lost)} tensors"
        what = f"mergekit has no words for this: {count} would come out otherwise ({named})"
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


def _only(alphas: Mapping[str, float]) -> float | None:
    values = set(alphas.values())
    return values.pop() if len(values) == 1 else None


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
    dot = "."

    def source(model: str, **more: Any) -> dict[str, Any]:
        return {"model": model, **({"layer_range": list(span)} if span else {}), **more}

    if method == "passthrough":
        return {"sources": [source(pretrained if alpha else posttrained)]}
    if span and span[0] == span[1]:
        dot = ""  # outside the layers, where names begin with what is filtered
    share = _setting(alpha, inner, lambda value: value, dot)
    if method == "slerp":
        return {"sources": [source(posttrained), source(pretrained)], "parameters": {"t": share}}
    rest = _setting(alpha, inner, _rest, dot)
    weights = ((posttrained, rest), (pretrained, share))
    return {"sources": [source(model, parameters={"weight": weight}) for model, weight in weights]}


def _rest(alpha: float) -> float:
    """The other side's weight, as people would write it where that comes out the same."""
    plain = round(1 - alpha, 15)
    return plain if alpha / (alpha + plain) == alpha else 1 - alpha


def _setting(alpha: float | None, inner: Mapping[str, float], of: Callable[[float], float], dot: str) -> Any:
    """One number, or a filter for every module that is treated otherwise than most."""
    if alpha is not None:
        return of(alpha)
    usual = max(set(inner.values()), key=list(inner.values()).count)
    filters = {_filter_for(name, inner, dot): value for name, value in inner.items() if value != usual}
    return [*({"filter": text, "value": of(value)} for text, value in filters.items()), {"value": of(usual)}]


def _filter_for(name: str, inner: Mapping[str, float], dot: str) -> str:
    """The shortest run of a name's components that no tensor of another alpha has."""
    parts = name.split(".")
    ends = [(i, i + length) for length in range(1, len(parts)) for i in range(len(parts) - length)]
    for first, stop in ends:
        text = f"{dot}{'.'.join(parts[first:stop])}."
        if {alpha for other, alpha in inner.items() if text in dot + other} == {inner[name]}:
            return text
    return dot + name
