"""The click group: a default command, and the one place where errors become messages and exit codes."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from slrmerge.cli.output import echo, open_streams, print_json, quieten_hub_client
from slrmerge.errors import (
    LimitError,
    MissingExtraError,
    OptionError,
    OutputError,
    Problem,
    SlrmergeError,
    first_line,
    without_credentials,
)

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_AS_JSON = "slrmerge.as_json"

INTERRUPTED = 130
"""The exit code that shells report for Ctrl-C."""


class TextType(click.types.StringParamType):
    """Text, for which a shell offers `choices`, or files: most of what a command takes may name one."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list["CompletionItem"]:  # noqa: ARG002
        from click.shell_completion import CompletionItem

        choices = [CompletionItem(each) for each in self.choices if each.startswith(incomplete)]
        return choices or [CompletionItem(incomplete, type="file")]


class DefaultGroup(click.Group):
    """`slrmerge RECIPE …` runs `slrmerge merge RECIPE …`, unless the first word looks like a mistyped command."""

    default = "merge"

    def main(self, *args: Any, **extra: Any) -> Any:
        open_streams()
        quieten_hub_client()
        try:
            return super().main(*args, **extra)
        except OutputError as error:  # the help could not be printed
            fail(error, as_json=False)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _clean_exit():
            return super().make_context(*args, **extra)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_AS_JSON] = "--json" in args
        own = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            self._refuse_typo(ctx, args[0])
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list["CompletionItem"]:
        from click.shell_completion import CompletionItem

        return super().shell_complete(ctx, incomplete) or [CompletionItem(incomplete, type="file")]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands, each with the whole first sentence of its help."""
        rows = [(name, self.commands[name].get_short_help_str(limit=200)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _clean_exit():
                return super().invoke(ctx)
        except SlrmergeError as error:
            fail(error, as_json=ctx.meta[_AS_JSON])
        except (MemoryError, ImportError, OSError) as error:
            refused = error.with_traceback(None)
        return fail(_system_error(refused), as_json=ctx.meta[_AS_JSON])  # what the failed calls held is free by now

    def _refuse_typo(self, ctx: click.Context, word: str) -> None:
        is_file_like = not word or word.startswith("-") or Path(word).suffix or "/" in word or os.path.exists(word)  # noqa: PTH110 (False for a name that is too long)
        if is_file_like:
            return
        near = get_close_matches(word, self.commands, n=1)
        hint = f"did you mean {near[0]}?" if near else "a recipe is a .yaml file; see slrmerge --help"
        raise click.UsageError(f"no command or recipe {word!r}; {hint}", ctx)


@contextmanager
def _clean_exit() -> Iterator[None]:
    """Print click's errors as slrmerge's own, and exit with a line after Ctrl-C."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:  # whose message is the help
        raise
    except click.UsageError as error:
        ctx = error.ctx or click.get_current_context()
        for line in (*ctx.get_usage().splitlines(), f"Try '{ctx.command_path} --help' for help.", ""):
            echo(line, err=True)
        message = " ".join(error.format_message().split()).rstrip(".")
        problem = Problem("usage", ctx.command_path, message[:1].lower() + message[1:])
        fail(OptionError(problem), as_json=ctx.meta[_AS_JSON])
    except KeyboardInterrupt as error:
        echo(err=True)
        echo("interrupted: " + "; ".join(getattr(error, "__notes__", ["nothing was written"])), err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None


def _system_error(error: MemoryError | ImportError | OSError) -> SlrmergeError:
    """What the system refused to a library, such as a file that it imports, as an error of slrmerge's."""
    refused: SlrmergeError
    if isinstance(error, MemoryError):
        refused = LimitError(
            Problem("no-more-memory", "memory", "the system has no more", "free some, or raise the limit (ulimit -v)")
        )
    elif isinstance(error, ImportError):
        what, remedy = f"cannot be imported ({first_line(error)})", "install it again, or raise the limit (ulimit -v)"
        refused = MissingExtraError(Problem("import-failed", str(error.name), what, remedy))
    else:
        from slrmerge.io.pieces import output_error

        refused = output_error(Path(error.filename or "."), error)
    for note in getattr(error, "__notes__", ()):
        refused.add_note(note)
    return refused


_MANY_OPTIONS = 10
"""The help of a command with fewer options lists them under one heading."""


class Command(click.Command):
    """A command whose errors name options as they are typed, and whose texts are completed as files."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        for each in self.params:
            if each.type is click.STRING:
                each.type = TextType()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options under their groups' headings, and those without a group last."""
        options = [each for each in self.get_params(ctx) if isinstance(each, click.Option)]
        groups: dict[str, list[tuple[str, str]]] = {}
        for option in options:
            if record := option.get_help_record(ctx):
                group = getattr(option, "group", "") if len(options) >= _MANY_OPTIONS else ""
                groups.setdefault(group, []).append(record)
        rest = groups.pop("", [])
        for heading, rows in (*groups.items(), ("Options", rest)):
            with formatter.section(heading):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            _require_current_folder()
            return super().invoke(ctx)
        except SlrmergeError as error:
            names = {
                each.name: each.opts[0] if isinstance(each, click.Option) else each.make_metavar(ctx)
                for each in self.params
            }
            is_option = isinstance(error, OptionError)
            error.problems = tuple(
                replace(
                    each,
                    where=names.get(each.where, each.where) if is_option else each.where,
                    what=as_typed(each.what),
                    remedy=as_typed(each.remedy),
                )
                for each in error.problems
            )
            raise


def _require_current_folder() -> None:
    """Raise OutputError where the current folder was deleted: torch's libraries end the process then."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        what, remedy = "the current folder no longer exists", "change to another one"
        raise OutputError(Problem("no-current-folder", ".", what, remedy)) from error


def as_typed(message: str) -> str:
    """A message of the library with options as the current command takes them: `--overwrite` for `overwrite=True`."""
    options = {each.name: each for each in click.get_current_context().command.params if isinstance(each, click.Option)}

    def flag(match: "re.Match[str]") -> str:
        option = options.get(match["name"])
        if option is None:
            return match[0]
        if match["text"]:
            return f"{option.opts[0]} {match['text']}"
        names = option.opts if match["flag"] == "True" else option.secondary_opts
        return names[0] if names else match[0]

    return re.sub(r'\b(?P<name>\w+)=(?:(?P<flag>True|False)\b|"(?P<text>\w+)")', flag, message)


def fail(error: SlrmergeError, *, as_json: bool) -> NoReturn:
    """Print an error, in words on stderr and with --json as a value on stdout, and exit with its code."""
    notes = [without_credentials(note) for note in getattr(error, "__notes__", [])]
    for problem in error.problems:
        echo(f"error: {problem}", err=True)
    for note in notes:
        echo(f"note: {note}", err=True)
    if as_json:
        problems = [asdict(problem) for problem in error.problems]
        with suppress(OutputError, SystemExit):  # the error's own code matters more than a stdout that is closed
            print_json(
                {"error": type(error).__name__, "exit_code": error.exit_code, "problems": problems, "notes": notes}
            )
    sys.exit(error.exit_code)
