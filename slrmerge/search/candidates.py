"""What a search tries: each candidate is what a recipe would say, with the numbers that tables and plots show.

A space is one function, named in `SPACES`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slrmerge.checkpoint import Checkpoint
from slrmerge.errors import PlanError, Problem, raise_all
from slrmerge.plan import route, spelled_out
from slrmerge.recipe import Recipe, parse_recipe

SOUP_STEPS = 20
"""Soups are tried at alpha 0, 0.05, …, 1 (paper, section 4.1)."""

_ATTENTION = ("self_attn", "attn", "attention")
_MLP = ("mlp", "feed_forward")


@dataclass(frozen=True)
class Candidate:
    """A hybrid to try. `rules` are a recipe's keys; `start` and `end`, both counted, are an interval's ends.

    `layers_restored` counts the layers of which something is wholly pre-trained.
    """

    space: str
    rules: Mapping[str, Any] = field(hash=False)
    label: str
    start: int | None = None
    end: int | None = None
    alpha: float | None = None
    modules: str | None = None
    layers_restored: int = 0


Space = Callable[[Checkpoint, int], Iterator[Candidate]]
"""From the post-trained checkpoint and its number of layers."""


def ends(_: Checkpoint, layers: int) -> Iterator[Candidate]:
    """The two models themselves."""
    yield Candidate("post", {"alpha": 0.0}, "post-trained", alpha=0.0)
    yield Candidate("pre", {"alpha": 1.0}, "pre-trained", alpha=1.0, layers_restored=layers)


def intervals(_: Checkpoint, layers: int) -> Iterator[Candidate]:
    """Every [i, j]: N(N+1)/2 of them."""
    for start in range(layers):
        for end in range(start, layers):
            rules = {"restore": [start, end]}
            yield Candidate("interval", rules, words(start, end), start, end, layers_restored=end - start + 1)


def soups(_: Checkpoint, layers: int) -> Iterator[Candidate]:
    """alpha * pre + (1 - alpha) * post, embedding, norms and head included."""
    del layers
    for step in range(1, SOUP_STEPS):
        alpha = step / SOUP_STEPS
        yield Candidate("soup", {"alpha": alpha}, f"soup {alpha:.2f}", alpha=alpha)


def attention(checkpoint: Checkpoint, layers: int) -> Iterator[Candidate]:
    """Every interval of attention modules only."""
    return _modules("attention", checkpoint, layers, known=_ATTENTION)


def mlp(checkpoint: Checkpoint, layers: int) -> Iterator[Candidate]:
    """Every interval of MLPs only."""
    return _modules("mlp", checkpoint, layers, known=_MLP)


SPACES: dict[str, Space] = {"intervals": intervals, "soups": soups, "attention": attention, "mlp": mlp}
"""The spaces by the names that the command line gives them."""


def from_recipe(recipe: Recipe, label: str, posttrained: Checkpoint) -> Candidate:
    """What a recipe says, as a candidate. Raises PlanError for a mergekit config that does not fit, and for a slerp."""
    if recipe.blend == "slerp":
        raise PlanError(Problem(label, "is a slerp, and searches score means only", "leave it out"))
    alphas, problems = route(recipe, posttrained.weight_map, posttrained.stack)
    raise_all(problems if recipe.mergekit else (), PlanError)
    recipe = spelled_out(recipe, alphas, posttrained.stack)
    rules = {key: value for key, value in recipe.to_dict().items() if key in ("alpha", "restore", "layers", "tensors")}
    restored = [name for name, alpha in alphas.items() if alpha == 1]
    layers = {place[0] for name in restored if posttrained.stack and (place := posttrained.stack.locate(name))}
    return Candidate("recipe", rules, label, alpha=recipe.alpha, layers_restored=len(layers))


def recipe_of(candidate: Candidate, *, pretrained: str, posttrained: str, dtype: str | None) -> dict[str, Any]:
    """A candidate as the content of a recipe."""
    more = {} if dtype is None else {"dtype": dtype}
    return {"pretrained": pretrained, "posttrained": posttrained, **candidate.rules, **more}


def alphas_of(candidates: Sequence[Candidate], posttrained: Checkpoint) -> list[dict[str, float]]:
    """The alpha of every tensor, candidate by candidate, as a merge would route it.

    Raises PlanError where a candidate does not fit the checkpoint.
    """
    routed: list[dict[str, float]] = []
    problems: dict[Problem, None] = {}
    names = list(posttrained.weight_map)
    for candidate in candidates:
        recipe = parse_recipe(recipe_of(candidate, pretrained="pre", posttrained="post", dtype=None))
        alphas, found = route(recipe, names, posttrained.stack)
        routed.append(alphas)
        problems |= {Problem(candidate.label, problem.what, problem.remedy): None for problem in found}
    raise_all(problems, PlanError)
    return routed


def words(start: int, end: int) -> str:
    """An interval as people read it; both ends count."""
    return f"layer {start}" if start == end else f"layers {start}–{end}"


def _modules(space: str, checkpoint: Checkpoint, layers: int, *, known: tuple[str, ...]) -> Iterator[Candidate]:
    places = filter(None, map(checkpoint.stack.locate, checkpoint.weight_map)) if checkpoint.stack else ()
    present = {inner.partition(".")[0] for _, inner in places}
    module = next((name for name in known if name in present), None)
    if module is None:
        what = f"has no module called {' or '.join(known)} in its layers"
        raise PlanError(Problem(str(checkpoint), what, f"leave out --space {space}"))
    for interval in intervals(checkpoint, layers):
        rule = {"range": [interval.start, interval.end], "modules": [module], "alpha": 1.0}
        label = f"{interval.label}, {module} only"
        yield Candidate(
            space, {"layers": [rule]}, label, interval.start, interval.end,
            modules=module, layers_restored=interval.layers_restored,
        )  # fmt: skip
