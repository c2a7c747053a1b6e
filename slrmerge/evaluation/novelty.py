"""NoveltyBench's two metrics, from the partitions and scores that its own scripts write (arXiv 2504.05228).

`--export noveltybench` writes each model's generations; its `partition.py` and `score.py` write their files beside
them. The next report reads these: which generations are equivalent, and how good a reward model finds them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from slrmerge.errors import DataError, Problem
from slrmerge.evaluation.lines import lines_of, open_data
from slrmerge.evaluation.metrics import Metric
from slrmerge.evaluation.questions import raise_shown
from slrmerge.evaluation.tasks.base import ModelResponses
from slrmerge.io.strict_json import parse_json

DISTINCT = Metric("novelty-distinct", "NoveltyBench's distinct: the number of different generations", most=inf)
UTILITY = Metric(
    "novelty-utility",
    "NoveltyBench's utility, 0 to 10: scores of generations unlike earlier ones, with patience 0.8",
    most=10,
)

PATIENCE = 0.8
"""The probability that a reader asks for another generation."""

PARTITIONS, SCORES = "partitions.jsonl", "scores.jsonl"


def distinct(partition: Sequence[int]) -> float:
    """The number of classes of equivalent generations; `partition` has the class of each. NaN without generations."""
    return float(len({*partition})) if partition else nan


def utility(scores: Sequence[float]) -> float:
    """The mean of `scores` with weights PATIENCE^i; NaN without generations.

    A generation that is equivalent to an earlier one has score 0.
    """
    return float(np.average(scores, weights=PATIENCE ** np.arange(len(scores)))) if scores else nan


@dataclass(frozen=True, slots=True)
class Novelty:
    """What NoveltyBench's scripts found out about one model's generations, by prompt id."""

    path: Path
    metrics: tuple[Metric, ...]
    lines: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Novelty":
        """The scores in a folder, or else its partitions; without metrics where it has neither.

        Raises DataError for a file that cannot be read, and for lines of another form.
        """
        path = folder / SCORES
        metrics: tuple[Metric, ...] = (DISTINCT, UTILITY)
        if not path.exists():
            path, metrics = folder / PARTITIONS, (DISTINCT,)
        if not path.exists():
            return cls(path, (), {})
        found: dict[str, dict[str, Any]] = {}
        problems = []
        with open_data(path) as file:
            for line in lines_of(file):
                try:
                    checked = _checked(parse_json(line.data))
                except (ValueError, KeyError, TypeError):
                    what = "is not a line of NoveltyBench's partitions or scores"
                    problems.append(Problem("not-partitions", f"{path}:{line.number}", what, "partition again"))
                else:
                    found[checked["id"]] = checked
        raise_shown(problems)
        return cls(path, metrics, found)

    def values(self, each: ModelResponses[Any], wanted: Iterable[Metric]) -> dict[str, float]:
        """The values of `wanted` metrics, NaN for those that the file does not have.

        Raises DataError where its generations are others than those that were partitioned.
        """
        line = self.lines.get(each.question.id, {})
        if line and line["generations"] != _digest(text or "" for text in each.texts):
            what = f"has other generations for the prompt {each.question.id}"
            remedy = "delete the file, then partition again"
            raise DataError(Problem("partitions-outdated", str(self.path), what, remedy))
        known = {
            DISTINCT.name: distinct(line.get("partition", [])),
            UTILITY.name: utility(line.get("generation_scores", [])),
        }
        return {metric.name: known[metric.name] for metric in wanted}


def _checked(line: Any) -> dict[str, Any]:
    """A line of the right form, with a digest of its generations. Raises KeyError, TypeError and ValueError."""
    partition, generations = line["partition"], line["generations"]
    numbers = [*partition, *line.get("generation_scores", ())]
    is_text = all(isinstance(text, str) for text in (line["id"], *generations))
    if not is_text or not all(type(number) in (int, float) for number in numbers):
        raise TypeError("a value has another type")
    if {len(partition), len(line.get("generation_scores", partition))} != {len(generations)}:
        raise ValueError("the lists have different lengths")
    return {**line, "generations": _digest(generations)}


def _digest(texts: Iterable[str]) -> bytes:
    digest = xxhash.xxh3_128()
    for text in texts:
        data = text.encode("utf-8", "replace")
        digest.update(b"%d " % len(data) + data)
    return digest.digest()
