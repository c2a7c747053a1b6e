"""The alpha of every tensor of a pair: what recipes, mergekit configs and search candidates all resolve to."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate
from typing import NamedTuple

from slrmerge.checkpoint.layers import LayerStack
from slrmerge.checkpoint.pair import no_stack_problem
from slrmerge.errors import Problem, did_you_mean
from slrmerge.recipe.rules import LayerRule, Rules, TensorRule

_MAX_SUGGESTIONS = 10
"""Each is a comparison with up to 100,000 names."""


class TensorAlphas(Mapping[str, float]):
    """The weight of the pre-trained side for every tensor of the post-trained side, in its order.

    1 restores a tensor, 0 keeps it, and `blend` says what anything between means. Immutable and hashable; those of one
    pair share the names.
    """

    __slots__ = ("_alphas", "_places", "blend")

    def __init__(self, alphas: Mapping[str, float], *, blend: str = "linear") -> None:
        if isinstance(alphas, TensorAlphas):
            self._places: Mapping[str, int] = alphas._places
        else:
            self._places = {name: place for place, name in enumerate(alphas)}
        self._alphas = tuple(alphas.values())
        self.blend = blend

    def __getitem__(self, name: str) -> float:
        return self._alphas[self._places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._alphas)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorAlphas):
            return NotImplemented
        same_names = self._places is other._places or self._places == other._places
        return self._alphas == other._alphas and self.blend == other.blend and same_names

    def __hash__(self) -> int:
        return hash((self._alphas, self.blend))

    def __repr__(self) -> str:
        restored = sum(alpha == 1 for alpha in self._alphas)
        blended = sum(0 < alpha < 1 for alpha in self._alphas)
        return f"<TensorAlphas: {restored} restored, {blended} blended, {len(self) - restored - blended} kept>"

    def with_alphas(self, alphas: Iterable[float]) -> "TensorAlphas":
        """Other alphas for the same tensors, in the same order."""
        made = TensorAlphas.__new__(TensorAlphas)
        made._places, made._alphas, made.blend = self._places, tuple(alphas), self.blend
        return made

    def restored_layers(self, stack: LayerStack | None) -> int:
        """The number of layers in which some tensor is wholly pre-trained."""
        names = (name for name, alpha in self.items() if alpha == 1)
        return len({place[0] for name in names if stack and (place := stack.locate(name))})


class Resolution(NamedTuple):
    """Resolved alphas, and what does not fit the checkpoints; with problems the alphas are incomplete."""

    alphas: TensorAlphas
    problems: list[Problem]


@dataclass
class _Matcher:
    """A glob of a rule; `used` once it has matched something."""

    place: str
    pattern: str
    used: bool = False

    def __post_init__(self) -> None:
        self._match = re.compile(translate(self.pattern)).match

    def matches(self, names: Iterable[str]) -> bool:
        found = any(map(self._match, names))
        self.used = self.used or found
        return found


class _LayerMatcher(NamedTuple):
    """A rule for a range of layers, with a matcher for each of its module patterns."""

    rule: LayerRule
    modules: list[_Matcher]

    def alpha(self, layer: int, paths: list[str], *, otherwise: float) -> float:
        """The alpha of a tensor in `layer` with these module paths."""
        first, last = self.rule.range
        if not first <= layer <= last:
            return otherwise
        matched = [each.matches(paths) for each in self.modules]  # all of them, to know which are used
        return self.rule.alpha_at(layer) if any(matched) else otherwise


class _TensorMatcher(NamedTuple):
    """A rule for the tensors that its pattern matches."""

    rule: TensorRule
    matcher: _Matcher

    def alpha(self, name: str, group: tuple[str, ...] | None, *, otherwise: float) -> float:
        """The alpha of the tensor `name`, which may be one with the others of its `group`, the embedding first."""
        named = self.matcher.matches([name])
        if group:
            named = self.matcher.matches(group if self.rule.alpha else group[:1])
        return self.rule.alpha if named else otherwise


def resolve_rules(
    rules: Rules,
    names: Iterable[str],
    stack: LayerStack | None,
    *,
    tied: Iterable[tuple[str, ...]] = (),
    blend: str = "linear",
    place: Callable[[str], str] = str,
) -> Resolution:
    """The alpha of every tensor in `names` by a recipe's rules: the last rule that names a tensor decides.

    `tied` are groups of tensors that are one, the embedding first: a rule that changes one of them changes all. A head
    cannot be kept without its embedding: an alpha of 0 for the head alone has no effect.
    `place` turns a path in the recipe (`$.layers[0]`) into the place that a problem names.
    """
    resolver = _Resolver(rules, stack, tied, place)
    alphas = {name: resolver.alpha(name) for name in names}
    problems = [*_layer_problems(rules, stack, place), *resolver.unused(list(alphas))]
    return Resolution(TensorAlphas(alphas, blend=blend), problems)


class _Resolver:
    """The rules of a recipe, compiled for a stack; see `resolve_rules`. Remembers which patterns matched something."""

    def __init__(
        self, rules: Rules, stack: LayerStack | None, tied: Iterable[tuple[str, ...]], place: Callable[[str], str]
    ) -> None:
        self._stack = stack
        self._default = rules.alpha or 0.0
        self._layers = range(stack.count if stack else 0)
        self._restored = {
            layer for layer in self._layers for first, last in rules.restore or () if first <= layer <= last
        }
        self._layer_rules = [
            _LayerMatcher(rule, [_Matcher(place(f"$.layers[{number}].modules"), pattern) for pattern in rule.modules])
            for number, rule in enumerate(rules.layers)
        ]
        self._tensor_rules = [
            _TensorMatcher(rule, _Matcher(place(f"$.tensors[{number}].match"), rule.match))
            for number, rule in enumerate(rules.tensors)
        ]
        self._groups = {name: group for group in tied for name in group}
        self._modules: set[str] = set()

    def alpha(self, name: str) -> float:
        """The alpha of a tensor: the last rule that names it decides."""
        alpha = self._default
        located = self._stack.locate(name) if self._stack and (self._restored or self._layer_rules) else None
        if located:
            layer, inner = located
            alpha = 1.0 if layer in self._restored else alpha
            paths = _module_paths(inner) if self._layer_rules else []
            self._modules.update(paths)
            for layer_rule in self._layer_rules:
                alpha = layer_rule.alpha(layer, paths, otherwise=alpha)
        for tensor_rule in self._tensor_rules:
            alpha = tensor_rule.alpha(name, self._groups.get(name), otherwise=alpha)
        return alpha

    def unused(self, names: list[str]) -> Iterator[Problem]:
        """Patterns that matched none of `names`, after `alpha` was asked for all of them."""
        for rule, matchers in self._layer_rules:
            if rule.range[0] in self._layers:
                yield from _unused(matchers, sorted(self._modules))
        yield from _unused((each.matcher for each in self._tensor_rules), names)


def _module_paths(inner: str) -> list[str]:
    """What a module pattern may name: runs of components, so that `q_proj` matches `self_attn.q_proj.weight`."""
    parts = inner.split(".")
    return [".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]


def _unused(matchers: Iterable[_Matcher], known: list[str]) -> list[Problem]:
    unused = [matcher for matcher in matchers if known and not matcher.used]
    return [
        Problem(
            "pattern-matches-nothing",
            matcher.place,
            f"{matcher.pattern} matches no tensor",
            _nearest(matcher, known) if number < _MAX_SUGGESTIONS else "",
        )
        for number, matcher in enumerate(unused)
    ]


def _nearest(matcher: _Matcher, known: list[str]) -> str:
    remedy = did_you_mean(matcher.pattern, known)
    too_many = len(known) > 20 and remedy.startswith("known")
    return "`slrmerge inspect` lists the names" if too_many else remedy


def _layer_problems(rules: Rules, stack: LayerStack | None, place: Callable[[str], str]) -> Iterator[Problem]:
    ranges = {f"$.restore[{number}]": interval for number, interval in enumerate(rules.restore or ())}
    if len(ranges) == 1:
        ranges = {"$.restore": ranges["$.restore[0]"]}
    ranges |= {f"$.layers[{number}].range": rule.range for number, rule in enumerate(rules.layers)}
    if ranges and stack is None:
        remedy = "list the tensors themselves under `tensors`; `slrmerge inspect` shows their names"
        yield no_stack_problem(place("$.restore" if rules.restore else "$.layers"), remedy)
    for path, (_, last) in ranges.items():
        if stack and last >= stack.count:
            what = f"layer {last} does not exist; the last layer is {stack.count - 1}"
            yield Problem("layer-out-of-range", place(path), what)
