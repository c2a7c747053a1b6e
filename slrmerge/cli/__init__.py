"""The command line: parse, call, print. The only place that prints or exits."""

from slrmerge.cli.main import main

__all__ = ["main"]
