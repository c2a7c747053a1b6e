"""Which candidate to select: the highest diversity among those that keep enough quality (paper, equations 1 and 9)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from slrmerge.errors import PlanError, Problem
from slrmerge.recipe.model import Recipe
from slrmerge.searching.candidates import CandidateInfo
from slrmerge.searching.spaces import INTERVAL_SPACES

NEAR_TIE = 1e-3
"""Nats of diversity within which other prompts could reverse the order of two candidates."""

_ROUNDING = 1e-9
"""Rounding error of sums of scores and margins, so that no candidate on the line is left out."""


@dataclass(frozen=True, kw_only=True)
class ScoredCandidate(CandidateInfo):
    """A candidate with its scores: means over `prompts` prompts, computed in `dtype`.

    `exact` candidates were scored on all prompts in float32; only they are selected. `feasible` means enough quality
    compared with the post-trained model under the same conditions, `pareto` that no candidate of its space (for the two
    parents: no candidate at all) is better in both.
    """

    quality: float
    diversity: float
    feasible: bool = False
    pareto: bool = False
    exact: bool
    prompts: int
    dtype: str

    @property
    def conditions(self) -> str:
        """How it was scored; only candidates scored under the same conditions compare exactly."""
        return f"{self.prompts} prompts, {self.dtype}"


@dataclass(frozen=True, repr=False)
class Selection:
    """The selected candidate `slr`, and the candidates to compare it with; None where there is no feasible one.

    `pre` is None where the pre-trained model cannot be asked, for example because its vocabulary has another size.
    `runner_up` would be selected without `slr`. `base` is the recipe of the pair, without rules. `merge` accepts a
    Selection.
    """

    base: Recipe
    min_quality: float
    post: ScoredCandidate
    pre: ScoredCandidate | None
    slr: ScoredCandidate | None
    runner_up: ScoredCandidate | None
    soup: ScoredCandidate | None
    early: ScoredCandidate | None
    late: ScoredCandidate | None
    near_ties: tuple[ScoredCandidate, ...]

    def named(self) -> dict[str, ScoredCandidate]:
        """The candidates that there are, by the names that tables and files give them."""
        found = {name: getattr(self, name) for name in ("post", "slr", "soup", "early", "late", "pre")}
        return {name: each for name, each in found.items() if each is not None}

    @property
    def recipe(self) -> Recipe:
        """The recipe of the selected candidate. Raises PlanError where no interval is feasible."""
        if self.slr is None:
            what = f"no interval keeps {self.min_quality:g} of the post-trained model's quality"
            raise PlanError(Problem("nothing-feasible", "selection", what, "select again with a lower min_quality"))
        return self.recipe_for(self.slr)

    def recipe_for(self, candidate: ScoredCandidate) -> Recipe:
        """The recipe of a candidate. Raises PlanError for a mergekit config, which has no rules of a recipe."""
        if not candidate.rules.has_rules:
            what = "is a mergekit config, not a recipe"
            raise PlanError(Problem("not-a-recipe", candidate.label, what, "merge by the config itself"))
        recipe = Recipe(**{**self.base.to_dict(), **candidate.rules.rules()})
        return recipe.loaded_from(self.base.file) if self.base.file else recipe

    def __repr__(self) -> str:
        if self.slr is None:
            return "<Selection: nothing feasible>"
        return f"<Selection {self.slr.label}: Q {self.slr.quality:.3f}, D {self.slr.diversity:.3f}>"


def mark_feasible(
    rows: Sequence[ScoredCandidate], *, post_quality: Mapping[str, float], min_quality: float
) -> list[ScoredCandidate]:
    """The same candidates with `feasible` and `pareto` set; `post_quality` is by conditions."""
    front: set[str] = set()
    for space in {row.space for row in rows}:
        rivals = rows if space in ("post", "pre") else [row for row in rows if row.space == space]
        front |= {row.label for row in _pareto_front(rivals) if row.space == space}
    return [
        replace(
            row,
            feasible=row.quality >= min_quality * post_quality[row.conditions],
            pareto=row.label in front,
        )
        for row in rows
    ]


def select_from(rows: Sequence[ScoredCandidate], *, base: Recipe, min_quality: float) -> Selection:
    """The best interval, the best soup and the controls of the interval's length, from rows that are marked.

    `rows` hold the post-trained model and, where it was scored, the pre-trained one, each once and exactly scored.
    """
    exact = [row for row in rows if row.exact]
    space = interval_space(rows)
    slr = _best(exact, space)
    early, late = controls(rows, slr) if slr else (None, None)
    near_ties = [
        row
        for row in exact
        if slr and row is not slr and row.feasible and row.space == space
        if slr.diversity - row.diversity < NEAR_TIE
    ]
    return Selection(
        base,
        min_quality,
        post=next(row for row in exact if row.space == "post"),
        pre=next((row for row in exact if row.space == "pre"), None),
        slr=slr,
        runner_up=_best([row for row in exact if row is not slr], space),
        soup=_best(exact, "soup"),
        early=early,
        late=late,
        near_ties=tuple(near_ties),
    )


def possibly_better(rows: Sequence[ScoredCandidate], selection: Selection) -> list[ScoredCandidate]:
    """Feasible intervals that were not scored exactly and have a higher diversity than the selected one."""
    bar = selection.slr.diversity if selection.slr else float("-inf")
    space = interval_space(rows)
    rough = [row for row in rows if row.space == space and row.feasible and not row.exact]
    return sorted((row for row in rough if row.diversity > bar), key=_preference)


def interval_space(rows: Sequence[ScoredCandidate]) -> str:
    """The space in which the selection is made."""
    tried = {row.space for row in rows}
    return next((space for space in INTERVAL_SPACES if space in tried), next(iter(INTERVAL_SPACES)))


def intervals_of(rows: Sequence[ScoredCandidate]) -> list[ScoredCandidate]:
    """The candidates of the space in which the selection is made."""
    space = interval_space(rows)
    return [row for row in rows if row.space == space]


def ten_best(rows: Sequence[ScoredCandidate], count: int = 10) -> list[ScoredCandidate]:
    """The feasible candidates with the highest diversity, without soups and parents."""
    tried = [row for row in rows if row.feasible and row.space not in ("soup", "post", "pre")]
    return sorted(tried, key=_preference)[:count]


def finalists(
    rows: Sequence[ScoredCandidate], *, min_quality: float, margin: float, at_least: int
) -> list[ScoredCandidate]:
    """The candidates to score again exactly: those that may be selected, and those to compare them with.

    `margin` is the error of the scores, in Q and in nats of D. Of each space at least `at_least` by rank.
    """
    floor = min_quality * next(row.quality for row in rows if row.space == "post")
    slack = (1 + min_quality) * margin + _ROUNDING  # the post-trained model's own score has the same error
    always = ("post", "pre", "recipe")
    kept = {row.label for row in rows if row.space in always or row.also_named}
    for space in {row.space for row in rows} - {*always}:
        own = [row for row in rows if row.space == space]
        hopeful = sorted((row for row in own if row.quality >= floor - slack), key=_preference)
        certain = [row.diversity for row in hopeful if row.quality >= floor + slack]
        bar = certain[0] - 2 * margin - _ROUNDING if certain else float("-inf")
        kept |= {row.label for rank, row in enumerate(hopeful) if rank < at_least or row.diversity >= bar}
    for row in rows:
        if row.label in kept and row.space in INTERVAL_SPACES:
            kept |= {control.label for control in controls(rows, row)}
    return [row for row in rows if row.label in kept]


def controls(rows: Sequence[ScoredCandidate], interval: CandidateInfo) -> tuple[ScoredCandidate, ScoredCandidate]:
    """The first and the last interval of the same length and space."""
    kind = (interval.space, interval.layers_restored)
    same = [row for row in rows if (row.space, row.layers_restored) == kind]
    by_start = sorted(same, key=lambda row: row.start or 0)
    return by_start[0], by_start[-1]


def tie_order(row: ScoredCandidate) -> tuple[int, int]:
    """Among candidates of equal diversity, the shorter and then the earlier interval comes first."""
    return row.layers_restored, row.start or 0


def _preference(row: ScoredCandidate) -> tuple[float, int, int]:
    """Highest diversity first."""
    return -row.diversity, *tie_order(row)


def _best(rows: Sequence[ScoredCandidate], space: str) -> ScoredCandidate | None:
    return min((row for row in rows if row.space == space and row.feasible), key=_preference, default=None)


def _pareto_front(rows: Sequence[ScoredCandidate]) -> list[ScoredCandidate]:
    """The candidates that no other equals in both scores and exceeds in one."""
    front: list[ScoredCandidate] = []
    for row in sorted(rows, key=lambda row: (-row.quality, -row.diversity)):
        best = front[-1] if front else None
        is_equal = best is not None and (row.quality, row.diversity) == (best.quality, best.diversity)
        if best is None or is_equal or row.diversity > best.diversity:
            front.append(row)
    return front
