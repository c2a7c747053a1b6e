"""Options that several commands share."""

from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import click

from slrmerge.repository import Repository, Source, parse_source


class PathArgument(click.Path):
    """A path argument; whether it exists is said by whoever opens it, in its own words."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)


class SourceArgument(click.ParamType[Source]):
    """A checkpoint: a folder, or a repository on the Hub as organisation/name@revision."""

    name = "source"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Source:  # noqa: ARG002 (click's)
        return parse_source(value) if isinstance(value, str) else value


class RepositoryArgument(click.ParamType[Repository]):
    """A repository on the Hub, organisation/name; the branch has an option of its own."""

    name = "repository"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Repository:
        found = value if isinstance(value, Repository) else Repository.parse(value)
        if found is None or found.revision:
            self.fail(f"{value!r} is not organisation/name", param, ctx)
        return found


def bytes_of(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """An option's callback: 8GB or 500MiB as a number of bytes."""
    if value is None:
        return None
    from slrmerge.recipe import parse_bytes
    from slrmerge.structure import Fault

    try:
        return parse_bytes(value)
    except Fault as fault:
        raise click.BadParameter(str(fault), ctx, parameter) from None


def a_number(ctx: click.Context, parameter: click.Parameter, value: float) -> float:
    """An option's callback: neither nan, which is in every range, nor without end."""
    if not isfinite(value):
        raise click.BadParameter(f"{value} is not a number", ctx, parameter)
    return value


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, in the order given."""

    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
quiet_option = click.option("--quiet", is_flag=True, help="No progress and no summary, only errors.")
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="[default: as many as cores; 8 from the Hub]"
)
download_option = click.option(
    "--download",
    type=click.Choice(["ranges", "full"]),
    default="ranges",
    show_default=True,
    help="Of repositories on the Hub: stream the ranges needed, or fetch their files into the Hub's cache.",
)
private_option = click.option("--private", is_flag=True, help="If the repository has to be made: for its owner only.")
branch_option = click.option("--revision", metavar="BRANCH", help="The branch to push to, made if need be.")
planning_options = options(
    click.argument("recipe", type=PathArgument()),
    click.option("--out", type=PathArgument(), help="The folder to write; it appears complete or not at all."),
    click.option("--overwrite", is_flag=True, help="Replace an older checkpoint at --out, in one step."),
    click.option("--max-shard-size", metavar="SIZE", help="The most bytes in one file, such as 5GB."),
    click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16", "float64"]), help="Output dtype."),
    click.option("--allow-code", is_flag=True, help="Copy the post-trained side's Python files too."),
)
