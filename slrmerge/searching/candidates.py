"""Candidates: the hybrids that a search scores. A space of candidates is one function, registered in `MAKERS`."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import NamedTuple

from slrmerge.checkpoint.pair import ModelPair, require_layers
from slrmerge.checkpoint.quantized import Quantization
from slrmerge.errors import PlanError, Problem, raise_all
from slrmerge.merging.plan.tensors import plan_tensor_alphas
from slrmerge.recipe.alphas import TensorAlphas, resolve_rules
from slrmerge.recipe.load import AnyRecipe
from slrmerge.recipe.rules import LayerRule, Rules

SOUP_STEPS = 20
"""Soups are tried at alpha 0, 0.05, …, 1 (paper, section 4.1)."""

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_UNLIKE = ("different-shapes", "different-vocabularies", "tied-differently")
"""Codes of tensors that intervals of layers do not need, and everything else does."""

_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


@dataclass(frozen=True, kw_only=True)
class CandidateInfo:
    """What tables and plots show of a candidate.

    `label` is unique in a search; `also_named` are the labels of other candidates with the same alphas. `rules` are
    empty for a mergekit config, which a recipe's rules cannot express. `start` and `end`, both included, are the ends
    of an interval. `layers_restored` counts the layers in which some tensor is wholly pre-trained.
    """

    space: str
    label: str
    also_named: tuple[str, ...] = ()
    rules: Rules
    start: int | None = None
    end: int | None = None
    alpha: float | None = None
    modules: str | None = None
    layers_restored: int = 0

    @property
    def full_label(self) -> str:
        """The label and the other labels."""
        return " = ".join((self.label, *self.also_named))


@dataclass(frozen=True)
class Candidate:
    """A hybrid to score: what is shown of it, and the alpha of every tensor."""

    info: CandidateInfo
    alphas: TensorAlphas = field(repr=False)


def parents(pair: ModelPair) -> Iterator[CandidateInfo]:
    """The two models themselves."""
    layers = require_layers(pair).count
    yield CandidateInfo(space="post", label="post-trained", rules=Rules(alpha=0.0), alpha=0.0)
    yield CandidateInfo(space="pre", label="pre-trained", rules=Rules(alpha=1.0), alpha=1.0, layers_restored=layers)


def intervals(pair: ModelPair) -> Iterator[CandidateInfo]:
    """Every interval [i, j] of N layers: N(N+1)/2 of them."""
    layers = require_layers(pair).count
    for start in range(layers):
        for end in range(start, layers):
            label = f"layer {start}" if start == end else f"layers {start}–{end}"
            yield CandidateInfo(
                space="interval",
                label=label,
                rules=Rules(restore=((start, end),)),
                start=start,
                end=end,
                layers_restored=end - start + 1,
            )


def soups(pair: ModelPair) -> Iterator[CandidateInfo]:
    """alpha * pre + (1 - alpha) * post for every tensor, embedding, norms and head included."""
    del pair
    for step in range(1, SOUP_STEPS):
        alpha = step / SOUP_STEPS
        yield CandidateInfo(space="soup", label=f"soup {alpha:.2f}", rules=Rules(alpha=alpha), alpha=alpha)


def attention(pair: ModelPair) -> Iterator[CandidateInfo]:
    """Every interval of attention modules only."""
    return _intervals_of_modules("attention", pair, _ATTENTION)


def mlp(pair: ModelPair) -> Iterator[CandidateInfo]:
    """Every interval of MLPs only."""
    return _intervals_of_modules("mlp", pair, _MLP)


MAKERS: dict[str, Callable[[ModelPair], Iterator[CandidateInfo]]] = {
    "intervals": intervals, "soups": soups, "attention": attention, "mlp": mlp
}  # fmt: skip
"""What makes the candidates of each space, by the names that options give them."""


def make_candidates(
    pair: ModelPair, spaces: Iterable[str], recipes: Iterable[tuple[str, AnyRecipe]] = ()
) -> list[Candidate]:
    """The two parents, the candidates of all spaces, and recipes with their labels, in this order.

    Candidates with the same alphas are one, under the first label. A recipe whose label is taken gets a numbered one.
    Raises PlanError for what does not fit the pair.
    """
    made: dict[TensorAlphas, CandidateInfo] = {}
    names = TensorAlphas(dict.fromkeys(pair.posttrained, 0.0))
    for space in (parents, *(MAKERS[name] for name in dict.fromkeys(spaces))):
        for info in space(pair):
            resolved, problems = resolve_rules(info.rules, names, pair.stack)
            raise_all((Problem(each.code, info.label, each.what, each.remedy) for each in problems), PlanError)
            _add(made, names.with_alphas(resolved.values()), info)
    for label, recipe in recipes:
        if recipe.blend != "linear":
            what = f"blends by {recipe.blend}, and a search scores linear blends only"
            remedy = "leave its rules out, or name the two checkpoints in its place"
            raise PlanError(Problem("unsupported-blend", label, what, remedy))
        resolved, problems = recipe.resolve(pair)
        raise_all(problems, PlanError)
        alphas = names.with_alphas(resolved.values())
        rules = Rules(**recipe.rules()) if isinstance(recipe, Rules) else Rules()
        layers = alphas.restored_layers(pair.stack)
        unique = _unique(label, {info.label for info in made.values()})
        info = CandidateInfo(space="recipe", label=unique, rules=rules, alpha=rules.alpha, layers_restored=layers)
        _add(made, alphas, info)
    return [Candidate(info, alphas) for alphas, info in made.items()]


class Scorable(NamedTuple):
    """Candidates that can be scored, and notes about those that are left out."""

    candidates: list[Candidate]
    notes: list[str]


def leave_out_unlike(pair: ModelPair, candidates: Sequence[Candidate], *, shares_vocabulary: bool) -> Scorable:
    """Leave out the pre-trained model and the soups where tensors outside the layers do not fit.

    Vocabularies of different sizes do not fit, nor do heads that only one side ties; intervals need neither. Raises
    PlanError for recipes that need such a tensor.
    """
    unlike = _unlike_outer_tensors(pair, shares_vocabulary)
    left_out = [each for each in candidates if any(each.alphas[name] for name in unlike)]
    remedy = "give them alpha: 0 under `tensors`, or leave the recipe out"
    what = f"needs tensors that do not fit those of the pre-trained side: {', '.join(unlike)}"
    recipes = [each.info for each in left_out if each.info.space == "recipe"]
    raise_all((Problem("different-shapes", info.label, what, remedy) for info in recipes), PlanError)
    if not left_out:
        return Scorable(list(candidates), [])
    soups_left_out = sum(each.info.space == "soup" for each in left_out)
    which = "the pre-trained model" + (f" and {soups_left_out} soups" if soups_left_out else "")
    note = f"left out {which}, because tensors do not fit those of the pre-trained side: {', '.join(unlike)}"
    return Scorable([each for each in candidates if each not in left_out], [note])


def leave_out_blends(pair: ModelPair, candidates: Sequence[Candidate]) -> Scorable:
    """Leave out the soups of a quantized pair, whose tensors cannot be blended."""
    quantization = Quantization.of(pair.posttrained)
    kept = [each for each in candidates if each.info.space != "soup"]
    if quantization is None or len(kept) == len(candidates):
        return Scorable(list(candidates), [])
    count = len(candidates) - len(kept)
    return Scorable(kept, [f"left out {count} soups, because quantized tensors{quantization.name} cannot be blended"])


def _unlike_outer_tensors(pair: ModelPair, shares_vocabulary: bool) -> list[str]:
    """The tensors outside the layers that do not fit those of the pre-trained side."""
    stack = require_layers(pair)
    outer = [name for name in pair.posttrained if stack.locate(name) is None]
    if not _is_unlike(pair, outer, shares_vocabulary):
        return []
    return [name for name in outer if _is_unlike(pair, [name], shares_vocabulary)]


def _is_unlike(pair: ModelPair, names: Sequence[str], shares_vocabulary: bool) -> bool:
    """Whether one of these tensors cannot be restored because of what it is on the pre-trained side."""
    try:
        plan_tensor_alphas([(name, 1.0) for name in names], pair, dtype=None, shares_vocabulary=shares_vocabulary)
    except PlanError as error:
        return any(problem.code in _UNLIKE for problem in error.problems)
    return False


def _add(made: dict[TensorAlphas, CandidateInfo], alphas: TensorAlphas, info: CandidateInfo) -> None:
    known = made.get(alphas)
    made[alphas] = replace(known, also_named=(*known.also_named, info.label)) if known else info


def _unique(label: str, taken: set[str]) -> str:
    """The label, numbered where it is taken."""
    labels = chain([label], (f"{label} ({number})" for number in count(2)))
    return next(each for each in labels if each not in taken)


def _intervals_of_modules(space: str, pair: ModelPair, known: tuple[str, ...]) -> Iterator[CandidateInfo]:
    """Intervals of the first module of `known` that layers have; those without a layer that has it are left out."""
    stack = require_layers(pair)
    layers: dict[str, set[int]] = defaultdict(set)
    for name in pair.posttrained:
        if place := stack.locate(name):
            layers[place[1].partition(".")[0]].add(place[0])
    module = next((name for name in known if name in layers), None)
    if module is None:
        what = f"has no module named {' or '.join(known)} in its layers"
        raise PlanError(Problem("no-such-module", str(pair.posttrained), what, f"leave out the space {space}"))
    for each in intervals(pair):
        assert each.start is not None
        assert each.end is not None
        restored = layers[module].intersection(range(each.start, each.end + 1))
        if restored:
            rule = LayerRule(range=(each.start, each.end), modules=(module,), alpha=1.0)
            yield replace(
                each,
                space=space,
                label=f"{each.label}, {module} only",
                rules=Rules(layers=(rule,)),
                modules=module,
                layers_restored=len(restored),
            )
