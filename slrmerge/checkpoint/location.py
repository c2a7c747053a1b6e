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
    def parse(cls, text: str) -> "Repository | None":
        """The repository that `organisation/name@revision` names; None where `text` cannot name one."""
        match = _REPOSITORY.fullmatch(text)
        return cls(match["name"], match["revision"]) if match else None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


Source = Path | Repository


def parse_source(text: str | os.PathLike[str], *, base: Path = Path()) -> Source:
    """The folder, GGUF file or repository that `text` names; a relative path counts from `base`.

    An existing folder takes precedence over a repository of the same name. A path object is never a repository.
    """
    if not isinstance(text, str):
        return base / text
    folder = base / os.path.expanduser(text)  # noqa: PTH111 (an unknown user is not an error here)
    exists = os.path.exists(folder)  # noqa: PTH110 (nor is a name that is too long)
    return folder if exists or text.endswith(".gguf") else Repository.parse(text) or folder


_REPOSITORY = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
