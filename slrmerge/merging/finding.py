"""The result of the search that wrote a recipe, for the model card."""

import json
from dataclasses import dataclass

from pydantic import Field

from slrmerge.checkpoint.files import LocalFile, open_within, unreadable
from slrmerge.errors import CheckpointError
from slrmerge.io.model import Model
from slrmerge.recipe.load import AnyRecipe
from slrmerge.recipe.model import CheckpointName
from slrmerge.recipe.rules import Rules

_MAX_SUMMARY_BYTES = 1 << 26

SUMMARY_NAME = "summary.json"
TRADEOFF_NAME = "tradeoff.png"


class SelectedCandidate(Rules):
    """A candidate in a search's summary: its rules, and its scores over all prompts."""

    label: str
    quality: float
    diversity: float
    exact: bool


class ScoreChange(Model):
    """The mean change of a score from the post-trained model on the same prompts, with its 95% bootstrap interval.

    Without an interval where there is only one prompt.
    """

    mean: float
    low: float | None = None
    high: float | None = None

    def text(self, digits: int) -> str:
        """`+0.53 [+0.33, +0.72]`, with so many digits."""
        mean = f"{self.mean:+.{digits}f}"
        if self.low is None or self.high is None:
            return mean
        return f"{mean} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


class HeldOutScores(Model):
    """Mean scores of a candidate on held-out prompts; without changes for the post-trained model itself."""

    label: str
    quality: float
    diversity: float
    quality_change: ScoreChange | None = None
    diversity_change: ScoreChange | None = None


class HeldOut(Model):
    """Scores on prompts that were not used to select, by the names of `selected` and `runner_up`."""

    prompts: int
    scores: dict[str, HeldOutScores]


class SearchSummary(Model):
    """The content of a search's summary.json."""

    slrmerge: str
    task: str
    pretrained: CheckpointName
    posttrained: CheckpointName
    dtype: str | None = None
    vocabulary: str = "same"
    layers: int
    candidates: int
    min_quality: float
    selected: dict[str, SelectedCandidate]
    near_ties: tuple[SelectedCandidate, ...] = ()
    held_out: HeldOut | None = None
    reselected: dict[str, float] = Field(default_factory=dict)
    post_quality: dict[str, float]
    date: str | None = None
    prompt: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    elapsed_s: float

    @classmethod
    def from_json(cls, raw: bytes) -> "SearchSummary":
        """Raises ValueError. pydantic's own parser refuses the names of folders that are not UTF-8."""
        try:
            return cls.model_validate(json.loads(raw))
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


@dataclass(frozen=True, slots=True)
class Finding:
    """What a search found about a recipe: `own` is the recipe's candidate, `others` what it is compared with.

    `reselected` is the share of resampled prompts that select `own`, None where that is not known.
    """

    task: str
    candidates: int
    own: SelectedCandidate
    others: tuple[SelectedCandidate, ...]
    figure: LocalFile | None
    held_out: HeldOut | None = None
    reselected: float | None = None


def find_search_result(recipe: AnyRecipe) -> Finding | None:
    """The result of the search that wrote `recipe`, or None where its folder has none for these rules.

    Raises CheckpointError for a figure that a link leads out of the folder to: it would be published.
    """
    if recipe.file is None:
        return None
    folder = recipe.file.parent
    try:
        with open_within(folder, SUMMARY_NAME) as file:
            summary = SearchSummary.from_json(file.read(_MAX_SUMMARY_BYTES))
    except (OSError, ValueError, CheckpointError):
        return None
    if (summary.pretrained, summary.posttrained) != (recipe.pretrained, recipe.posttrained):
        return None
    own = next((name for name, found in summary.selected.items() if found.rules() == recipe.rules()), None)
    if own is None:
        return None
    try:
        figure = LocalFile.within(folder, TRADEOFF_NAME) if (folder / TRADEOFF_NAME).is_file() else None
    except OSError as error:
        raise unreadable(folder / TRADEOFF_NAME, error) from error
    others = tuple(found for name, found in summary.selected.items() if name != own)
    return Finding(
        summary.task,
        summary.candidates,
        summary.selected[own],
        others,
        figure,
        summary.held_out,
        summary.reselected.get(summary.selected[own].label, 0.0) if own == "slr" and summary.reselected else None,
    )
