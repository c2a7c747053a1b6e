"""A folder that appears complete or not at all: locked, staged beside its target, and put in place in one step.

Killed at any moment, the target is absent or as it was, and the next run resumes from what the staging folder holds.
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slrmerge.errors import OutputError, Problem, raise_all, require_type
from slrmerge.io import files
from slrmerge.io.lock import OTHERS_WRITE, lock, unsafe, unsafe_problem
from slrmerge.io.pieces import require_free_bytes, translate_os_errors
from slrmerge.io.progress import Progress

WhyNotReplaceable = Callable[[Path], str | None]
"""Why `overwrite` should not replace an existing folder, or None where it may."""


class OutputFolder:
    """The folder `out`, to be written while `sources` are read.

    With `overwrite` an existing folder is replaced, unless `why_not_replaceable` objects. `durable` output is synced to
    the disk before it takes its name. `check` and everything after it raise OutputError and NoSpaceError.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        sources: Iterable[Path] = (),
        overwrite: bool = False,
        why_not_replaceable: WhyNotReplaceable = lambda _: None,
        durable: bool = True,
    ) -> None:
        self.path = resolve_target(out)
        self.staging = staging_folder(self.path)
        self.durable = durable
        self._staged: os.stat_result | None = None
        self._complete: os.stat_result | None = None
        self._sources = tuple(sources)
        self._overwrite = overwrite
        self._why_not_replaceable = why_not_replaceable

    def __repr__(self) -> str:
        return f"OutputFolder({str(self.path)!r})"

    @property
    def published(self) -> bool:
        """Whether the target is the folder that was staged; exact even where a signal interrupts the replacement."""
        if self._complete is None or not self.path.exists():
            return False
        return os.path.samestat(self._complete, self.path.stat())

    def check(self) -> None:
        """Raise OutputError with everything that keeps the folder from being written, as far as can be told now."""
        with translate_os_errors(self.path):
            raise_all(self.problems(), OutputError)

    def problems(self) -> Iterator[Problem]:
        """What keeps the folder from being written."""
        target = self.path
        if not target.name or os.path.ismount(target):
            yield Problem(
                "mount-point", str(target), "is a mount point, which cannot be replaced", "name a folder in it"
            )
            return
        overlaps = [problem for place in self._sources for problem in self._overlaps(place)]
        yield from overlaps
        if overlaps:
            return
        yield from self._target_problems()
        parent = next((folder for folder in target.parents if folder.exists()), target)
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            what = "is not a writable folder"
            yield Problem("output-not-writable", str(parent), what, "choose another output folder")
        if _is_too_long(self.staging, parent):
            what = "has a name or a path that is too long to be staged beside it"
            yield Problem("invalid-output", str(target), what, "choose a shorter one")
        else:
            yield from self._unsafe_folders()

    def check_target(self) -> None:
        """Raise OutputError where what is at the target now must not be replaced.

        To be called before `publish`, and before removing what a run would resume from: someone may have put a folder
        there, or a file into the old one.
        """
        with translate_os_errors(self.path):
            raise_all(self._target_problems(), OutputError)

    def _target_problems(self) -> Iterator[Problem]:
        target = self.path
        if target.exists() and not target.is_dir():
            yield Problem("output-is-a-file", str(target), "is a file", "name a folder")
        elif target.exists() and any(target.iterdir()):
            if not self._overwrite:
                what, remedy = "already exists and is not empty", "choose another output folder, or pass overwrite=True"
                yield Problem("output-exists", str(target), what, remedy)
            elif why := self._why_not_replaceable(target):
                what = f"{why}, so overwrite does not replace it"
                yield Problem("output-not-replaceable", str(target), what, "choose another output folder")
        if target.is_dir() and _is_kept_by_others(target):
            what = "belongs to another user, whom its parent's sticky bit protects"
            yield Problem("output-not-replaceable", str(target), what, "choose another output folder")

    def _unsafe_folders(self) -> Iterator[Problem]:
        for folder in (self.staging, set_aside_folder(self.path)):
            yield from unsafe(folder, "folder", stat.S_ISDIR)

    def require_space(self, needed_bytes: int, *, what: str = "the output", remedy: str = "") -> None:
        """Raise NoSpaceError unless the disk has `needed_bytes` free."""
        require_free_bytes(self.path, needed_bytes, what, remedy or "choose an output folder on another disk")

    @contextmanager
    def locked(self, progress: Progress) -> Iterator[None]:
        """Hold the folder against other processes, and restore what a killed run left half replaced.

        Raises BusyError when another process holds it.
        """
        with translate_os_errors(self.path):
            files.create_folder(self.path.parent, durable=self.durable)
            raise_all(self._unsafe_folders(), OutputError)
            with lock(self.path):
                if self._recover():
                    progress.message(f"restored {self.path}, which an interrupted run had moved aside")
                self.check()
                yield

    def create_staging(self) -> None:
        """Create the staging folder, which only this user can enter, or reuse that of an earlier run.

        Raises OutputError for one that someone else made or can write to.
        """
        with translate_os_errors(self.path):
            try:
                self.staging.mkdir(mode=0o700)
            except FileExistsError:
                raise_all(self._unsafe_folders(), OutputError)
            self._staged = self.staging.lstat()

    @contextmanager
    def staged(self, what_is_kept: Callable[[BaseException], str | None]) -> Iterator[Path]:
        """The staging folder, which the caller creates or resumes from; see `create_staging`.

        After a failure it is kept where `what_is_kept` gives the error a note about that, and otherwise removed.
        """
        try:
            yield self.staging
        except BaseException as error:
            if self.published:
                error.add_note(f"{self.path} is complete: this happened afterwards")
            elif self.staging.exists():
                if note := what_is_kept(error):
                    error.add_note(note)
                else:
                    try:
                        shutil.rmtree(self.staging)
                    except OSError as failure:
                        left = f"{self.staging} is left ({failure.strerror})"
                        error.add_note(f"{left}; the same command resumes from it")
            raise

    def publish(self, progress: Progress) -> None:
        """Give the complete staging folder the target's name, and remove what it replaces."""
        if self._staged and not os.path.samestat(self._staged, self.staging.lstat()):
            raise OutputError(unsafe_problem(self.staging, "was replaced by another program"))
        mode = _usual_mode(self.staging)
        self.staging.chmod(mode & ~OTHERS_WRITE)  # the next run would refuse what a kill leaves if others could write
        if self.durable:
            files.sync_folder(self.staging)
        self._complete = self.staging.stat()
        if self.path.exists():
            with suppress(OSError):
                self.path.chmod(self.path.stat().st_mode & ~OTHERS_WRITE)
        leftover = self._replace()
        with suppress(OSError):
            self.path.chmod(mode)
            if leftover is not None:
                leftover.chmod(0o700)  # so that the next run can remove what a kill leaves of it
        if self.durable:
            files.sync_folder(self.path.parent)
        if leftover is not None:
            try:
                shutil.rmtree(leftover)
            except OSError as error:
                progress.message(f"could not remove the replaced folder, now {leftover} ({error.strerror})")

    def _replace(self) -> Path | None:
        """Rename the staging folder to the target; returns where an older target is now.

        On Linux the two names are exchanged in one step. Elsewhere the old folder is first moved aside: a kill between
        the two renames leaves the target absent and the old folder whole, and `_recover` brings it back.
        """
        target = self.path
        if not target.exists() or not any(target.iterdir()):
            if os.name == "nt" and target.exists():
                target.rmdir()
            os.replace(self.staging, target)
            return None
        if files.exchange(self.staging, target):
            return self.staging
        aside = set_aside_folder(target)
        os.replace(target, aside)
        try:
            os.replace(self.staging, target)
        except OSError:
            os.replace(aside, target)
            raise
        return aside

    def _recover(self) -> bool:
        """Finish what a kill inside `_replace` left; True when an old target was brought back."""
        aside = set_aside_folder(self.path)
        if not aside.exists():
            return False
        if self.path.exists():
            shutil.rmtree(aside)
            return False
        os.replace(aside, self.path)
        return True

    def _overlaps(self, place: Path) -> Iterator[Problem]:
        """How a source and the folders that this run writes get in each other's way, links resolved."""
        target = self.path
        source = Path(os.path.realpath(place))
        if place.is_file():  # where it is a link, the link must stay too
            linked = [Path(os.path.realpath(place.parent)) / place.name]
        else:
            linked = [Path(os.path.realpath(entry)) for entry in place.iterdir()]
        for workplace in (self.staging, set_aside_folder(target)):
            if any(path.is_relative_to(workplace) for path in (source, *linked)):
                what = f"is where {target} would be written"
                yield Problem("output-overlaps", str(source), what, "move this source, or choose another output folder")
                return
        if target == source or (target.exists() and target.samefile(source)):
            yield Problem("output-overlaps", str(target), "is one of the sources", "choose another output folder")
        elif target.is_relative_to(source):
            what = f"is inside the source {source}"
            yield Problem("output-overlaps", str(target), what, "choose an output folder outside it")
        elif source.is_relative_to(target):
            what = f"contains the source {source}"
            yield Problem("output-overlaps", str(target), what, "choose an output folder beside it")
        elif any(path.is_relative_to(target) for path in linked):
            what = f"contains files that {source} links to"
            yield Problem("output-overlaps", str(target), what, "choose another output folder")


