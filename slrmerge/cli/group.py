"""A click group with a default command and one boundary where errors become messages and exit codes."""

import json
import os
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from slrmerge.errors import SlrmergeError

INTERRUPTED = 130  # what shells report for Ctrl-C


class DefaultGroup(click.Group):
    """`slrmerge RECIPE …` runs `slrmerge merge RECIPE …`, unless the first word looks like a mistyped command."""

    default = "merge"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            self._refuse_typo(ctx, args[0])
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def _refuse_typo(self, ctx: click.Context, word: str) -> None:
        looks_like_a_file = not word or word.startswith("-") or Path(word).suffix or "/" in word or os.path.exists(word)  # noqa: PTH110
        if looks_like_a_file:
            return
        near = get_close_matches(word, self.commands, n=1)
        hint = f"did you mean {near[0]}?" if near else "a recipe is a .yaml file; see slrmerge --help"
        raise click.UsageError(f"no command or recipe {word!r}; {hint}", ctx)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SlrmergeError as error:
            fail(error, as_json=bool(_option(ctx, "as_json")))
        except KeyboardInterrupt as error:
            click.echo("\nstopped: " + "; ".join(getattr(error, "__notes__", ["nothing was written"])), err=True)
            ctx.exit(INTERRUPTED)


def fail(error: SlrmergeError, *, as_json: bool) -> None:
    """Say what went wrong, on stderr in words and with --json on stdout as a value, and leave with its exit code."""
    notes = getattr(error, "__notes__", [])
    if as_json:
        problems = [{"where": p.where, "what": p.what, "remedy": p.remedy} for p in error.problems]
        value = {"error": type(error).__name__, "summary": error.summary, "problems": problems, "notes": notes}
        click.echo(json.dumps(value, ensure_ascii=False, indent=2))
    click.echo(f"error: {error.summary}", err=True)
    for line in (*error.problems, *notes):
        click.echo(f"  {line}", err=True)
    sys.exit(error.exit_code)


def _option(ctx: click.Context, name: str) -> object:
    """An option of the subcommand that was running."""
    return ctx.obj.get(name) if isinstance(ctx.obj, dict) else None
