"""Hooks of the site: links that lead out of docs/, tables of options, examples of commands.

Links such as `../recipes` work where the pages are read as files. On the site, they lead to the repository, and
pictures outside docs/ become part of it.
"""

import inspect
import re
from dataclasses import fields
from pathlib import Path
from pkgutil import resolve_name

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from slrmerge.cli import main
from slrmerge.io.options import options_of

_EXAMPLES = re.compile(r"\x08\n((?:.+\n?)+)")  # paragraphs that click does not wrap
_OPTIONS = re.compile(r"<!-- options of ([\w.]+)\.(\w+) -->")
_OUTSIDE = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)\s]+)\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    for command in (main, *main.commands.values()):
        command.help = _EXAMPLES.sub(
            lambda found: f"```text\n{found[1].rstrip()}\n```\n", inspect.cleandoc(command.help or "")
        )
        command.epilog = _EXAMPLES.sub("", command.epilog or "")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    for picture in sorted(root.glob("examples/*/*.png")):
        name = picture.relative_to(root).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, config: MkDocsConfig, **_: object) -> str:
    def target(found: re.Match[str]) -> str:
        picture, text, path = found.groups()
        return f"{picture}[{text}]({path if picture else f'{config.repo_url}/blob/main/{path}'})"

    return _OPTIONS.sub(lambda found: _table(resolve_name(f"{found[1]}:{found[2]}")), _OUTSIDE.sub(target, markdown))


def on_post_page(output: str, **_: object) -> str:
    return output.replace('data-md-component="source"', "")  # whose script asks GitHub for the number of stars


def _table(kind: type) -> str:
    """The options of an option class, as keyword arguments."""
    rows = [f"Options of {kind.__name__}:", "", "| option | default | |", "|---|---|---|"]
    options = options_of(kind)
    for each in fields(kind):
        if each.name in options:
            option = options[each.name]
            default = option.default_help or f"`{each.default!r}`"
            choices = (
                "" if all(each in option.help for each in option.choices) else f" One of {', '.join(option.choices)}."
            )
            rows.append(f"| `{each.name}` | {default} | {option.help}{choices} |")
    return "\n".join(rows)