def resolve_target(out: str | os.PathLike[str]) -> Path:
    """Where the output really goes, links resolved.

    Raises OutputError for a path that no folder can have, and OptionError for a value that is not a path.
    """
    require_type("out", out, (str, os.PathLike), "pass the path of a folder")
    try:
        if not os.fspath(out):
            raise ValueError("its name is empty")
        target = Path(os.path.realpath(out))
        for path in (target, staging_folder(target)):  # the longer name must fit too
            with suppress(FileNotFoundError, NotADirectoryError):
                path.stat()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        what = f"cannot be a folder ({why})"
        raise OutputError(Problem("invalid-output", str(out), what, "choose another output folder")) from None
    return target


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders; missing ones are ignored, links are not followed."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def staging_folder(target: Path) -> Path:
    """The hidden sibling in which `target` is written."""
    return target.parent.joinpath(f".{target.name}.slrmerge-partial")


def set_aside_folder(target: Path) -> Path:
    """Where the old `target` is during a replacement, on systems that cannot exchange two folders in one step."""
    return target.parent.joinpath(f".{target.name}.slrmerge-old")


def _is_too_long(staging: Path, parent: Path) -> bool:
    """Whether a staging folder, or a file in it, would have a longer name than the disk of `parent` takes."""
    if not hasattr(os, "pathconf"):
        return False
    longest = max(len(os.fsencode(part)) for part in staging.relative_to(parent).parts)
    name_max, path_max = (os.pathconf(parent, name) for name in ("PC_NAME_MAX", "PC_PATH_MAX"))
    return 0 < name_max < longest or 0 < path_max <= len(os.fsencode(staging)) + name_max


def _is_kept_by_others(path: Path) -> bool:
    """Whether the folder that `path` is in lets only others rename it, as /tmp does with each user's files."""
    parent = path.parent.stat()
    return bool(parent.st_mode & stat.S_ISVTX) and os.geteuid() not in (0, parent.st_uid, path.stat().st_uid)


def _usual_mode(folder: Path) -> int:
    """The mode that the umask, or an access control list, gives to a new folder in `folder`."""
    probe = folder / ".slrmerge-mode"
    with suppress(FileExistsError):
        probe.mkdir()
    mode = stat.S_IMODE(probe.lstat().st_mode)
    probe.rmdir()
    return mode
