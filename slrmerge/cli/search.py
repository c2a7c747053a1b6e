"""The commands that look before a merge: search, select, diff."""

from pathlib import Path

import click

from slrmerge.cli.options import (
    PathArgument,
    SourceArgument,
    a_number,
    bytes_of,
    json_option,
    quiet_option,
    threads_option,
)
from slrmerge.repository import Source

_SPACES = ("intervals", "soups", "attention", "mlp")


_min_quality = click.option(
    "--min-quality",
    type=click.FloatRange(0, 1),
    callback=a_number,
    default=0.9,
    show_default=True,
    help="The share of the post-trained model's quality to keep.",
)


@click.command()
@click.argument("recipe", type=PathArgument())
@click.option("--out", type=PathArgument(), help="The folder for the results; it appears complete or not at all.")
@click.option("--overwrite", is_flag=True, help="Replace the results of an older search at --out.")
@_min_quality
@click.option(
    "--space",
    "spaces",
    type=click.Choice(_SPACES),
    multiple=True,
    default=("intervals", "soups"),
    show_default=True,
    help="What to try, in place of the default; may be given several times.",
)
@click.option("--also", type=PathArgument(), multiple=True, metavar="RECIPE", help="Another recipe to try.")
@click.option("--task", type=click.Choice(["crc"]), default="crc", show_default=True, help="The proxy task.")
@click.option("--quick", is_flag=True, help="Ask 8 prompts of everything, then all prompts of the leaders.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="To compute the first pass in; leaders are then asked in float32.  [default: bfloat16 from 1e9 parameters]",
)
@click.option("--device", default="cpu", show_default=True, help="Where to compute; cuda has not been tried yet.")
@click.option(
    "--max-memory",
    metavar="SIZE",
    callback=bytes_of,
    help="For states; more go to a file.  [default: half of the memory]",
)
@click.option("--resume/--no-resume", default=True, show_default=True, help="Keep states so that a killed run goes on.")
@click.option("--dry-run", is_flag=True, help="Say what it would take on this machine, search nothing.")
@threads_option
@json_option
@quiet_option
@click.pass_context
def search(
    ctx: click.Context,
    recipe: Path,
    out: Path | None,
    *,
    overwrite: bool,
    min_quality: float,
    spaces: tuple[str, ...],
    also: tuple[Path, ...],
    task: str,
    quick: bool,
    dtype: str | None,
    device: str,
    max_memory: int | None,
    resume: bool,
    dry_run: bool,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Find the layers to restore: score every interval and soup of RECIPE's two checkpoints in one pass.

    The recipe may name only the two checkpoints. The results hold recipes that are ready for a merge.

    \b
    slrmerge search recipe.yaml --out ./search
    slrmerge search recipe.yaml --dry-run
    """
    ctx.obj["as_json"] = as_json
    if out is None and not dry_run:
        raise click.UsageError("missing option '--out'", ctx)
    from slrmerge.cli import show_search
    from slrmerge.cli.progress import TerminalProgress
    from slrmerge.devices import device_problem
    from slrmerge.recipe import load_recipe
    from slrmerge.search.options import SearchOptions
    from slrmerge.search.run import Search

    if problem := device_problem(device):
        raise click.UsageError(f"--device {device} cannot be used: {problem}", ctx)
    chosen = SearchOptions(
        task=task,
        spaces=tuple(dict.fromkeys(spaces)),
        also=tuple((path.name, load_recipe(path)) for path in also),
        min_quality=min_quality,
        dtype=dtype,
        device=device,
        max_memory_bytes=max_memory,
        quick=quick,
        resumable=resume,
        threads=threads,
    )
    with Search(load_recipe(recipe, pair_only=True), chosen) as ready:
        if out is None or dry_run:
            if out is not None:
                ready.require_target(out, overwrite=overwrite)
            show_search.print_estimate(ready.estimate(), as_json=as_json)
            return
        with TerminalProgress(quiet=quiet or as_json) as progress:
            report = ready.run(out, overwrite=overwrite, progress=progress)
    if as_json or not quiet:
        show_search.print_report(report, out, as_json=as_json)


@click.command()
@click.argument("folder", type=PathArgument())
@_min_quality
@json_option
@click.pass_context
def select(ctx: click.Context, folder: Path, *, min_quality: float, as_json: bool) -> None:
    """Choose again from the results in FOLDER, by another share of quality, without searching again.

    \b
    slrmerge select ./search --min-quality 0.95
    """
    ctx.obj["as_json"] = as_json
    from slrmerge.cli import show_search
    from slrmerge.search.select import select as choose_again

    show_search.print_report(choose_again(folder, min_quality=min_quality), folder, as_json=as_json)


@click.command()
@click.argument("sources", nargs=-1, required=True, type=SourceArgument(), metavar="RECIPE | PRETRAINED POSTTRAINED")
@click.option("--out", type=PathArgument(), help="A folder for diff.csv and the heat map, as PNG and SVG.")
@threads_option
@json_option
@quiet_option
@click.pass_context
def diff(
    ctx: click.Context,
    sources: tuple[Source, ...],
    out: Path | None,
    *,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show how far post-training moved the weights, layer by layer: of RECIPE's two checkpoints, or of two.

    \b
    slrmerge diff recipe.yaml
    slrmerge diff ./llama-3.1-8b ./llama-3.1-8b-instruct --out ./moved
    """
    ctx.obj["as_json"] = as_json
    if len(sources) > 2:
        raise click.UsageError("give one recipe, or the pre-trained and the post-trained checkpoint", ctx)
    from slrmerge.cli import show_diff
    from slrmerge.cli.progress import TerminalProgress
    from slrmerge.diff import compare_checkpoints, save_differences
    from slrmerge.errors import require_extra
    from slrmerge.hub import open_pair
    from slrmerge.recipe import load_recipe

    if out is not None:
        require_extra("search", "matplotlib")
    sides = sources if len(sources) == 2 else load_recipe(Path(str(sources[0])), pair_only=True).sources()
    with TerminalProgress(quiet=quiet or as_json) as progress:
        differences = compare_checkpoints(*open_pair(*sides), threads=threads, progress=progress)
    if out is not None:
        save_differences(differences, out)
    if as_json or not quiet:
        show_diff.print_differences(differences, as_json=as_json)
