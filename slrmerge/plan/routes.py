"""Recipe + tensor names → an alpha for every tensor. The last rule that names a tensor decides."""

import re
from collections.abc import Iterable
from fnmatch import translate

from slrmerge.checkpoint import LayerStack
from slrmerge.errors import Problem, did_you_mean
from slrmerge.recipe import Recipe

NO_STACK = "no stack of layers in these weights is as long as the config says, or more than one is"


class _Rule:
    """A glob, or several, with what it has matched so far."""

    def __init__(self, place: str, patterns: Iterable[str]) -> None:
        self.place = place
        self.matchers = {pattern: re.compile(translate(pattern)).match for pattern in patterns}
        self.unmatched = set(self.matchers)

    def matches(self, names: Iterable[str]) -> bool:
        """Whether any pattern matches any of `names`; every pattern that does counts as used."""
        hits = {pattern for pattern, matcher in self.matchers.items() if any(map(matcher, names))}
        self.unmatched -= hits
        return bool(hits)


def route(recipe: Recipe, names: Iterable[str], stack: LayerStack | None) -> tuple[dict[str, float], list[Problem]]:
    """The alpha of every tensor in `names`, in their order, and what in the recipe does not fit them."""
    if recipe.mergekit is not None:
        if stack is None:
            return {}, [Problem(recipe.mergekit.where, NO_STACK, "write a recipe that names the tensors")]
        return recipe.mergekit.alphas(names, stack.locate, stack.count)
    problems = _stack_problems(recipe, stack)
    modules = [
        _Rule(recipe.place(f"$.layers[{number}].modules"), rule.modules) for number, rule in enumerate(recipe.layers)
    ]
    matches = [
        _Rule(recipe.place(f"$.tensors[{number}].match"), [rule.match]) for number, rule in enumerate(recipe.tensors)
    ]
    layer_rules = list(zip(recipe.layers, modules, strict=True))
    tensor_rules = list(zip(recipe.tensors, matches, strict=True))
    restored = _restored_layers(recipe, stack)
    alphas: dict[str, float] = {}
    inner_names: set[str] = set()
    for name in names:
        alpha = recipe.alpha or 0.0
        located = stack.locate(name) if stack and (restored or layer_rules) else None
        if located:
            layer, inner = located
            if layer in restored:
                alpha = 1.0
            paths = _module_paths(inner) if layer_rules else []
            inner_names.update(paths)
            for rule, module in layer_rules:
                if rule.range[0] <= layer <= rule.range[1] and module.matches(paths):
                    alpha = rule.alpha_at(layer)
        for tensor_rule, match in tensor_rules:
            if match.matches([name]):
                alpha = tensor_rule.alpha
        alphas[name] = alpha
    for rules, known in ((modules, sorted(inner_names)), (matches, list(alphas))):
        problems += [
            Problem(rule.place, f"{pattern} matches no tensor", _nearest(pattern, known))
            for rule in rules
            for pattern in sorted(rule.unmatched)
            if known
        ]
    return alphas, problems


def _restored_layers(recipe: Recipe, stack: LayerStack | None) -> set[int]:
    layers = range(stack.count if stack else 0)
    return {layer for first, last in recipe.restore or () for layer in layers[first : last + 1]}


def _module_paths(inner: str) -> list[str]:
    """Everything a module pattern may name: runs of components, so that `q_proj` finds `self_attn.q_proj.weight`."""
    parts = inner.split(".")
    return [".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]


def _nearest(pattern: str, known: list[str]) -> str:
    if len(known) > 20 and did_you_mean(pattern, known).startswith("known"):
        return "`slrmerge inspect` lists the names"
    return did_you_mean(pattern, known)


def _stack_problems(recipe: Recipe, stack: LayerStack | None) -> list[Problem]:
    ranges = {f"$.restore[{number}]": interval for number, interval in enumerate(recipe.restore or ())}
    if len(ranges) == 1:
        ranges = {"$.restore": ranges["$.restore[0]"]}
    ranges |= {f"$.layers[{number}].range": rule.range for number, rule in enumerate(recipe.layers)}
    if ranges and stack is None:
        return [
            Problem(
                recipe.place("$.restore" if recipe.restore else "$.layers"),
                NO_STACK,
                "name the tensors themselves under `tensors`; `slrmerge inspect` lists them",
            )
        ]
    return [
        Problem(recipe.place(place), f"{last} is past the last layer ({stack.count - 1})", f"use 0–{stack.count - 1}")
        for place, (_, last) in ranges.items()
        if stack is not None and last >= stack.count
    ]
