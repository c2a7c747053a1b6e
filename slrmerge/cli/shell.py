"""The commands about the command line itself: help, env, completion."""

import os
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from slrmerge._version import __version__
from slrmerge.cli.group import Command
from slrmerge.cli.options import json_option
from slrmerge.cli.output import HUB_VERBOSITY, describe_stdout, echo, echo_text, print_json
from slrmerge.errors import did_you_mean

_PACKAGES = (
    "torch", "transformers", "safetensors", "huggingface_hub", "hf_xet", "numpy", "pydantic", "tokenizers",
    "peft", "gguf", "openai", "datasets", "sentence-transformers", "ray", "mergekit",
)  # fmt: skip

_VARIABLES = ("HF_", "HUGGING", "SLRMERGE", "OMP_", "CUDA_", "RAY_")

_COMPLETIONS = {
    "bash": "~/.local/share/bash-completion/completions/slrmerge",
    "zsh": "~/.local/share/zsh/site-functions/_slrmerge",
    "fish": "~/.config/fish/completions/slrmerge.fish",
}
"""Where shells look for the completions of a user's commands; zsh only with that folder in its fpath."""


def _command_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:  # noqa: ARG001 (click's)
    group = ctx.find_root().command
    assert isinstance(group, click.Group)
    return [name for name in group.list_commands(ctx) if name.startswith(incomplete)]


@click.command("help", cls=Command)
@click.argument("command", required=False, shell_complete=_command_names)
@click.pass_context
def help_command(ctx: click.Context, command: str | None) -> None:
    """Show the help of COMMAND, or of slrmerge.

    \b
    slrmerge help search
    """
    parent = ctx.parent
    assert parent is not None
    assert isinstance(parent.command, click.Group)
    if command is None:
        echo_text(parent.get_help() + "\n")
        return
    found = parent.command.get_command(parent, command)
    if found is None:
        raise click.UsageError(f"no command {command!r}; {did_you_mean(command, sorted(parent.command.commands))}", ctx)
    echo_text(found.get_help(click.Context(found, info_name=command, parent=parent)) + "\n")


@click.command("env", cls=Command)
@json_option
def environment(*, as_json: bool) -> None:
    """Show versions, hardware and settings, for bug reports.

    Environment variables are named; their values, which may be secret, are not shown.

    \b
    slrmerge env --json > env.json
    """
    from slrmerge.cli.progress import TerminalProgress

    with TerminalProgress(quiet=as_json) as progress:
        progress.status("loading torch")
        found = _environment()
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        echo(f"{name:{max(map(len, found))}}  {value if value is not None else 'not installed'}")


@click.command(cls=Command)
@click.argument("shell", required=False, type=click.Choice(sorted(_COMPLETIONS)))
@click.option("--install", is_flag=True, help="Write it to the folder where the shell looks for completions.")
@click.pass_context
def completion(ctx: click.Context, shell: str | None, *, install: bool) -> None:
    """Print or install the completion script of a shell, by default the one in use.

    \b
    slrmerge completion --install
    slrmerge completion fish > ~/.config/fish/completions/slrmerge.fish
    """
    shell = shell or Path(os.environ.get("SHELL", "")).name
    if shell not in _COMPLETIONS:
        raise click.UsageError(f"name a shell: {', '.join(sorted(_COMPLETIONS))}", ctx)
    root = ctx.find_root().command
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(root, {}, "slrmerge", "_SLRMERGE_COMPLETE").source()
    if not install:
        echo_text(script)
        return
    from slrmerge.io.files import write_text
    from slrmerge.io.pieces import translate_os_errors

    path = Path(_COMPLETIONS[shell]).expanduser()
    with translate_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, script)
    echo(f"wrote {path}; start a new shell")
    if shell == "zsh":
        echo(f"zsh finds it where ~/.zshrc has, before compinit: fpath+=({path.parent})")


def _environment() -> dict[str, Any]:
    from slrmerge.io.memory import memory_bytes
    from slrmerge.io.sizes import format_bytes
    from slrmerge.io.threads import available_cores

    found: dict[str, Any] = {
        "slrmerge": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": available_cores(),
        "memory": format_bytes(memory_bytes()),
        "stdout": describe_stdout(),
    }
    found |= {package: _version(package) for package in _PACKAGES}
    found["cuda"] = _cuda()
    names = {name for name in os.environ if name.startswith(_VARIABLES)} - {HUB_VERBOSITY}  # which the command sets
    found["variables"] = ", ".join(sorted(names)) or "none"
    return found


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cuda() -> str | None:
    if find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return "not available"
    return ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
