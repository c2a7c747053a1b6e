"""The command line, run inside the test's own process."""

from click.testing import CliRunner, Result

from slrmerge.cli import main


def run(*arguments: object) -> Result:
    """Run `slrmerge ARGUMENTS`: stdout and stderr apart; fails on any exception that would show as a traceback."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="slrmerge")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"a traceback: {result.exception!r:.200}") from result.exception
    return result
