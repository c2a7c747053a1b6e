"""The command line's entry point and the commands about merges. Heavy imports are made when a command runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slrmerge._version import __version__
from slrmerge.cli.evaluate import evaluate
from slrmerge.cli.group import Command, DefaultGroup
from slrmerge.cli.init import init
from slrmerge.cli.options import (
    FOLDER,
    all_of,
    branch_option,
    dry_run_option,
    folder_argument,
    grouped_option,
    json_option,
    options_from,
    out_option,
    private_option,
    quiet_option,
    recipe_argument,
    recipe_overrides,
    threads_option,
)
from slrmerge.cli.output import echo_text
from slrmerge.cli.push import push, push_folder
from slrmerge.cli.search import diff, search, select
from slrmerge.cli.shell import completion, environment, help_command
from slrmerge.errors import SlrmergeError
from slrmerge.merging.options import MergeOptions

if TYPE_CHECKING:
    from slrmerge.checkpoint.location import Repository
    from slrmerge.merging.executor import MergeResult
    from slrmerge.merging.hub_commit import PushResult
    from slrmerge.merging.plan.model import MergePlan

_EPILOG = """\b
Exit codes:
  0 success   1 a bug   2 usage   3 recipe   4 checkpoint
  5 recipe and checkpoints do not fit   6 output   7 disk space
  8 output in use   9 source changed   10 verification failed
  11 result does not fit the output dtype   12 unsupported model
  13 missing package   14 Hub   15 questions   16 model server
  17 Ray cluster   18 threads or memory   130 interrupted by Ctrl-C
  141 the reader of stdout has left
"""

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}

_merge_options = all_of(
    recipe_argument, out_option("the merged checkpoint"), recipe_overrides, options_from(MergeOptions)
)


@click.group(cls=DefaultGroup, epilog=_EPILOG, context_settings=_CONTEXT)
@click.version_option(__version__, "--version", "-V", prog_name="slrmerge")
def main() -> None:
    """Merge a pre-trained and a post-trained checkpoint, layer by layer, without loading either.

    \b
    slrmerge search recipe.yaml --out ./search     find the layers to restore
    slrmerge search/slr.yaml --out ./hybrid        merge by a recipe
    slrmerge verify ./hybrid                       verify every bit of the result
    slrmerge eval open-qa ...                      compare the answers of models
    slrmerge push ./hybrid me/hybrid               push to the Hub, as one commit
    """


@main.command(cls=Command)
@_merge_options
@click.argument("folder", type=FOLDER, required=False, metavar="[OUT]")
@dry_run_option
@grouped_option(
    "--push-to-hub",
    "repository",
    metavar="USER/REPO",
    group="Hub",
    help="Verify the merge and push it to this repository.",
)
@private_option
@branch_option
@json_option
@quiet_option
@click.pass_context
def merge(
    ctx: click.Context,
    /,
    recipe: Path,
    folder: Path | None,
    out: Path | None,
    *,
    max_shard_size: str | None,
    dtype: str | None,
    dry_run: bool,
    repository: str | None,
    private: bool,
    revision: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Merge two checkpoints by RECIPE into the folder OUT. The default command.

    RECIPE may be a mergekit config.

    Killed at any moment, OUT is absent or as it was; the same command then resumes.

    \b
    slrmerge recipe.yaml --out ./hybrid
    slrmerge recipe.yaml --out ./hybrid --dry-run
    """
    if repository is None and (private or revision):
        raise click.UsageError(f"{'--private' if private else '--revision'} requires --push-to-hub", ctx)
    if folder is not None and out is not None:
        raise click.UsageError(f"two output folders: {out} and {folder}", ctx)
    out = out or folder
    if out is None and not dry_run:
        raise click.MissingParameter(ctx=ctx, param_hint="'--out'", param_type="option")
    chosen = MergeOptions(**options)
    target = _target(repository, revision) if repository is not None else None
    planned = _plan(recipe, chosen, quiet=quiet or as_json, max_shard_size=max_shard_size, dtype=dtype)
    if out is None or dry_run:
        _print_plan(planned, out, chosen, as_json=as_json)
        return
    result, pushed = _merge(planned, out, chosen, target, private=private, quiet=quiet or as_json)
    if as_json or not quiet:
        from slrmerge.cli import show

        show.print_merged(planned, result, out, pushed=pushed, as_json=as_json)


@main.command(cls=Command)
@_merge_options
@json_option
def plan(
    recipe: Path, out: Path | None, *, max_shard_size: str | None, dtype: str | None, as_json: bool, **options: Any
) -> None:
    """Show what a merge by RECIPE would read and write.

    With --out, also checks that the output could be written there.

    \b
    slrmerge plan recipe.yaml
    slrmerge plan recipe.yaml --json | jq '.tensors["lm_head.weight"]'
    """
    chosen = MergeOptions(**options)
    planned = _plan(recipe, chosen, quiet=as_json, max_shard_size=max_shard_size, dtype=dtype)
    _print_plan(planned, out, chosen, as_json=as_json)


