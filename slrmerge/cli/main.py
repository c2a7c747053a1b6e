"""The commands. Everything heavy is imported when a command runs, so that `--help` answers at once."""

import gc
import json
import sys
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

import click

import slrmerge
from slrmerge.cli.evaluate import evaluate
from slrmerge.cli.group import DefaultGroup
from slrmerge.cli.options import (
    PathArgument,
    RepositoryArgument,
    SourceArgument,
    branch_option,
    download_option,
    json_option,
    planning_options,
    private_option,
    quiet_option,
    threads_option,
)
from slrmerge.cli.push import push, push_folder
from slrmerge.cli.search import diff, search, select
from slrmerge.errors import SlrmergeError
from slrmerge.repository import Repository, Source

if TYPE_CHECKING:
    from slrmerge.merge import Download

_EPILOG = """\b
Exit codes:
  0 done   1 a bug   2 usage   3 recipe   4 checkpoint   5 recipe and checkpoints do not fit
  6 output   7 disk space   8 target in use   9 source changed   10 verification failed
  11 result does not fit the output dtype   12 this model cannot be used here   13 a package is missing
  14 the Hub   15 the questions of an evaluation   16 a model server   130 stopped by Ctrl-C
"""


@click.group(cls=DefaultGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(slrmerge.__version__, prog_name="slrmerge")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Merge a pre-trained and a post-trained checkpoint, layer by layer, without loading either.

    \b
    slrmerge search recipe.yaml --out ./search     find the layers to restore
    slrmerge search/slr.yaml --out ./hybrid        merge by a recipe
    slrmerge verify ./hybrid                       prove what was written
    slrmerge eval open-qa ...                      does it say more, and still say it right?
    slrmerge push ./hybrid me/hybrid               put it on the Hub, in one commit
    """
    ctx.obj = {}
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal without – and × gets ? instead
            stream.reconfigure(errors="replace")


@main.command()
@planning_options
@download_option
@threads_option
@click.option("--fsync/--no-fsync", default=True, show_default=True, help="Wait until the disk has everything.")
@click.option("--dry-run", is_flag=True, help="Check and plan everything, write nothing.")
@click.option("--push-to-hub", type=RepositoryArgument(), metavar="USER/REPO", help="Then verify it and push it there.")
@private_option
@branch_option
@json_option
@quiet_option
@click.pass_context
def merge(
    ctx: click.Context,
    recipe: Path,
    out: Path | None,
    *,
    overwrite: bool,
    max_shard_size: str | None,
    dtype: str | None,
    allow_code: bool,
    download: "Download",
    threads: int | None,
    fsync: bool,
    dry_run: bool,
    push_to_hub: Repository | None,
    private: bool,
    revision: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Merge two checkpoints by RECIPE into the folder --out. The default command.

    Killed at any moment, --out is absent or as it was; the same command then resumes.

    \b
    slrmerge recipe.yaml --out ./hybrid
    slrmerge recipe.yaml --out ./hybrid --dry-run
    """
    ctx.obj["as_json"] = as_json
    if push_to_hub is None and (private or revision):
        raise click.UsageError(f"{'--private' if private else '--revision'} goes with --push-to-hub", ctx)
    plan = _plan(recipe, max_shard_size=max_shard_size, dtype=dtype, allow_code=allow_code)
    from slrmerge.cli import show

    if dry_run:
        _require_target(plan, out, overwrite=overwrite)
        show.print_plan(plan, out, as_json=as_json)
        return
    if out is None:
        raise click.UsageError("missing option '--out'", ctx)
    from slrmerge.cli.progress import TerminalProgress
    from slrmerge.merge import execute

    target = push_to_hub and replace(push_to_hub, revision=revision)
    if target:
        from slrmerge.push import require_access

        require_access(target)
    with TerminalProgress(quiet=quiet or as_json) as progress:
        result = execute(
            plan,
            out,
            overwrite=overwrite,
            download=download,
            threads=threads,
            fsync=fsync,
            name=target.name if target else None,
            progress=progress,
        )
    pushed = None
    if target:
        try:
            pushed = push_folder(out, target, private=private, threads=threads, quiet=quiet or as_json)
        except SlrmergeError as error:
            error.add_note(f"the merge is complete in {out}; `slrmerge push` pushes it without merging again")
            raise
    if as_json or not quiet:
        show.print_merged(plan, result, out, pushed=pushed, as_json=as_json)


@main.command()
@planning_options
@json_option
@click.pass_context
def plan(
    ctx: click.Context,
    recipe: Path,
    out: Path | None,
    *,
    overwrite: bool,
    max_shard_size: str | None,
    dtype: str | None,
    allow_code: bool,
    as_json: bool,
) -> None:
    """Show what a merge by RECIPE would read and write; with --out, whether it could.

    \b
    slrmerge plan recipe.yaml
    slrmerge plan recipe.yaml --json | jq '.tensors["lm_head.weight"]'
    """
    ctx.obj["as_json"] = as_json
    made = _plan(recipe, max_shard_size=max_shard_size, dtype=dtype, allow_code=allow_code)
    from slrmerge.cli import show

    _require_target(made, out, overwrite=overwrite)
    show.print_plan(made, out, as_json=as_json)


@main.command()
@click.argument("folder", type=PathArgument())
@click.option("--pretrained", type=SourceArgument(), help="Where the pre-trained side is now.")
@click.option("--posttrained", type=SourceArgument(), help="Where the post-trained side is now.")
@click.option("--full", is_flag=True, help="Fetch sources that are on the Hub, and check them by its own digests too.")
@threads_option
@json_option
@quiet_option
@click.pass_context
def verify(
    ctx: click.Context,
    folder: Path,
    *,
    pretrained: Source | None,
    posttrained: Source | None,
    full: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Prove that FOLDER is what slrmerge wrote: every digest, and every bit against the sources where they are at hand.

    \b
    slrmerge verify ./hybrid
    slrmerge verify ./hybrid --pretrained /models/llama-3.1-8b
    """
    ctx.obj["as_json"] = as_json
    from slrmerge.cli import show
    from slrmerge.cli.progress import TerminalProgress
    from slrmerge.verify import verify_checkpoint

    with TerminalProgress(quiet=quiet or as_json) as progress:
        report = verify_checkpoint(
            folder, pretrained=pretrained, posttrained=posttrained, full=full, threads=threads, progress=progress
        )
    if as_json or not quiet:
        show.print_verified(report, as_json=as_json)


@main.command()
@click.argument("checkpoint", type=SourceArgument())
@click.option("--tensors", is_flag=True, help="List every tensor.")
@json_option
@click.pass_context
def inspect(ctx: click.Context, checkpoint: Source, *, tensors: bool, as_json: bool) -> None:
    """Show what CHECKPOINT holds: layers, shapes, dtypes, sizes. Reads headers only.

    \b
    slrmerge inspect ./llama-3.1-8b
    slrmerge inspect org/llama-3.1-8b@main --tensors
    """
    ctx.obj["as_json"] = as_json
    from slrmerge.cli import show
    from slrmerge.hub import open_checkpoint

    show.print_checkpoint(open_checkpoint(checkpoint), tensors=tensors, as_json=as_json)


@main.command()
@click.argument("recipe", type=PathArgument())
def export(recipe: Path) -> None:
    """Print the mergekit config that merges as RECIPE does.

    \b
    slrmerge export recipe.yaml > mergekit_config.yml
    """
    from slrmerge.plan.export import mergekit_config

    plan = _plan(recipe, max_shard_size=None, dtype=None, allow_code=False)
    click.echo(mergekit_config(plan), nl=False)


@main.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors.

    \b
    slrmerge schema > recipe.schema.json
    """
    from slrmerge.recipe import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


main.add_command(diff)
main.add_command(evaluate)
main.add_command(push)
main.add_command(search)
main.add_command(select)


def _plan(recipe: Path, *, max_shard_size: str | None, dtype: str | None, allow_code: bool) -> "slrmerge.MergePlan":
    """The plan for a recipe file with the command line's overrides."""
    gc.disable()  # tens of thousands of small values and no cycle among them: collecting is a third of planning
    try:
        from slrmerge.hub import open_pair
        from slrmerge.plan import plan_merge
        from slrmerge.recipe import load_recipe

        loaded = load_recipe(recipe, max_shard_size=max_shard_size, dtype=dtype)
        return plan_merge(loaded, open_pair(*loaded.sources()), allow_code=allow_code)
    finally:
        gc.freeze()
        gc.enable()


def _require_target(plan: "slrmerge.MergePlan", out: Path | None, *, overwrite: bool) -> None:
    """Hold a plan that will not be carried out now against its target, where one is given."""
    from slrmerge.errors import OutputError, raise_all
    from slrmerge.merge import require_space, resolve_target, target_problems

    if out is not None:
        target = resolve_target(out)
        raise_all(target_problems(plan, target, overwrite=overwrite), OutputError)
        require_space(plan, target)
