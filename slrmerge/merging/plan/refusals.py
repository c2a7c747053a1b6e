"""Why tensors cannot be planned, and notes on those that can: each reason once, for all its names."""

from collections import defaultdict

from slrmerge.checkpoint.layers import group_names
from slrmerge.errors import Problem

KEEP = "keep it post-trained: give it alpha: 0 under `tensors`"
ANOTHER_MODEL = "the two are not the same architecture: name the model that it was trained from"
NO_SUCH_PART = "the pre-trained model has no such {}, kept from the post-trained side"
ALSO_THE_HEAD = "is also the output head on the post-trained side, but not on the pre-trained side"
QUANTIZED_ALIKE = "merge two models quantized in the same way"


class Refusals:
    """Names that cannot be planned, by code, reason and remedy."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str, str], dict[str, None]] = defaultdict(dict)

    def __bool__(self) -> bool:
        return bool(self._names)

    def add(self, name: str, code: str, what: str, remedy: str) -> None:
        self._names[code, what, remedy][name] = None

    def problems(self) -> list[Problem]:
        """A problem for each reason and each group of names that differ in numbers only."""
        return [
            Problem(code, where, what, remedy)
            for (code, what, remedy), names in self._names.items()
            for where in group_names(names)
        ]


class Notes:
    """Notes on the plan, each with the names of the tensors that it is about."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = defaultdict(list)

    def add(self, note: str, name: str) -> None:
        self._names[note].append(name)

    def lines(self) -> list[str]:
        return [f"{note}: {_some(names)}" for note, names in self._names.items()]


def _some(names: list[str]) -> str:
    """Up to three groups of names, or their number and the first group."""
    groups = list(group_names(names))
    return "; ".join(groups) if len(groups) <= 3 else f"{len(names):,} tensors, among them {groups[0]}"
