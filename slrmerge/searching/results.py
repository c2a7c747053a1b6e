"""The result of a search, and its folder: table, values of each prompt, summary, recipes, figures and report."""

import csv
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Json

from slrmerge._version import __version__
from slrmerge.errors import OutputError, Problem, RecipeError, require_extra
from slrmerge.io.files import read_file, replace_file
from slrmerge.io.pieces import translate_os_errors
from slrmerge.io.strict_yaml import write_yaml
from slrmerge.io.text import from_csv, printable, to_csv, to_json
from slrmerge.merging.finding import SUMMARY_NAME, HeldOut, SearchSummary, SelectedCandidate
from slrmerge.recipe.model import Recipe
from slrmerge.recipe.rules import Rules
from slrmerge.searching.candidates import CandidateInfo
from slrmerge.searching.prompt_scores import PROMPTS
from slrmerge.searching.selection import (
    ScoredCandidate,
    Selection,
    intervals_of,
    possibly_better,
    select_from,
    ten_best,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

TABLE = "results.csv"
RECIPES = {"slr": "slr.yaml", "soup": "soup.yaml", "early": "early.yaml", "late": "late.yaml"}
_MAX_BYTES = 1 << 28

LOW_QUALITY = 0.3
"""A post-trained model below this quality does not understand the question, or is not asked as it was trained."""

FIGURES = ("tradeoff.png", "tradeoff.svg", "heatmaps.png", "heatmaps.svg", "report.html")
"""What `draw_result` writes."""


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
            f"near-tie: {row.info.label} has only {slr.diversity - row.diversity:.1e} nats less diversity than "
            f"{slr.info.label}"
            for row in self.choice.near_ties
            if slr is not None
        ]
        rough = possibly_better(self.rows, self.choice)
        if rough:
            named = ", ".join(row.info.label for row in rough[:3]) + (", …" if len(rough) > 3 else "")
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
            task=self.task,
            pretrained=base.pretrained,
            posttrained=base.posttrained,
            dtype=base.dtype,
            vocabulary=base.vocabulary,
            layers=self.layers,
            candidates=len(self.rows),
            min_quality=self.choice.min_quality,
            selected={name: _selected(row) for name, row in self.choice.named().items()},
            near_ties=tuple(_selected(row) for row in self.choice.near_ties),
            held_out=self.held_out,
            reselected=dict(self.reselected),
            post_quality=dict(self.post_quality),
            date=self.date,
            prompt=self.prompt,
            warnings=self.warnings,
            notes=self.notes,
            doubts=self.doubts,
            versions=dict(self.versions),
            elapsed_s=round(self.elapsed_s, 1),
        )

    def to_rows(self) -> list[dict[str, Any]]:
        """A row per candidate, in the order in which they were scored; None where a value has no meaning.

        `also_named` and `rules` are JSON.
        """
        return [
            {
                "space": row.info.space,
                "label": row.info.label,
                "also_named": to_json(row.info.also_named) if row.info.also_named else None,
                "start": row.info.start,
                "end": row.info.end,
                "alpha": row.info.alpha,
                "modules": row.info.modules,
                "layers_restored": row.info.layers_restored,
                "quality": row.quality,
                "diversity": row.diversity,
                "feasible": row.feasible,
                "pareto": row.pareto,
                "exact": row.exact,
                "prompts": row.prompts,
                "dtype": row.dtype,
                "rules": to_json(row.info.rules.rules()),
            }
            for row in self.rows
        ]

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
            f"<tr><th>{name}</th><td>{escape(printable(row.info.full_label))}</td>"
            f"<td>{row.quality:.4f}</td><td>{row.diversity:.4f}</td></tr>"
            for name, row in [*self.choice.named().items(), *ranked]
        )
        return f"<table><tr><th></th><th>candidate</th><th>Q</th><th>D (nats)</th></tr>{lines}</table>"


def _held_out_doubts(slr: ScoredCandidate, held_out: HeldOut, min_quality: float) -> Iterator[str]:
    """Why the selection may be worse on other prompts than on those that it was selected by."""
    label, own, post = slr.info.label, held_out.scores.get("slr"), held_out.scores["post"]
    if own is None:
        yield f"the held-out prompts were not asked of {label}; search again with this minimum quality"
        return
    if own.quality < min_quality * post.quality:
        share = own.quality / post.quality
        yield f"on the held-out prompts, {label} keeps only {share:.1%} of the post-trained model's quality"
    if own.diversity_change and own.diversity_change.low is not None and own.diversity_change.low <= 0:
        yield f"on the held-out prompts, {label} is not clearly more diverse than the post-trained model"


def _selected(row: ScoredCandidate) -> SelectedCandidate:
    scores = {"label": row.info.label, "quality": row.quality, "diversity": row.diversity, "exact": row.exact}
    return SelectedCandidate(**row.info.rules.rules(), **scores)


def write_result(folder: Path, result: SearchResult) -> None:
    """Write the table, the recipes, the figures, the report and, last, the summary. Raises OutputError.

    Recipes are written as seen from the folder that the pair's recipe (`choice.base`) was loaded from.
    """
    from slrmerge.searching.plots import draw_result

    files = {TABLE: _table(result)}
    named = result.choice.named()
    files |= {file: _recipe(result, name, named[name]) for name, file in RECIPES.items() if name in named}
    summary = result.summary()
    with translate_os_errors(folder):
        for file, text in files.items():
            replace_file(folder / file, text.encode())
        for file in set(RECIPES.values()) - files.keys():
            (folder / file).unlink(missing_ok=True)
        draw_result(folder, result.rows, result.choice, summary)
        content = summary.model_dump(mode="json", exclude_defaults=True)
        replace_file(folder / SUMMARY_NAME, to_json(content, indent=2).encode() + b"\n")


