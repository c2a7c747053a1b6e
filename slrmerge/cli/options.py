"""Options of the command line: generated from the option classes, and those that only commands have."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import click

from slrmerge.cli.group import TextType
from slrmerge.io.options import Option, options_of

Decorator = Callable[[Any], Any]


PATH = click.Path(path_type=Path, readable=False)
"""A path; whether it exists and is readable is checked by the code that opens it."""


class GroupedOption(click.Option):
    """An option that a command's help lists under the heading `group`, if that is not empty."""

    def __init__(self, *declarations: Any, group: str, **more: Any) -> None:
        super().__init__(*declarations, **more)
        self.group = group


grouped_option = partial(click.option, cls=GroupedOption)
"""`click.option` with a `group`."""


class FolderType(click.Path):
    """A folder, as `PATH`; an empty word, which a shell makes of an unset variable, is not the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("is empty; write . for the current folder", param, ctx)
        return super().convert(value, param, ctx)


FOLDER = FolderType(path_type=Path, readable=False)


class DtypeType(click.Choice[str]):
    """A dtype by torch's name, or by its short one."""

    _SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}  # noqa: RUF012

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(self._SHORT.get(value, value), param, ctx)


class Number(click.FloatRange):
    name = "number"  # in errors


class WholeNumber(click.IntRange):
    name = "whole number"


class NumberOrAuto(WholeNumber):
    """A whole number in a range, or the word auto."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else super().convert(value, param, ctx)


def options_from(kind: type[Any], *only: str) -> Decorator:
    """The options of an option class, all or `only` some, for a command that takes them as `**options`."""
    hints = get_type_hints(kind)
    decorators = [
        _click_option(name, known, hints[name], kind.__dataclass_fields__[name].default)
        for name, known in options_of(kind).items()
        if not only or name in only
    ]
    return all_of(*decorators)


def all_of(*decorators: Decorator) -> Decorator:
    """Several decorators as one, in the order given."""

    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def _click_option(name: str, known: Option, hint: Any, default: Any) -> Decorator:
    flag = known.flag or f"--{name.replace('_', '-')}"
    kinds = [kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,)) if kind is not NoneType]
    more: dict[str, Any] = {"help": known.help, "group": known.group}
    if bool in kinds:
        return grouped_option(flag, name, default=default, is_flag=True, show_default="/" in flag, **more)
    more |= {"metavar": known.metavar, "show_default": known.default_help or True}
    if get_origin(kinds[0]) is tuple:
        more["multiple"] = True
    if default not in (None, ()):
        more["default"] = default
    if "bfloat16" in known.choices:
        more["type"] = DtypeType(known.choices)
    elif known.choices:
        more["type"] = TextType(*known.choices) if known.or_file else click.Choice(known.choices)
    elif float in kinds:
        lowest = known.above if known.above is not None else known.minimum
        more |= {
            "type": Number(lowest, known.maximum, min_open=known.above is not None),
            "metavar": known.metavar or "NUMBER",
        }
    elif int in kinds and not known.is_size:
        lower, upper = (None if bound is None else int(bound) for bound in (known.minimum, known.maximum))
        kind = NumberOrAuto if known.or_auto else WholeNumber
        more |= {"type": kind(lower, upper), "metavar": known.metavar or ("N|auto" if known.or_auto else "N")}
    return grouped_option(flag, name, **more)


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
overwrite_option = grouped_option(
    "--overwrite", is_flag=True, group="Output", help="Replace the results of an older run at --out."
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Check and plan everything, write nothing.")
private_option = grouped_option("--private", is_flag=True, group="Hub", help="Create the repository as private.")
branch_option = grouped_option(
    "--revision", metavar="BRANCH", group="Hub", help="Branch to push to; created if it does not exist."
)
threads_option = click.option(
    "--threads", type=WholeNumber(min=1), metavar="N", show_default="one per core", help="Number of threads."
)
recipe_argument = click.argument("recipe", type=PATH)
folder_argument = click.argument("folder", type=FOLDER)
recipe_overrides = all_of(
    grouped_option("--max-shard-size", metavar="SIZE", group="Output", help="Maximum size of one file, such as 5GB."),
    grouped_option(
        "--dtype", type=DtypeType(("float32", "float16", "bfloat16", "float64")), group="Output", help="Output dtype."
    ),
)


def out_option(what: str, *, required: bool = False) -> Decorator:
    """`--out`, the folder for `what`."""
    return grouped_option(
        "--out",
        "-o",
        type=FOLDER,
        required=required,
        group="Output",
        help=f"Folder for {what}; it appears complete or not at all.",
    )
