"""The command line: parse, call, print. The only place that prints or exits."""

import os

os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # to find any, it reads the metadata of every package

try:
    from slrmerge.cli.main import main
except KeyboardInterrupt:  # as after Ctrl-C in a command, and without a traceback
    raise SystemExit(130) from None

__all__ = ["main"]
