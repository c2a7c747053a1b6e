"""Where a checkpoint is: a folder on this disk, a repository on the Hub at a revision, or an adapter on its base."""

import os
import re
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from slrmerge.errors import OptionError, Problem
from slrmerge.io.files import read_file
from slrmerge.io.sizes import shorten

_MAX_REF_BYTES = 1000
_MAX_PARENTS = 200
"""No system has deeper paths, and to list the parents of a text with many slashes takes quadratic time."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A model repository on the Hub; `revision` is a branch, a tag or a commit, None for the default branch.

    Raises OptionError for a name other than `organisation/name`.
    """

    name: str
    revision: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(_NAME, self.name, re.ASCII):
            what, remedy = f"{shorten(self.name)} is not the name of a repository", "write organisation/name"
            raise OptionError(Problem("invalid-repository", "repository", what, remedy))

    @classmethod
    def parse(cls, text: str) -> "Repository | None":
        """The repository that `text` names, or None: `organisation/name@revision`, its page on the Hub, or `hf://`."""
        match = _REPOSITORY.fullmatch(text) or _PAGE.fullmatch(text)
        return cls(match["name"], match["revision"] and match["revision"].replace("%2F", "/")) if match else None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


Place = Path | Repository
"""Where one folder or repository is."""


@dataclass(frozen=True, slots=True)
class AdapterOnBase:
    """An adapter and the base to put it on, written `BASE+ADAPTER` as in mergekit."""

    base: Place
    adapter: Place

    def __str__(self) -> str:
        return f"{self.base}+{self.adapter}"


Source = Place | AdapterOnBase


def parse_source(text: str | os.PathLike[str], *, base: Path = Path()) -> Source:
    """The folder, GGUF file or repository that `text` names; a relative path counts from `base`.

    An existing folder takes precedence over a repository of the same name. A path object is never a repository. Raises
    OptionError for an empty text.
    """
    place = parse_place(text, base=base)
    if not isinstance(place, Path) or not isinstance(text, str) or os.path.exists(place):  # noqa: PTH110 (see below)
        return place
    below, plus, adapter = text.rpartition("+")
    if not (plus and below and adapter):
        return place
    return AdapterOnBase(parse_place(below, base=base), parse_place(adapter, base=base))


def parse_place(text: str | os.PathLike[str], *, base: Path = Path()) -> Place:
    """See `parse_source`, for one folder or repository."""
    if not isinstance(text, str):
        return base / text
    if not text:  # what a shell makes of an unset variable is not the current folder
        raise OptionError(Problem("empty", "''", "names nothing", "write . for the current folder"))
    folder = base / os.path.expanduser(text)  # noqa: PTH111 (an unknown user is not an error here)
    if _is_taken(folder):
        return _shortened(folder)
    return folder if text.endswith(".gguf") else Repository.parse(text) or folder


def _is_taken(path: Path) -> bool:
    """Whether a name stands for something on this disk, also where it cannot be reached now.

    A repository on the Hub that happens to have that name is another model.
    """
    try:
        path.stat()
    except PermissionError:
        return True
    except (OSError, ValueError):  # a ValueError: a name that no file can have
        return is_broken_link(path)
    return True


def is_broken_link(path: Path) -> bool:
    """Whether a path is, or leads through, a link to nothing, such as to a disk that is not mounted."""
    places = islice(chain([path], path.parents), _MAX_PARENTS)
    return any(os.path.islink(place) and not os.path.exists(place) for place in places)  # noqa: PTH110, PTH114 (False for a name that is too long)


def _shortened(path: Path) -> Path:
    """`search/../pre` as `pre`, where no symbolic link makes that another place."""
    short = Path(os.path.normpath(path))
    return short if os.path.realpath(short) == os.path.realpath(path) else path


def folder_name(folder: Path) -> str:
    """The repository's name for a snapshot in the Hub's cache, else the folder's own."""
    folder = folder.resolve()
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return folder.name


def snapshot_of(folder: Path) -> Path:
    """Where `folder` is a repository in the Hub's cache, its snapshot of `main`, or else its only one.

    Raises OSError.
    """
    if not folder.name.startswith("models--") or not (folder / "snapshots").is_dir():
        return folder
    ref = folder / "refs" / "main"
    commit = read_file(ref, _MAX_REF_BYTES).decode("utf-8", "replace").strip() if ref.is_file() else ""
    if re.fullmatch("[0-9a-f]{1,64}", commit) and (folder / "snapshots" / commit).is_dir():
        return folder / "snapshots" / commit
    snapshots = list((folder / "snapshots").iterdir())
    return snapshots[0] if len(snapshots) == 1 else folder


_NAME = r"(?P<name>\w[\w.-]*/\w[\w.-]*)"
_REPOSITORY = re.compile(rf"(hf://)?{_NAME}(@(?P<revision>[\w./-]+))?", re.ASCII)
_PAGE = re.compile(
    rf"(https?://)?(huggingface\.co|hf\.co)/(?!(datasets|spaces|docs|blog)/){_NAME}(/tree/(?P<revision>[\w./%-]+?))?/?",
    re.ASCII,
)
