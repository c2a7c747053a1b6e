"""Checkpoints wherever they are: in a folder, or in a repository on the Hub, pinned to one commit.

Opening one on the Hub fetches config, index and headers only. This room and `push` alone know the Hub's client.
"""

from functools import partial
from pathlib import Path

from slrmerge.checkpoint import Checkpoint, open_folder
from slrmerge.errors import CheckpointError, HubError, Problem, open_all
from slrmerge.repository import Source, parse_source


def open_checkpoint(source: Source | str, *, here_only: bool = False) -> Checkpoint:
    """Read the config, the index and every header of a checkpoint: a folder, or a repository as `org/name@revision`.

    Weights stay where they are until they are read. With `here_only`, or where HF_HUB_OFFLINE is set, a repository is
    what the Hub's cache holds of it. Raises CheckpointError for what is not a sound checkpoint, HubError for what the
    Hub does not give.
    """
    if isinstance(source, str):
        source = parse_source(source)
    if isinstance(source, Path):
        return open_folder(source)
    from slrmerge.hub.snapshots import open_cached, open_repository

    return open_cached(source) if here_only else open_repository(source)


def open_pair(pretrained: Source, posttrained: Source, *, here_only: bool = False) -> tuple[Checkpoint, Checkpoint]:
    """Open both sides; raises CheckpointError or HubError with the problems of both."""
    opened = open_all(
        partial(open_checkpoint, here_only=here_only), (pretrained, posttrained), CheckpointError, HubError
    )
    first, second = (checkpoint.snapshot for checkpoint in opened)
    if first and second and first.commit == second.commit:
        remedy = "name the commit, or the repository, that the other was trained from"
        raise CheckpointError(Problem(str(second.repository), f"is the same commit as {first.repository}", remedy))
    return opened[0], opened[1]
