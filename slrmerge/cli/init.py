"""The command that writes a first recipe: init."""

import shlex
from pathlib import Path

import click

from slrmerge.cli.group import Command
from slrmerge.cli.options import PATH
from slrmerge.cli.output import echo


@click.command(cls=Command)
@click.argument("pretrained")
@click.argument("posttrained")
@click.option(
    "--out", "-o", type=PATH, default=Path("recipe.yaml"), show_default=True, metavar="FILE", help="File to write."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
def init(pretrained: str, posttrained: str, *, out: Path, overwrite: bool) -> None:
    """Write a commented recipe for two checkpoints.

    Checks that they are a pair; reads headers only.

    \b
    slrmerge init ./llama-3.1-8b ./llama-3.1-8b-instruct
    slrmerge init org/model org/model-instruct --out slr.yaml
    """
    from slrmerge.cli.progress import TerminalProgress

    with TerminalProgress(quiet=False) as progress:
        progress.status("reading headers")
        from slrmerge.checkpoint.pair import require_layers, require_same_depth
        from slrmerge.errors import OutputError, PlanError, Problem, raise_all
        from slrmerge.io.files import write_text
        from slrmerge.io.pieces import translate_os_errors
        from slrmerge.recipe.model import Recipe
        from slrmerge.recipe.starter import starter_recipe

        recipe = Recipe(pretrained=pretrained, posttrained=posttrained)
        pair = recipe.open_pair()
    raise_all(require_same_depth(pair), PlanError)
    text = starter_recipe(recipe, out.parent, layers=require_layers(pair).count)
    if out.exists() and not overwrite:
        raise OutputError(Problem("output-exists", str(out), "already exists", "pass overwrite=True to replace it"))
    with translate_os_errors(out):
        write_text(out, text)
    echo(f"{out}: a recipe for {pair.pretrained} and {pair.posttrained}")
    echo(f"find the layers to restore: slrmerge search {shlex.quote(str(out))} --out ./search")
