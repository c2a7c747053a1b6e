"""A mergekit config, once the layers are known, in a recipe's own words."""

from collections.abc import Mapping
from glob import escape
from itertools import groupby
from operator import itemgetter
from typing import Any

from slrmerge.checkpoint import LayerStack
from slrmerge.plan.routes import route
from slrmerge.plan.summary import by_module
from slrmerge.recipe import Recipe


def spelled_out(recipe: Recipe, alphas: Mapping[str, float], stack: LayerStack | None) -> Recipe:
    """The recipe itself, or what a mergekit config says as one: the fewest rules that give every tensor its alpha."""
    if recipe.mergekit is None:
        return recipe
    rules = _rules(alphas, stack)
    routed, _ = route(recipe.spelled_out(rules), alphas, stack)
    astray = {name: alpha for name, alpha in alphas.items() if routed[name] != alpha}
    rules["tensors"] = [*rules.get("tensors", ()), *map(_of_tensor, astray.items())]
    return recipe.spelled_out({key: value for key, value in rules.items() if value != []})


def _of_tensor(entry: tuple[str, float]) -> dict[str, Any]:
    return {"match": escape(entry[0]), "alpha": entry[1]}


def _rules(alphas: Mapping[str, float], stack: LayerStack | None) -> dict[str, Any]:
    layers: dict[int, dict[str, float]] = {}
    outside: dict[str, float] = {}
    for name, alpha in alphas.items():
        if stack and (place := stack.locate(name)):
            layers.setdefault(place[0], {})[place[1]] = alpha
        else:
            outside[name] = alpha
    everything = set(alphas.values())
    if len(everything) == 1:
        return {"alpha": everything.pop()}
    runs = [
        (treatment, [layer for layer, _ in run])
        for treatment, run in groupby(
            ((layer, by_module(inner)) for layer, inner in sorted(layers.items())), key=itemgetter(1)
        )
    ]
    rules: dict[str, Any] = {}
    if all(treatment in (((0.0, ()),), ((1.0, ()),)) for treatment, _ in runs):
        rules["restore"] = [[run[0], run[-1]] for treatment, run in runs if treatment == ((1.0, ()),)]
    else:
        rules["layers"] = [
            {"range": [run[0], run[-1]], "alpha": alpha, **({"modules": list(modules)} if modules else {})}
            for treatment, run in runs
            for alpha, modules in treatment
            if alpha
        ]
    rules["tensors"] = [_of_tensor(entry) for entry in outside.items() if entry[1]]
    return {key: value for key, value in rules.items() if value}
