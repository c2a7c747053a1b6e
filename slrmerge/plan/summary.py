"""A plan in words: which layers come from where."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from slrmerge.plan.model import MergePlan, PlannedTensor


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors that belong together in a summary: `where` they are, their `alpha`, how many, their output bytes."""

    where: str
    alpha: float
    tensors: int
    output_bytes: int
    blend: str

    @property
    def source(self) -> str:
        if self.alpha in (0, 1):
            return "pre-trained" if self.alpha else "post-trained"
        if self.blend == "slerp":
            return f"slerp, {self.alpha:g} of the way from post to pre"
        return f"{self.alpha:g} × pre + {1 - self.alpha:g} × post"


def summarise_parts(plan: MergePlan) -> list[Part]:
    """The layers in order, neighbours that are treated alike as one part, then everything outside the layers."""
    stack = plan.posttrained.stack
    by_layer: dict[int, list[tuple[str, PlannedTensor]]] = {}
    outside: list[tuple[str, PlannedTensor]] = []
    for tensor in plan.tensors():
        place = stack.locate(tensor.name) if stack else None
        if place:
            by_layer.setdefault(place[0], []).append((place[1], tensor))
        else:
            outside.append((tensor.name, tensor))
    parts: list[Part] = []
    treated = [
        (layer, by_module({inner: tensor.alpha for inner, tensor in members}))
        for layer, members in sorted(by_layer.items())
    ]
    for treatment, run in groupby(treated, key=itemgetter(1)):
        layers = [layer for layer, _ in run]
        words = f"{interval_words(layers)}, {len(layers)} of {stack.count if stack else 0}"
        members = [tensor for layer in layers for _, tensor in by_layer[layer]]
        for alpha, modules in treatment:
            inside = f": {_listed(modules)}" if len(treatment) > 1 else ""
            parts.append(_part(words + inside, alpha, members))
    members = [tensor for _, tensor in outside]
    return parts + [
        _part(_listed(sorted(name for name, tensor in outside if tensor.alpha == alpha)), alpha, members)
        for alpha in sorted({tensor.alpha for tensor in members})
    ]


def interval_words(layers: Iterable[int]) -> str:
    """Layer numbers as people write them: `layers 3–5, 9`; both ends count."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = [f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ("layer " if sum(map(len, runs)) == 1 else "layers ") + ", ".join(words)


def plan_sentences(plan: MergePlan) -> Iterator[str]:
    """What the merge does, a line a part, for people who do not read recipes."""
    for part in summarise_parts(plan):
        yield f"{part.where}: {part.source} ({part.tensors:,} tensor{'s' if part.tensors > 1 else ''})"


def by_module(alphas: Mapping[str, float]) -> tuple[tuple[float, tuple[str, ...]], ...]:
    """How one layer is treated: each alpha with the modules it applies to, named no more finely than it takes.

    `alphas` are by the names inside the layer; where all are the same, no module is named.
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
    blend = "slerp" if any(tensor.kind == "slerp" for tensor in own) else "linear"
    return Part(where, alpha, len(own), sum(tensor.info.nbytes for tensor in own), blend)


def _listed(names: Sequence[str]) -> str:
    """A few names in full, of many the first two and how many more."""
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]} and {len(names) - 2} more"
