"""The commands that publish."""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slrmerge.cli.options import (
    PathArgument,
    RepositoryArgument,
    branch_option,
    json_option,
    private_option,
    quiet_option,
    threads_option,
)
from slrmerge.repository import Repository

if TYPE_CHECKING:
    from slrmerge.push import PushResult


@click.command()
@click.argument("folder", type=PathArgument())
@click.argument("repository", type=RepositoryArgument(), metavar="USER/REPO")
@private_option
@branch_option
@threads_option
@json_option
@quiet_option
@click.pass_context
def push(
    ctx: click.Context,
    folder: Path,
    repository: Repository,
    *,
    private: bool,
    revision: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Verify the merge in FOLDER and push it to USER/REPO on the Hub, as one commit.

    The same commit removes the shards of an older merge. Killed before it, the branch has not moved.

    \b
    slrmerge push ./hybrid me/llama-3.1-8b-slr --private
    """
    ctx.obj["as_json"] = as_json
    from slrmerge.cli import show

    target = replace(repository, revision=revision)
    pushed = push_folder(folder, target, private=private, threads=threads, quiet=quiet or as_json)
    if as_json or not quiet:
        show.print_pushed(pushed, as_json=as_json)


def push_folder(folder: Path, target: Repository, *, private: bool, threads: int | None, quiet: bool) -> "PushResult":
    """Push, with progress on a terminal: ours while verifying, the Hub's client's while uploading."""
    from huggingface_hub.utils import disable_progress_bars

    from slrmerge.cli.progress import TerminalProgress
    from slrmerge.push import push_to_hub

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what it warns of is said by us
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    with TerminalProgress(quiet=quiet) as progress:
        return push_to_hub(folder, target, private=private, threads=threads, progress=progress)
