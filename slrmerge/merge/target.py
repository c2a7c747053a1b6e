"""May this folder be written, and is there room? Everything that can be told without writing."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from slrmerge import files
from slrmerge.checkpoint import CHAT_TEMPLATE_FOLDERS, CONFIG_NAME
from slrmerge.errors import NoSpaceError, OutputError, Problem
from slrmerge.plan import MergePlan

_MODEL_FOLDERS = frozenset({*CHAT_TEMPLATE_FOLDERS, ".cache"})
"""Folders that a checkpoint has inside: its templates, and what `hf download` leaves."""


def resolve_target(out: Path) -> Path:
    """Where the output really goes: a link keeps pointing at what it points at. Raises OutputError."""
    try:
        target = Path(os.path.realpath(out))
        with suppress(FileNotFoundError, NotADirectoryError):
            target.stat()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise OutputError(Problem(str(out), f"cannot be a folder ({why})", "choose another --out")) from None
    return target


def target_problems(plan: MergePlan, target: Path, *, overwrite: bool) -> Iterator[Problem]:
    """What keeps `target` from taking a merge, as far as can be told without writing."""
    sources = [plan.pretrained.folder, plan.posttrained.folder]
    return folder_problems(target, sources, overwrite=overwrite, reluctance=_no_mere_checkpoint)


def folder_problems(
    target: Path, sources: Iterable[Path], *, overwrite: bool, reluctance: Callable[[Path], str | None]
) -> Iterator[Problem]:
    """What keeps `target` from being written while `sources` are read.

    With `overwrite` a folder is replaced unless `reluctance` says why it should not be.
    """
    if not target.name or os.path.ismount(target):
        yield Problem(str(target), "is a mount point, which cannot be swapped", "name a folder inside it")
        return
    overlaps = [problem for folder in sources for problem in _overlap_problems(target, folder)]
    yield from overlaps
    if overlaps:
        return
    if target.exists() and not target.is_dir():
        yield Problem(str(target), "is a file", "name a folder")
    elif target.exists() and any(target.iterdir()):
        if not overwrite:
            yield Problem(str(target), "exists and is not empty", "choose another --out, or replace it: --overwrite")
        elif why := reluctance(target):
            yield Problem(str(target), f"{why}, so --overwrite leaves it alone", "choose another --out")
    parent = _nearest_folder(target)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        yield Problem(str(parent), "is not a folder one can write to", "choose another --out")


def _no_mere_checkpoint(folder: Path) -> str | None:
    """Why a folder is more or less than a model; nothing else is ever replaced by one."""
    if not (folder / CONFIG_NAME).exists() or not any(folder.glob("*.safetensors")):
        return "is not a checkpoint"
    others = [path.name for path in folder.iterdir() if path.is_dir() and path.name not in _MODEL_FOLDERS]
    return f"holds more than a checkpoint ({', '.join(sorted(others))})" if others else None


def _nearest_folder(target: Path) -> Path:
    """The folder that `target` will be made in, or the nearest one above it that exists."""
    return next((folder for folder in target.parents if folder.exists()), target)


def require_space(plan: MergePlan, target: Path, *, held_bytes: int = 0) -> None:
    """Raise NoSpaceError unless the disk has room for the output, of which an earlier run may hold some already."""
    free = files.free_bytes(target)
    needed = plan.output_bytes - held_bytes
    if needed > free:
        raise NoSpaceError(
            Problem(
                str(target),
                f"needs {needed / 1e9:,.2f} GB, the disk has {free / 1e9:,.2f} GB free",
                f"free {(needed - free) / 1e9:,.2f} GB, or choose --out on another disk",
            )
        )


def _overlap_problems(target: Path, folder: Path) -> Iterator[Problem]:
    """How a source and the places that a merge writes to get in each other's way, links and aliases seen through."""
    source = Path(os.path.realpath(folder))
    linked = [Path(os.path.realpath(entry)) for entry in folder.iterdir()]
    for workplace in (files.staging_folder(target), files.set_aside_folder(target)):
        if any(path.is_relative_to(workplace) for path in (source, *linked)):
            yield Problem(str(source), f"is where {target} would be made", "move this source, or choose another --out")
            return
    if target == source or (target.exists() and target.samefile(source)):
        yield Problem(str(target), "is one of the sources", "choose another --out")
    elif target.is_relative_to(source):
        yield Problem(str(target), f"is inside the source {source}", "choose an --out outside it")
    elif source.is_relative_to(target):
        yield Problem(str(target), f"holds the source {source}", "choose an --out beside it")
    elif any(path.is_relative_to(target) for path in linked):
        yield Problem(str(target), f"holds files that {source} links to", "choose another --out")
