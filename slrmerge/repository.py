"""Where a checkpoint is: a folder on this disk, or a repository on the Hub at a revision."""

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Repository:
    """A model repository on the Hub; `revision` is a branch, a tag or a commit, None for the default branch."""

    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, written: str) -> "Repository | None":
        """What `written` names, None where no repository can be called so."""
        match = _REPOSITORY.fullmatch(written)
        return cls(match["name"], match["revision"]) if match else None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


Source = Path | Repository


def parse_source(written: str, *, base: Path = Path()) -> Source:
    """What `written` names: a folder, which counts from `base`; else a repository, as `organisation/name@revision`.

    What exists is a folder, and so is what no repository could be called.
    """
    folder = base / os.path.expanduser(written)  # noqa: PTH111 (no such user is no error)
    exists = os.path.exists(folder)  # noqa: PTH110 (nor is a name too long)
    return folder if exists else Repository.parse(written) or folder


_REPOSITORY = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
