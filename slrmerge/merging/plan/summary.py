"""A plan in words: which layers come from where."""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from slrmerge.merging.plan.model import MergePlan, PlannedTensor
from slrmerge.recipe.blend import BLEND_RULES


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors that a summary lists together: where they are, alpha and blend rule, how many, output bytes."""

    where: str
    alpha: float
    blend: str
    tensors: int
    output_bytes: int

    @property
    def source(self) -> str:
        """Where they come from, in words."""
        if self.alpha in (0, 1):
            return "pre-trained" if self.alpha else "post-trained"
        return BLEND_RULES[self.blend].describe(self.alpha)


def summarise_parts(plan: MergePlan) -> list[Part]:
    """The layers in order, neighbours with the same alphas as one part, then everything outside the layers."""
    plan = plan.whole or plan
    stack = plan.pair.stack
    by_layer: dict[int, dict[str, PlannedTensor]] = defaultdict(dict)
    outside: list[PlannedTensor] = []
    for tensor in plan.tensors():
        if place := stack.locate(tensor.name) if stack else None:
            by_layer[place[0]][sys.intern(place[1])] = tensor
        else:
            outside.append(tensor)
    parts: list[Part] = []
    treated = [
        (layer, by_module({inner: tensor.alpha for inner, tensor in members.items()}))
        for layer, members in sorted(by_layer.items())
    ]
    for treatment, run in groupby(treated, key=itemgetter(1)):
        layers = [layer for layer, _ in run]
        words = f"{describe_layers(layers)}, {len(layers)} of {stack.count if stack else 0}"
        members = [tensor for layer in layers for tensor in by_layer[layer].values()]
        for alpha, modules in treatment:
            inside = f": {_listed(modules)}" if len(treatment) > 1 else ""
            parts.append(_part(words + inside, alpha, members))
    return parts + [
        _part(_listed(sorted(tensor.name for tensor in outside if tensor.alpha == alpha)), alpha, outside)
        for alpha in sorted({tensor.alpha for tensor in outside})
    ]


def describe_layers(layers: Iterable[int]) -> str:
    """Layer numbers in words, both ends included: `layers 3–5, 9`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = [f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ("layer " if sum(map(len, runs)) == 1 else "layers ") + ", ".join(words)


def describe_plan(plan: MergePlan) -> Iterator[str]:
    """What the merge does, one line per part."""
    for part in summarise_parts(plan):
        yield f"{part.where}: {part.source} ({part.tensors:,} tensor{'s' if part.tensors > 1 else ''})"


def by_module(alphas: Mapping[str, float]) -> tuple[tuple[float, tuple[str, ...]], ...]:
    """Each alpha in a layer with the modules it applies to, as coarsely as possible; no module where all are the same.

    `alphas` are by the names inside the layer.
    """
    if len(set(alphas.values())) == 1:
        return ((next(iter(alphas.values())), ()),)
    of_module: dict[str, set[float]] = {}
    for inner, alpha in alphas.items():
        for name in _ancestors(inner):
            of_module.setdefault(name, set()).add(alpha)
    uniform: dict[float, dict[str, None]] = {}
    for inner, alpha in alphas.items():
        module = next(name for name in _ancestors(inner) if len(of_module[name]) == 1)
        uniform.setdefault(alpha, {})[module] = None
    return tuple((alpha, tuple(sorted(modules))) for alpha, modules in sorted(uniform.items()))


def _ancestors(inner: str) -> list[str]:
    """`self_attn`, `self_attn.q_proj`, `self_attn.q_proj.weight`: from the module down to the tensor itself."""
    parts = inner.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _part(where: str, alpha: float, members: list[PlannedTensor]) -> Part:
    own = [tensor for tensor in members if tensor.alpha == alpha]
    blend = next((tensor.kind for tensor in own if tensor.kind in BLEND_RULES), "linear")
    return Part(where, alpha, blend, len(own), sum(tensor.info.nbytes for tensor in own))


def _listed(names: Sequence[str]) -> str:
    """Up to four names, or the first two and the number of others."""
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]} and {len(names) - 2} more"
