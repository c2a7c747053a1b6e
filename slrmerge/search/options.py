"""How to search, and what this machine has for it."""

import os
from dataclasses import dataclass

from slrmerge.recipe import Recipe
from slrmerge.search.choose import MIN_QUALITY


@dataclass(frozen=True)
class SearchOptions:
    """How to search. `also` are recipes to try besides the `spaces`; `dtype` and `max_memory_bytes` have defaults that
    follow from the model and the machine. With `quick` a first pass asks fewer prompts."""

    task: str = "crc"
    spaces: tuple[str, ...] = ("intervals", "soups")
    also: tuple[tuple[str, Recipe], ...] = ()
    min_quality: float = MIN_QUALITY
    dtype: str | None = None
    device: str = "cpu"
    max_memory_bytes: int | None = None
    quick: bool = False
    resumable: bool = True
    threads: int | None = None


def physical_memory_bytes() -> int:
    """This machine's memory, or a modest guess where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 << 30
