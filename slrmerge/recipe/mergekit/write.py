"""Alphas → the config that gives them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from slrmerge.checkpoint.layers import LayerStack
from slrmerge.errors import Problem, RecipeError
from slrmerge.recipe.alphas import TensorAlphas
from slrmerge.recipe.blend import BLEND_RULES
from slrmerge.recipe.mergekit.recipe import MergekitRecipe
from slrmerge.recipe.mergekit.weights import is_before_layers, resolve_config


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring layers with the same alphas by inner name, or tensors outside the layers (`first` equals `stop`)."""

    alphas: Mapping[str, float]
    first: int
    stop: int

    @property
    def alpha(self) -> float | None:
        """The alpha of all tensors, or None where they differ."""
        values = set(self.alphas.values())
        return values.pop() if len(values) == 1 else None


def write_config(alphas: TensorAlphas, stack: LayerStack, *, pretrained: str, posttrained: str) -> dict[str, Any]:
    """A mergekit config that gives every tensor its alpha; `pretrained` and `posttrained` name the models.

    Raises RecipeError where mergekit cannot express the merge, with tensors that would differ.
    """
    if not any(alphas.values()):
        what = "it keeps every tensor of the post-trained model"
        raise RecipeError(Problem("nothing-to-merge", "the recipe", what, "restore or blend something"))
    groups = _with_outside(list(_layer_groups(alphas, stack)), alphas, stack)
    rule = BLEND_RULES[alphas.blend]
    if any(0 < alpha < 1 for alpha in alphas.values()):
        method, parameter = rule.mergekit_method, rule.mergekit_parameter
    elif all(group.alpha is not None for group in groups):
        method, parameter = "passthrough", None
    else:
        method, parameter = "linear", None
    config: dict[str, Any] = {"merge_method": method, "base_model": posttrained}
    whole = len(groups) == 1 and method != "passthrough"
    slices = [_slice(group, method, parameter, pretrained, posttrained, ranges=not whole) for group in groups]
    if whole:
        config |= {"models" if key == "sources" else key: value for key, value in slices[0].items()}
    else:
        config["slices"] = slices
    _check(config, alphas, stack, pretrained)
    return config


def _layer_groups(alphas: Mapping[str, float], stack: LayerStack) -> Iterator[_Group]:
    inside: list[dict[str, float]] = [{} for _ in range(stack.count)]
    for name, alpha in alphas.items():
        if place := stack.locate(name):
            inside[place[0]][place[1]] = alpha
    first = 0
    for layer in range(1, stack.count + 1):
        if layer == stack.count or inside[layer] != inside[first]:
            yield _Group(inside[first], first, layer)
            first = layer


def _with_outside(groups: list[_Group], alphas: Mapping[str, float], stack: LayerStack) -> list[_Group]:
    """mergekit counts tensors outside the layers to the first or last slice: zero-length slices where that is wrong."""
    outside = {name: alpha for name, alpha in alphas.items() if not stack.locate(name)}
    before = _Group({name: alpha for name, alpha in outside.items() if is_before_layers(name)}, 0, 0)
    after_alphas = {name: alpha for name, alpha in outside.items() if not is_before_layers(name)}
    after = _Group(after_alphas, stack.count, stack.count)
    if before.alphas and (before.alpha is None or groups[0].alpha != before.alpha):
        groups = [before, *groups]
    if after.alphas and (after.alpha is None or groups[-1].alpha != after.alpha):
        groups = [*groups, after]
    return groups


def _slice(
    group: _Group, method: str, parameter: str | None, pretrained: str, posttrained: str, *, ranges: bool
) -> dict[str, Any]:
    def source(model: str, **more: Any) -> dict[str, Any]:
        return {"model": model, **({"layer_range": [group.first, group.stop]} if ranges else {}), **more}

    if method == "passthrough":
        return {"sources": [source(pretrained if group.alpha else posttrained)]}
    # Outside the layers, names begin with what is filtered.
    dot = "" if ranges and group.first == group.stop else "."
    share = _setting(group, lambda alpha: alpha, dot)
    if parameter is not None:
        return {"sources": [source(posttrained), source(pretrained)], "parameters": {parameter: share}}
    weights = ((posttrained, _setting(group, _rest, dot)), (pretrained, share))
    return {"sources": [source(model, parameters={"weight": weight}) for model, weight in weights]}


def _rest(alpha: float) -> float:
    """The other side's weight, as people would write it where that gives the same alpha."""
    rounded = round(1 - alpha, 15)
    return rounded if alpha / (alpha + rounded) == alpha else 1 - alpha


def _setting(group: _Group, weight: Callable[[float], float], dot: str) -> Any:
    """One number, or a filter for every module whose alpha is not the most frequent one."""
    if group.alpha is not None:
        return weight(group.alpha)
    values = list(group.alphas.values())
    usual = max(set(values), key=values.count)
    filters = {_filter_for(name, group.alphas, dot): alpha for name, alpha in group.alphas.items() if alpha != usual}
    return [*({"filter": text, "value": weight(alpha)} for text, alpha in filters.items()), {"value": weight(usual)}]


def _filter_for(name: str, alphas: Mapping[str, float], dot: str) -> str:
    """The shortest run of a name's components that no tensor of another alpha contains."""
    parts = name.split(".")
    runs = [(i, i + length) for length in range(1, len(parts)) for i in range(len(parts) - length)]
    for first, stop in runs:
        text = f"{dot}{'.'.join(parts[first:stop])}."
        if {alpha for other, alpha in alphas.items() if text in dot + other} == {alphas[name]}:
            return text
    return dot + name


def _check(config: dict[str, Any], alphas: TensorAlphas, stack: LayerStack, pretrained: str) -> None:
    """Raise RecipeError unless the config gives the alphas back."""
    read = MergekitRecipe.from_dict(config)
    resolved = resolve_config(read.config, pretrained, alphas, stack, blend=alphas.blend, where="the config")
    lost = [name for name in alphas if abs(resolved.alphas.get(name, -1) - alphas[name]) > 1e-12]
    if resolved.problems or lost:
        named = ", ".join(lost[:3]) + (", …" if len(lost) > 3 else "")
        count = "1 tensor" if len(lost) == 1 else f"{len(lost)} tensors"
        what = f"mergekit cannot express it: {count} would differ ({named})"
        raise RecipeError(
            Problem("not-in-mergekit", "the recipe", what, "mergekit selects by layers and by parts of names only")
        )