def read_result(folder: str | os.PathLike[str]) -> SearchResult:
    """Read a search's folder, with its selection as it was. Raises OutputError where it is missing or damaged."""
    folder = Path(folder)
    try:
        raw, table = (read_file(folder / name, _MAX_BYTES) for name in (SUMMARY_NAME, TABLE))
    except OSError as error:
        what, remedy = "does not contain the results of a search", "name the folder that a search wrote"
        raise OutputError(Problem("no-results", str(folder), what, remedy)) from error
    damaged = OutputError(
        Problem("results-damaged", str(folder), "contains damaged results of a search", "search again")
    )
    try:
        summary = SearchSummary.from_json(raw)
        lines = csv.DictReader(StringIO(table.decode(), newline=""))
        rows = tuple(_Line.model_validate(line).to_candidate() for line in lines)
        sides = {"pretrained": summary.pretrained, "posttrained": summary.posttrained}
        base = Recipe(**sides, dtype=summary.dtype, vocabulary=summary.vocabulary)
    except (ValueError, csv.Error, RecipeError) as error:
        raise damaged from error
    parents = [row.info.space for row in rows if row.exact and row.info.space in ("post", "pre")]
    conditions = {row.conditions for row in rows}
    if parents != [name for name in ("post", "pre") if name in summary.selected]:
        raise damaged
    if summary.held_out is not None and "post" not in summary.held_out.scores:
        raise damaged
    if "post" not in parents or not conditions <= summary.post_quality.keys():
        raise damaged
    return SearchResult(
        rows=rows,
        choice=select_from(rows, base=base.loaded_from(folder / RECIPES["slr"]), min_quality=summary.min_quality),
        post_quality=summary.post_quality,
        layers=summary.layers,
        task=summary.task,
        notes=summary.notes,
        elapsed_s=summary.elapsed_s,
        prompt=summary.prompt,
        date=summary.date,
        versions=summary.versions,
        held_out=summary.held_out,
        reselected=summary.reselected,
    )


def why_not_results(folder: Path) -> str | None:
    """Why a folder is not exactly the results of a search, which is all that a search replaces; None where it is."""
    names = {path.name for path in folder.iterdir()}
    if SUMMARY_NAME not in names or TABLE not in names:
        return "does not contain the results of a search"
    known = {SUMMARY_NAME, TABLE, PROMPTS, *RECIPES.values(), *FIGURES}
    others = sorted({name.removesuffix(".new") for name in names} - known)
    return f"contains more than the results of a search ({', '.join(others)})" if others else None


def _table(result: SearchResult) -> str:
    rows = result.to_rows()
    values = ([str(value).lower() if isinstance(value, bool) else value for value in row.values()] for row in rows)
    return to_csv(list(rows[0]), values)


def _none_if_empty(cell: object) -> object:
    return None if cell == "" else cell


_Cell = BeforeValidator(_none_if_empty)
_Text = Annotated[str, BeforeValidator(lambda cell: from_csv(cell) if isinstance(cell, str) else cell)]


class _Line(BaseModel):
    """A line of the table."""

    model_config = ConfigDict(extra="forbid")

    space: _Text
    label: _Text
    also_named: Annotated[Json[tuple[str, ...]] | None, _Cell]
    start: Annotated[int | None, _Cell]
    end: Annotated[int | None, _Cell]
    alpha: Annotated[float | None, _Cell]
    modules: Annotated[_Text | None, _Cell]
    layers_restored: int
    quality: float
    diversity: float
    feasible: bool
    pareto: bool
    exact: bool
    prompts: int
    dtype: _Text
    rules: Json[Rules]

    def to_candidate(self) -> ScoredCandidate:
        info = CandidateInfo(
            space=self.space,
            label=self.label,
            also_named=self.also_named or (),
            rules=self.rules,
            start=self.start,
            end=self.end,
            alpha=self.alpha,
            modules=self.modules,
            layers_restored=self.layers_restored,
        )
        return ScoredCandidate(
            info, self.quality, self.diversity, self.prompts, self.dtype, self.exact, self.feasible, self.pareto
        )


_WHY = {
    "slr": "the interval with the highest diversity and at least {ratio:g} of the post-trained model's quality",
    "soup": "the soup with the highest diversity and at least {ratio:g} of the post-trained model's quality",
    "early": "a control: as many layers as slr.yaml, the first ones",
    "late": "a control: as many layers as slr.yaml, the last ones",
}


def _recipe(result: SearchResult, name: str, row: ScoredCandidate) -> str:
    post, task = result.choice.post, printable(result.task)
    return (
        f"# {printable(row.info.label)}: {_WHY[name].format(ratio=result.choice.min_quality)}.\n"
        f"# Selected by `slrmerge search` ({task}, {row.conditions}) from {len(result.rows)} candidates:\n"
        f"# Q {row.quality:.4f}, D {row.diversity:.4f} nats; the post-trained model: Q {post.quality:.4f}, "
        f"D {post.diversity:.4f}.\n" + write_yaml(result.choice.recipe_for(row).to_dict())
    )
