"""Which candidate to take: the highest diversity among those that keep enough quality (paper, equations 1 and 9)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from slrmerge.search.candidates import Candidate

MIN_QUALITY = 0.9
"""The share of the post-trained model's quality that has to be kept (paper, section 3.3)."""

INTERVAL_SPACES = ("interval", "attention", "mlp")
"""Spaces of intervals; the choice is made in the first of them that was tried."""

NEAR_TIE = 1e-3
"""Nats of diversity by which two candidates differ so little that other prompts could turn them round."""


@dataclass(frozen=True)
class Row:
    """A candidate with its scores: means over `prompts` prompts, worked out in `dtype`.

    `exact` rows were asked everything in the final dtype; only they are chosen. `feasible` means enough quality
    against the post-trained model under the same conditions, `pareto` that no candidate of its space, for the two
    models themselves no candidate at all, has more of both.
    """

    candidate: Candidate
    quality: float
    diversity: float
    prompts: int
    dtype: str
    exact: bool
    feasible: bool = False
    pareto: bool = False


@dataclass(frozen=True)
class Choice:
    """The rows that a search is about. Without a feasible interval `slr` is None, and so are the controls."""

    min_quality: float
    post: Row
    pre: Row
    slr: Row | None
    soup: Row | None
    early: Row | None
    late: Row | None
    near_ties: tuple[Row, ...]

    def named(self) -> dict[str, Row]:
        """The rows that are there, by the names that tables and files give them."""
        rows = {name: getattr(self, name) for name in ("post", "slr", "soup", "early", "late", "pre")}
        return {name: row for name, row in rows.items() if row is not None}


def conditions(row: Row) -> str:
    """Under what a row was scored; only rows under the same conditions compare exactly."""
    return f"{row.prompts} prompts, {row.dtype}"


def judge(rows: Sequence[Row], *, post_quality: Mapping[str, float], min_quality: float) -> list[Row]:
    """The same rows with `feasible` and `pareto` worked out; `post_quality` is by conditions."""
    front: set[int] = set()
    for space in {row.candidate.space for row in rows}:
        rivals = rows if space in ("post", "pre") else [row for row in rows if row.candidate.space == space]
        front |= {id(row) for row in _front(rivals) if row.candidate.space == space}
    return [
        replace(row, feasible=row.quality >= min_quality * post_quality[conditions(row)], pareto=id(row) in front)
        for row in rows
    ]


def choose(rows: Sequence[Row], *, min_quality: float) -> Choice:
    """The best interval, the best soup and the controls of the interval's length, from judged rows.

    Raises ValueError without exactly one exact row of each of the two models.
    """
    exact = [row for row in rows if row.exact]
    space = interval_space(rows)
    post, pre = (_only(exact, space) for space in ("post", "pre"))
    slr, soup = _best(exact, space), _best(exact, "soup")
    early = late = None
    ties: tuple[Row, ...] = ()
    if slr is not None:
        early, late = _controls(rows, slr.candidate)
        ties = tuple(
            row for row in exact
            if row is not slr and row.feasible and row.candidate.space == space
            and slr.diversity - row.diversity < NEAR_TIE
        )  # fmt: skip
    return Choice(min_quality, post, pre, slr, soup, early, late, ties)


def may_be_better(rows: Sequence[Row], choice: Choice) -> list[Row]:
    """Feasible intervals that were not asked exactly, and came out more diverse than the choice."""
    bar = choice.slr.diversity if choice.slr else float("-inf")
    space = interval_space(rows)
    rough = [row for row in rows if row.candidate.space == space and row.feasible and not row.exact]
    return sorted((row for row in rough if row.diversity > bar), key=_preference)


def interval_space(rows: Sequence[Row]) -> str:
    """The space in which the choice is made."""
    tried = {row.candidate.space for row in rows}
    return next((space for space in INTERVAL_SPACES if space in tried), INTERVAL_SPACES[0])


def ten_best(rows: Sequence[Row], count: int = 10) -> list[Row]:
    """The feasible candidates with the highest diversity, soups and the models themselves left out."""
    tried = [row for row in rows if row.feasible and row.candidate.space not in ("soup", "post", "pre")]
    return sorted(tried, key=_preference)[:count]


_ROUNDING = 1e-9
"""What sums of scores and margins may be off by, so that no candidate on the line is left out."""


def leaders(rows: Sequence[Row], *, min_quality: float, margin: float, at_least: int) -> list[Candidate]:
    """Whom a second, exact pass over one pass's `rows` has to ask again: whatever may win, and what it is held against.

    `margin` is how far scores may still move, in Q and in nats of D. Of each space at least `at_least` by rank.
    """
    floor = min_quality * next(row.quality for row in rows if row.candidate.space == "post")
    slack = (1 + min_quality) * margin + _ROUNDING  # the post-trained model's own score may move too
    kept = {id(row) for row in rows if row.candidate.space in ("post", "pre", "recipe")}
    for space in {row.candidate.space for row in rows} - {"post", "pre", "recipe"}:
        own = [row for row in rows if row.candidate.space == space]
        hopeful = sorted((row for row in own if row.quality >= floor - slack), key=_preference)
        surely = [row.diversity for row in hopeful if row.quality >= floor + slack]
        bar = surely[0] - 2 * margin - _ROUNDING if surely else float("-inf")
        kept |= {id(row) for rank, row in enumerate(hopeful) if rank < at_least or row.diversity >= bar}
    for row in rows:
        if id(row) in kept and row.candidate.space in INTERVAL_SPACES:
            kept |= set(map(id, _controls(rows, row.candidate)))
    return [row.candidate for row in rows if id(row) in kept]


def _controls(rows: Sequence[Row], interval: Candidate) -> tuple[Row, Row]:
    """The first and the last interval of the same length and space."""
    kind = (interval.space, interval.layers_restored)
    alike = [row for row in rows if (row.candidate.space, row.candidate.layers_restored) == kind]
    by_start = sorted(alike, key=lambda row: row.candidate.start or 0)
    return by_start[0], by_start[-1]


def _only(rows: Sequence[Row], space: str) -> Row:
    found = [row for row in rows if row.candidate.space == space]
    if len(found) != 1:
        raise ValueError(f"{len(found)} exact rows of space {space}")
    return found[0]


def _preference(row: Row) -> tuple[float, int, int]:
    """Highest diversity first; among equals the shorter and then the earlier interval."""
    return -row.diversity, row.candidate.layers_restored, row.candidate.start or 0


def _best(rows: Sequence[Row], space: str) -> Row | None:
    return min((row for row in rows if row.candidate.space == space and row.feasible), key=_preference, default=None)


def _front(rows: Sequence[Row]) -> list[Row]:
    """Those that no other has at least as much quality and diversity as, and more of one."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (-row.quality, -row.diversity)):
        best = front[-1] if front else None
        alike = best is not None and (row.quality, row.diversity) == (best.quality, best.diversity)
        if best is None or alike or row.diversity > best.diversity:
            front.append(row)
    return front
