"""`python -m slrmerge`, for where the command is not on the path."""

from slrmerge.cli import main

main(prog_name="slrmerge")
