"""The commands that look at a pair before a merge: search, select, diff."""

import os
from pathlib import Path
from typing import Any

import click

from slrmerge.cli.group import Command
from slrmerge.cli.options import (
    FOLDER,
    folder_argument,
    json_option,
    options_from,
    out_option,
    overwrite_option,
    quiet_option,
)
from slrmerge.merging.options import MergeOptions
from slrmerge.searching.options import SearchOptions

_sources_argument = click.argument("sources", nargs=-1, required=True, metavar="RECIPE | PRETRAINED POSTTRAINED")


@click.command(cls=Command)
@_sources_argument
@out_option("the results")
@overwrite_option
@options_from(SearchOptions)
@click.option("--dry-run", is_flag=True, help="Estimate time and memory on this machine, search nothing.")
@json_option
@quiet_option
@click.pass_context
def search(
    ctx: click.Context,
    /,
    sources: tuple[str, ...],
    out: Path | None,
    *,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Find the layers to restore.

    Scores every interval and soup of RECIPE's two checkpoints, or of PRETRAINED and POSTTRAINED, in one pass. RECIPE
    may name only the two checkpoints; rules that it has are scored too. The results contain recipes that are ready to
    merge.

    \b
    slrmerge search recipe.yaml --out ./search
    slrmerge search ./llama-3.1-8b ./llama-3.1-8b-instruct --out ./search
    slrmerge search recipe.yaml --task my-task.yaml --dry-run
    """
    if out is None and not dry_run:
        raise click.MissingParameter(ctx=ctx, param_hint="'--out'", param_type="option")
    _require_one_or_two(ctx, sources)
    chosen = SearchOptions(**options)
    from slrmerge.cli.progress import TerminalProgress
    from slrmerge.io.threads import require_thread

    require_thread()
    with TerminalProgress(quiet=quiet or as_json) as progress:
        progress.status("loading torch")
        from slrmerge.cli import show_search
        from slrmerge.recipe.load import load_recipe
        from slrmerge.recipe.model import Recipe
        from slrmerge.searching.run import PREPARING, Search

        is_pair = len(sources) == 2
        recipe = Recipe(pretrained=sources[0], posttrained=sources[1]) if is_pair else load_recipe(sources[0])
        prepared = Search(recipe, chosen)
        if out is not None and not dry_run:
            result = prepared.run(out, overwrite=overwrite, progress=progress)
        else:
            progress.status(PREPARING)
            if out is not None:
                prepared.output_folder(out, overwrite=overwrite)
            _ = prepared.prepared
            progress.status("measuring the speed of this machine")
            estimate = prepared.estimate()
    if out is None or dry_run:
        show_search.print_estimate(prepared.prepared, estimate, as_json=as_json)
        return
    if as_json or not quiet:
        show_search.print_result(result, out, as_json=as_json)


@click.command(cls=Command)
@folder_argument
@options_from(SearchOptions, "min_quality")
@json_option
def select(folder: Path, *, min_quality: float, as_json: bool) -> None:
    """Select again from the results of a search in FOLDER.

    Applies another minimum quality to the scores that are there, and renews recipes, summary, figures and report.

    \b
    slrmerge select ./search --min-quality 0.95
    """
    from slrmerge.cli.progress import TerminalProgress
    from slrmerge.io.threads import require_thread

    require_thread()
    with TerminalProgress(quiet=as_json) as progress:
        progress.status("selecting, and drawing the figures")
        from slrmerge.cli import show_search
        from slrmerge.searching.select import select as select_again

        result = select_again(folder, min_quality=min_quality)
    show_search.print_result(result, folder, as_json=as_json)


@click.command(cls=Command)
@_sources_argument
@click.option("--out", "-o", type=FOLDER, help="Folder for report.html, diff.csv, and the heat map as PNG and SVG.")
@options_from(MergeOptions, "threads")
@json_option
@quiet_option
@click.pass_context
def diff(
    ctx: click.Context, sources: tuple[str, ...], out: Path | None, *, threads: int | None, as_json: bool, quiet: bool
) -> None:
    """Show how far post-training moved the weights, layer by layer.

    Compares the two checkpoints of RECIPE, or PRETRAINED and POSTTRAINED.

    \b
    slrmerge diff recipe.yaml
    slrmerge diff ./llama-3.1-8b ./llama-3.1-8b-instruct --out ./moved
    """
    _require_one_or_two(ctx, sources)
    from slrmerge.cli.progress import TerminalProgress
    from slrmerge.errors import require_extra

    if out is not None:
        require_extra("search", "matplotlib", "jinja2", "plotly")
    with TerminalProgress(quiet=quiet or as_json) as progress:
        progress.status("reading headers")
        from slrmerge.checkpoint.opening import open_pair
        from slrmerge.cli import show_diff
        from slrmerge.merging.diff import diff as diff_pair
        from slrmerge.recipe.load import load_recipe

        pair = open_pair(*sources) if len(sources) == 2 else load_recipe(sources[0])
        result = diff_pair(pair, threads=threads, progress=progress)
    if out is not None:
        result.save(out)
    if as_json or not quiet:
        show_diff.print_result(result, as_json=as_json)


def _require_one_or_two(ctx: click.Context, sources: tuple[str, ...]) -> None:
    if len(sources) > 2:
        raise click.UsageError("give one recipe, or the pre-trained and the post-trained checkpoint", ctx)
    if len(sources) == 1 and os.path.isdir(sources[0]):  # noqa: PTH112 (False for a name that is too long)
        raise click.UsageError(f"{sources[0]} is a folder; name the post-trained checkpoint after it", ctx)
