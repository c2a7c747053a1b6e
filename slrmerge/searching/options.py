"""The options of searches."""

import datetime
import os
from dataclasses import dataclass
from typing import Any

from slrmerge.io.memory import memory_bytes
from slrmerge.io.options import Options, options_in
from slrmerge.searching.spaces import SPACES

MIN_QUALITY = 0.9
"""The share of the post-trained model's quality to keep (paper, section 3.3)."""

TASK_NAMES = ("crc", "colors", "countries", "dice", "months", "names", "yes-no")
"""The proxy tasks that slrmerge contains."""

_candidates, _prompts, _resources = map(options_in, ("Candidates", "Prompts", "Resources"))


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Options):
    """How to search. `spaces` and `also` accept one value, a list or a tuple."""

    min_quality: float = _candidates(
        MIN_QUALITY, "Minimum quality, as a share of the post-trained model's.", minimum=0, maximum=1
    )
    spaces: tuple[str, ...] = _candidates(
        ("intervals", "soups"), "Candidates to try; repeat for several.", flag="--space", choices=tuple(SPACES)
    )
    also: tuple[Any, ...] = _candidates((), "Another recipe to score; repeat for several.", metavar="RECIPE")
    task: str = _prompts(
        "crc",
        f"Proxy task: {', '.join(TASK_NAMES)}, or a YAML file.",
        choices=TASK_NAMES,
        or_file=(".yaml", ".yml"),
        metavar="NAME | FILE",
    )
    date: str | None = _prompts(
        None,
        "Date for chat templates that ask for it, such as 2025-03-07.",
        metavar="DATE",
        is_date=True,
        default_help="today",
    )
    quick: bool = _prompts(False, "Score all candidates on 8 prompts first, then the finalists on all prompts.")
    held_out: bool = _prompts(True, "Score the selection on held-out prompts, too.", flag="--held-out/--no-held-out")
    dtype: str | None = _resources(
        None,
        "Dtype of the first pass; finalists are re-scored in float32.",
        choices=("float32", "bfloat16"),
        default_help="bfloat16 from 1e9 parameters, where it is faster",
    )
    device: str = _resources("cpu", "Torch device, such as cuda:0; CUDA is not tested yet.")
    max_memory: int | str | None = _resources(
        None,
        "Memory for hidden states; the rest is kept on disk.",
        metavar="SIZE",
        is_size=True,
        default_help="half of the memory",
    )
    resume: bool = _resources(True, "Keep hidden states so that a killed search resumes.", flag="--resume/--no-resume")
    ray: str | None = _resources(None, "Run on a Ray cluster: auto, local, or HOST:PORT.", metavar="ADDRESS")
    threads: int | None = _resources(None, "Number of threads.", minimum=1, default_help="one per core")

    def __post_init__(self) -> None:
        for name in ("spaces", "also"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list | tuple) else (value,))
        if isinstance(self.task, os.PathLike):
            object.__setattr__(self, "task", os.fspath(self.task))
        super().__post_init__()

    @property
    def day(self) -> datetime.date | None:
        """`date` as a date."""
        return datetime.date.fromisoformat(self.date) if self.date else None

    @property
    def max_memory_bytes(self) -> int:
        return self.max_memory if isinstance(self.max_memory, int) else memory_bytes() // 2
