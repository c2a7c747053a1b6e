"""The result of a search: all candidates with their scores, and the selection among them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from html import escape
from typing import TYPE_CHECKING, Any

from slrmerge._version import __version__
from slrmerge.errors import require_extra
from slrmerge.io.text import printable, to_json
from slrmerge.merging.finding import HeldOut, SearchSummary, SelectedCandidate
from slrmerge.searching.selection import (
    ScoredCandidate,
    Selection,
    intervals_of,
    possibly_better,
    ten_best,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

LOW_QUALITY = 0.3
"""A post-trained model below this quality does not understand the question, or is not asked as it was trained."""


@dataclass(frozen=True, repr=False)
class SearchResult:
    """A search's result: all candidates with their scores, and the selection among them.

    `post_quality` is the post-trained model's, by conditions. `notes` report how candidates were scored. `prompt` is
    one of the prompts, as text; `date` is the date that the chat template wrote into them. `versions` are those of the
    packages that scored. `held_out` has the scores on prompts that were not used to select, `reselected` how often
    candidates are selected by resampled prompts.
    """

    rows: tuple[ScoredCandidate, ...]
    choice: Selection
    post_quality: Mapping[str, float]
    layers: int
    task: str
    notes: tuple[str, ...]
    elapsed_s: float
    prompt: str = ""
    date: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    held_out: HeldOut | None = None
    reselected: Mapping[str, float] = field(default_factory=dict)

    @property
    def intervals(self) -> list[ScoredCandidate]:
        """The candidates of the space in which the selection is made."""
        return intervals_of(self.rows)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why the scores may not mean what they should: the question, or the two sides, may be the wrong ones."""
        post, pre = self.choice.post, self.choice.pre
        found = []
        if post.quality < LOW_QUALITY:
            found.append(
                f"the post-trained model answers {self.task} correctly with a probability of only {post.quality:.3f}; "
                "check the prompt in summary.json, or ask another task"
            )
        if pre is not None and pre.quality > post.quality:
            found.append(
                f"the pre-trained model answers better (Q {pre.quality:.3f}) than the post-trained one "
                f"(Q {post.quality:.3f}); check whether the recipe has the two sides swapped"
            )
        return tuple(found)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why another candidate could be the better one: near-ties, candidates scored only roughly, other prompts."""
        slr = self.choice.slr
        doubts = [
            f"near-tie: {row.label} has only {slr.diversity - row.diversity:.1e} nats less diversity than {slr.label}"
            for row in self.choice.near_ties
            if slr is not None
        ]
        rough = possibly_better(self.rows, self.choice)
        if rough:
            named = ", ".join(row.label for row in rough[:3]) + (", …" if len(rough) > 3 else "")
            remedy = 'search all prompts with dtype="float32" to be sure'
            doubts.append(f"scored only roughly, and possibly better: {named}; {remedy}")
        if slr is not None and self.held_out is not None:
            doubts += _held_out_doubts(slr, self.held_out, self.choice.min_quality)
        return tuple(doubts)

    def summary(self) -> SearchSummary:
        """The result without the table, as summary.json has it."""
        base = self.choice.base
        return SearchSummary(
            slrmerge=__version__,
            pretrained=base.pretrained,
            posttrained=base.posttrained,
            dtype=base.dtype,
            vocabulary=base.vocabulary,
            candidates=len(self.rows),
            min_quality=self.choice.min_quality,
            selected={name: _selected(row) for name, row in self.choice.named().items()},
            near_ties=tuple(_selected(row) for row in self.choice.near_ties),
            warnings=self.warnings,
            doubts=self.doubts,
            **{**kept_in_summary(self), "elapsed_s": round(self.elapsed_s, 1)},
        )

    def to_rows(self) -> list[dict[str, Any]]:
        """A row per candidate, in the order in which they were scored; None where a value has no meaning.

        `also_named` and `rules` are JSON.
        """
        rows = []
        for row in self.rows:
            cells = {**vars(row), "also_named": to_json(row.also_named) if row.also_named else None}
            del cells["rules"]  # the last column
            rows.append({**cells, "rules": to_json(row.rules.rules())})
        return rows

    def to_pandas(self) -> "DataFrame":
        """`to_rows` as a DataFrame. Raises MissingExtraError without pandas."""
        require_extra("search", "pandas")
        from pandas import DataFrame

        return DataFrame(self.to_rows()).astype({"start": "Int64", "end": "Int64"})

    def plot(self) -> "Figure":
        """Quality against diversity of all candidates. Raises MissingExtraError without matplotlib."""
        require_extra("search", "matplotlib")
        from slrmerge.searching.plots import tradeoff_figure

        return tradeoff_figure(self.rows, self.choice)

    def __repr__(self) -> str:
        return f"<SearchResult: {len(self.rows):,} candidates, {self.choice!r}>"

    def _repr_html_(self) -> str:
        ranked = [(f"#{rank}", row) for rank, row in enumerate(ten_best(self.rows), 1)]
        lines = "".join(
            f"<tr><th>{name}</th><td>{escape(printable(row.full_label))}</td>"
            f"<td>{row.quality:.4f}</td><td>{row.diversity:.4f}</td></tr>"
            for name, row in [*self.choice.named().items(), *ranked]
        )
        return f"<table><tr><th></th><th>candidate</th><th>Q</th><th>D (nats)</th></tr>{lines}</table>"


def kept_in_summary(found: SearchResult | SearchSummary) -> dict[str, Any]:
    """What a result and its summary both have, by the names that they share."""
    names = (each.name for each in fields(SearchResult))
    return {name: getattr(found, name) for name in names if name in SearchSummary.model_fields}


def _held_out_doubts(slr: ScoredCandidate, held_out: HeldOut, min_quality: float) -> Iterator[str]:
    """Why the selection may be worse on other prompts than on those that it was selected by."""
    label, own, post = slr.label, held_out.scores.get("slr"), held_out.scores["post"]
    if own is None:
        again = "search again with this minimum quality, into another folder"
        yield f"the held-out prompts were not asked of {label}; {again}"
        return
    if own.quality < min_quality * post.quality:
        share = own.quality / post.quality
        yield f"on the held-out prompts, {label} keeps only {share:.1%} of the post-trained model's quality"
    if own.diversity_change and own.diversity_change.low is not None and own.diversity_change.low <= 0:
        yield f"on the held-out prompts, {label} is not clearly more diverse than the post-trained model"


def _selected(row: ScoredCandidate) -> SelectedCandidate:
    scores = {"label": row.label, "quality": row.quality, "diversity": row.diversity, "exact": row.exact}
    return SelectedCandidate(**row.rules.rules(), **scores)
