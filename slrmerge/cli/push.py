"""The command that publishes: push."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slrmerge.cli.group import Command
from slrmerge.cli.options import (
    branch_option,
    folder_argument,
    json_option,
    private_option,
    quiet_option,
    threads_option,
)

if TYPE_CHECKING:
    from slrmerge.checkpoint.location import Repository
    from slrmerge.merging.hub_commit import PushResult


@click.command(cls=Command)
@folder_argument
@click.argument("repository", metavar="USER/REPO")
@private_option
@branch_option
@threads_option
@json_option
@quiet_option
def push(
    folder: Path,
    repository: str,
    *,
    private: bool,
    revision: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Verify the merge in FOLDER and push it to the Hub, as one commit.

    USER/REPO is created where it does not exist. The commit also removes the shards of an older merge. Killed before
    the commit, the branch has not moved.

    \b
    slrmerge push ./hybrid me/llama-3.1-8b-slr --private
    """
    from slrmerge.cli import show
    from slrmerge.merging.push import parse_target

    target = parse_target(repository, revision)
    pushed = push_folder(folder, target, private=private, threads=threads, quiet=quiet or as_json)
    if as_json or not quiet:
        show.print_pushed(pushed, as_json=as_json)


def push_folder(folder: Path, target: "Repository", *, private: bool, threads: int | None, quiet: bool) -> "PushResult":
    """Push with progress on a terminal: ours while verifying, the Hub client's while uploading."""
    from huggingface_hub.utils import disable_progress_bars

    from slrmerge.cli.progress import TerminalProgress
    from slrmerge.merging.push import push as push_to_hub

    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    with TerminalProgress(quiet=quiet) as progress:
        progress.status("contacting the Hub")
        return push_to_hub(folder, target, private=private, threads=threads, progress=progress)
