"""The result of the search that wrote a recipe, for the model card."""

from dataclasses import dataclass

from pydantic import ValidationError

from slrmerge.checkpoint.files import LocalFile
from slrmerge.io.model import Model
from slrmerge.recipe.load import AnyRecipe
from slrmerge.recipe.rules import Rules

SUMMARY_NAME = "summary.json"
TRADEOFF_NAME = "tradeoff.png"


class SelectedCandidate(Rules):
    """A candidate in a search's summary: its rules, and its scores over all prompts."""

    label: str
    quality: float
    diversity: float
    exact: bool


class SearchSummary(Model):
    """The content of a search's summary.json."""

    slrmerge: str
    task: str
    pretrained: str
    posttrained: str
    dtype: str | None = None
    layers: int
    candidates: int
    min_quality: float
    selected: dict[str, SelectedCandidate]
    near_ties: tuple[SelectedCandidate, ...] = ()
    post_quality: dict[str, float]
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Finding:
    """What a search found out about a recipe: `own` is the recipe's candidate, `others` what it is compared with."""

    task: str
    candidates: int
    own: SelectedCandidate
    others: tuple[SelectedCandidate, ...]
    figure: LocalFile | None


def find_search_result(recipe: AnyRecipe) -> Finding | None:
    """The result of the search that wrote `recipe`, or None where its folder has none for these rules."""
    if recipe.file is None:
        return None
    folder = recipe.file.parent
    try:
        summary = SearchSummary.model_validate_json((folder / SUMMARY_NAME).read_bytes())
    except (OSError, ValidationError):
        return None
    if (summary.pretrained, summary.posttrained) != (recipe.pretrained, recipe.posttrained):
        return None
    own = next((name for name, found in summary.selected.items() if found.rules() == recipe.rules()), None)
    if own is None:
        return None
    others = tuple(found for name, found in summary.selected.items() if name != own)
    figure = folder / TRADEOFF_NAME
    return Finding(
        summary.task,
        summary.candidates,
        summary.selected[own],
        others,
        LocalFile.at(figure) if figure.is_file() else None,
    )
