"""Results of a search with candidates of every kind."""

import csv
from dataclasses import replace
from pathlib import Path

from slrmerge.recipe.rules import LayerRule, Rules
from slrmerge.searching.candidates import CandidateInfo
from slrmerge.searching.results import SearchResult
from slrmerge.searching.results_folder import write_result
from slrmerge.searching.selection import ScoredCandidate
from tests.searching.pairs import made_rows, row

SCORES = {(0, 0): (0.95, 1.4), (1, 1): (0.9, 1.7), (2, 2): (0.87, 1.6), (0, 1): (0.95, 1.6), (1, 2): (0.3, 2.2),
          (0, 2): (0.1, 2.4)}  # fmt: skip
OWN = CandidateInfo(
    space="recipe",
    label='ünï, "own".yaml',
    also_named=("a = b", "c, d = e", 'quote " and \nline'),
    rules=Rules(layers=(LayerRule(range=(0, 2), alpha=(0.25, 0.5), modules=("mlp",)),)),
)
ATTENTION = CandidateInfo(
    space="attention", label="layers 0–1, self_attn only", start=0, end=1, modules="self_attn", layers_restored=2,
    rules=Rules(layers=(LayerRule(range=(0, 1), modules=("self_attn",), alpha=1.0),)),
)  # fmt: skip
MERGEKIT = CandidateInfo(space="recipe", label="mergekit.yml", rules=Rules())
FILES = ["early.yaml", "late.yaml", "results.csv", "slr.yaml", "soup.yaml", "summary.json"]
COLUMNS = [
    "space", "label", "also_named", "start", "end", "alpha", "modules", "layers_restored", "quality", "diversity",
    "feasible", "pareto", "exact", "prompts", "dtype", "rules",
]  # fmt: skip


def sample() -> list[ScoredCandidate]:
    """Rows of every kind."""
    others = [row(OWN, 0.5, 0.5), row(ATTENTION, 0.9, 1.1), row(MERGEKIT, 1 / 3, 1e-7)]
    return made_rows(SCORES | {(0, 2): (0.0, 0.0)}) + others


def write(folder: Path, result: SearchResult) -> SearchResult:
    """Write a result, and return it as one of a search into this folder."""
    base = result.choice.base.loaded_from(folder / "slr.yaml")
    result = replace(result, choice=replace(result.choice, base=base))
    write_result(folder, result)
    return result


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
