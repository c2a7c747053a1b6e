"""What a search found about the recipe that it wrote, as it stands beside that recipe."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slrmerge.recipe import Recipe

SUMMARY_NAME = "summary.json"
PICTURE_NAME = "tradeoff.png"


@dataclass(frozen=True, slots=True)
class Finding:
    """A search's scores: `label` → (quality, diversity in nats) of the recipe itself first, then of what it was held
    against. `picture` shows all `candidates`.
    """

    task: str
    candidates: int
    scores: Mapping[str, tuple[float, float]]
    picture: Path | None


def finding_of(recipe: Recipe) -> Finding | None:
    """What the search that wrote `recipe` found, or None where no search did, or its results are not beside it."""
    if recipe.file is None:
        return None
    folder = recipe.file.parent
    try:
        summary = json.loads((folder / SUMMARY_NAME).read_bytes())
        chosen = summary["chosen"]
        if (summary["pretrained"], summary["posttrained"]) != (recipe.pretrained, recipe.posttrained):
            return None
        own = next((name for name, found in chosen.items() if recipe.is_alike(found)), None)
        if own is None:
            return None
        picture = folder / PICTURE_NAME
        return Finding(
            str(summary["task"]),
            int(summary["candidates"]),
            {
                str(chosen[name]["label"]): (float(chosen[name]["quality"]), float(chosen[name]["diversity"]))
                for name in (own, *(other for other in chosen if other != own))
            },
            picture if picture.is_file() else None,
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