@main.command(cls=Command)
@folder_argument
@click.option("--pretrained", metavar="CHECKPOINT", help="Where the pre-trained side is now.")
@click.option("--posttrained", metavar="CHECKPOINT", help="Where the post-trained side is now.")
@click.option("--full", is_flag=True, help="Download sources from the Hub, and compare them with its digests too.")
@threads_option
@json_option
@quiet_option
def verify(folder: Path, *, as_json: bool, quiet: bool, **options: Any) -> None:
    """Verify that a merge in FOLDER is what slrmerge wrote.

    Checks every digest and, where the sources are available, every bit against them.

    \b
    slrmerge verify ./hybrid
    slrmerge verify ./hybrid --pretrained /models/llama-3.1-8b
    """
    from slrmerge.cli import show
    from slrmerge.cli.progress import TerminalProgress

    with TerminalProgress(quiet=quiet or as_json) as progress:
        progress.status("reading the manifest and the sources' headers")
        from slrmerge.merging.verify import verify as verify_folder

        result = verify_folder(folder, progress=progress, **options)
    if as_json or not quiet:
        show.print_verified(result, as_json=as_json)


@main.command(cls=Command)
@click.argument("checkpoint")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@json_option
def inspect(checkpoint: str, *, tensors: bool, as_json: bool) -> None:
    """Show the layers, shapes, dtypes and sizes of CHECKPOINT. Reads headers only.

    \b
    slrmerge inspect ./llama-3.1-8b
    slrmerge inspect org/llama-3.1-8b@main --tensors
    """
    from slrmerge.cli.progress import TerminalProgress

    with TerminalProgress(quiet=as_json) as progress:
        progress.status("reading headers")
        from slrmerge.checkpoint.opening import open_checkpoint
        from slrmerge.cli import show

        opened = open_checkpoint(checkpoint)
    show.print_checkpoint(opened, tensors=tensors, as_json=as_json)


@main.command(cls=Command)
@recipe_argument
def export(recipe: Path) -> None:
    """Print the mergekit config that merges as RECIPE does.

    \b
    slrmerge export recipe.yaml > mergekit_config.yml
    """
    from slrmerge.merging.export import export_mergekit

    echo_text(export_mergekit(_plan(recipe, MergeOptions(), quiet=False)))


@main.command(cls=Command)
def schema() -> None:
    """Print the JSON Schema of recipes, for editors.

    \b
    slrmerge schema > recipe.schema.json
    """
    from importlib.resources import files

    echo_text(files("slrmerge.recipe").joinpath("recipe.schema.json").read_text("utf-8"))


for _command in (completion, diff, environment, evaluate, help_command, init, push, search, select):
    main.add_command(_command)


def _plan(recipe: Path, options: MergeOptions, *, quiet: bool, **overrides: str | None) -> "MergePlan":
    """The plan for a recipe file with the command line's overrides."""
    from slrmerge.cli.progress import TerminalProgress

    with TerminalProgress(quiet=quiet) as progress:
        progress.status("reading headers")
        from slrmerge.merging.plan.planner import plan as plan_recipe
        from slrmerge.recipe.load import load_recipe

        loaded = load_recipe(recipe, **overrides)
        return plan_recipe(loaded, allow_code=options.allow_code, output=options.output)


def _target(repository: str, revision: str | None) -> "Repository":
    from slrmerge.merging.push import parse_target

    return parse_target(repository, revision)


def _merge(
    planned: "MergePlan", out: Path, options: MergeOptions, target: "Repository | None", *, private: bool, quiet: bool
) -> "tuple[MergeResult, PushResult | None]":
    """Merge into `out`, and push that to `target`, if any; access to it is checked before the merge."""
    from slrmerge.cli.progress import TerminalProgress
    from slrmerge.merging.executor import execute

    if target:
        from slrmerge.merging.push import require_access

        require_access(target)
    with TerminalProgress(quiet=quiet) as progress:
        result = execute(planned, out, options=options, name=target.name if target else None, progress=progress)
    if not target:
        return result, None
    try:
        return result, push_folder(out, target, private=private, threads=options.threads, quiet=quiet)
    except SlrmergeError as error:
        error.add_note(f"the merge is complete in {out}; `slrmerge push` pushes it without merging again")
        raise


def _print_plan(planned: "MergePlan", out: Path | None, options: MergeOptions, *, as_json: bool) -> None:
    from slrmerge.cli import show

    show.print_plan(planned, out, _free_bytes(planned, out, options), as_json=as_json)


def _free_bytes(planned: "MergePlan", out: Path | None, options: MergeOptions) -> int:
    """Check that `out` could be written; the free bytes there, or in the current folder without `out`."""
    from slrmerge.io.files import free_bytes
    from slrmerge.io.pieces import translate_os_errors
    from slrmerge.merging.executor import output_folder, require_space

    if out is None:
        with translate_os_errors(Path()):
            return free_bytes(Path.cwd())
    output = output_folder(planned, out, options)
    output.check()
    require_space(planned, output)
    return free_bytes(output.path)
