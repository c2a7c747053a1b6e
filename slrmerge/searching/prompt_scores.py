"""Q and D of each candidate on each prompt: the file `prompts.npz` of a search."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray

from slrmerge.errors import OutputError, Problem
from slrmerge.io.files import read_file, replace_file
from slrmerge.io.pieces import translate_os_errors
from slrmerge.searching.proxy_tasks import Scores

PROMPTS = "prompts.npz"
_HELD_OUT = "held_out_"
_MAX_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class PromptScores:
    """Scores of candidates, by label, on questions; NaN where a candidate was not scored."""

    candidates: tuple[str, ...]
    questions: tuple[str, ...]
    scores: Scores

    def __post_init__(self) -> None:
        shape = len(self.candidates), len(self.questions)
        for values in self.scores:
            if values.shape != shape or values.dtype != np.float64:
                raise ValueError(f"expected float64 of shape {shape}, got {values.dtype} of shape {values.shape}")

    def of(self, label: str) -> Scores:
        """The scores of one candidate, each of shape (prompts,)."""
        place = self.candidates.index(label)
        return Scores(self.scores.quality[place], self.scores.diversity[place])


class KeptScores(NamedTuple):
    """The scores on the prompts that a selection is made by, and those on the held-out prompts."""

    asked: PromptScores
    held_out: PromptScores | None


def write_prompts(folder: Path, kept: KeptScores) -> None:
    """Write the scores of a search to its folder. Raises OutputError."""
    data = BytesIO()
    np.savez_compressed(data, **dict(_arrays(kept)))  # type: ignore[arg-type]  # mypy takes one for allow_pickle
    with translate_os_errors(folder / PROMPTS):
        replace_file(folder / PROMPTS, data.getvalue())


def read_prompts(folder: Path, labels: Sequence[str]) -> KeptScores | None:
    """Read the scores of the candidates with these labels from a search's folder; None where there are none.

    Raises OutputError where they are damaged, or scores of other candidates.
    """
    path = folder / PROMPTS
    what, remedy = "is damaged", "search again, or delete the file to select without it"
    damaged = OutputError(Problem("results-damaged", str(path), what, remedy))
    try:
        raw = read_file(path, _MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise damaged from error
    try:
        kept = _kept_in(raw)
    except Exception as error:  # zipfile and numpy raise anything for a damaged file
        raise damaged from error
    if kept.asked.candidates != tuple(labels):
        raise damaged
    return kept


def _kept_in(raw: bytes) -> KeptScores:
    with ZipFile(BytesIO(raw)) as file:
        if sum(info.file_size for info in file.infolist()) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
    with np.load(BytesIO(raw)) as file:
        arrays = dict(file)
    is_asked = any(name.startswith(_HELD_OUT) for name in arrays)
    return KeptScores(_scores_in(arrays, ""), _scores_in(arrays, _HELD_OUT) if is_asked else None)


def _arrays(kept: KeptScores) -> Iterator[tuple[str, NDArray[np.generic]]]:
    for prefix, found in (("", kept.asked), (_HELD_OUT, kept.held_out)):
        if found is not None:
            yield f"{prefix}candidates", np.array(found.candidates, dtype=np.str_)
            yield f"{prefix}questions", np.array(found.questions, dtype=np.str_)
            yield from zip((prefix + name for name in Scores._fields), found.scores, strict=True)


def _scores_in(arrays: dict[str, NDArray[np.generic]], prefix: str) -> PromptScores:
    candidates, questions, *scores = (arrays[prefix + name] for name in ("candidates", "questions", *Scores._fields))
    return PromptScores(tuple(map(str, candidates)), tuple(map(str, questions)), Scores(*scores))  # type: ignore[arg-type]
