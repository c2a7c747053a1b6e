"""The options of merges."""

from dataclasses import dataclass

from slrmerge.io.options import Options, option


@dataclass(frozen=True, kw_only=True)
class MergeOptions(Options):
    """How to write a merge."""

    overwrite: bool = option(False, "Replace an existing checkpoint at the output folder, in one step.", group="Output")
    allow_code: bool = option(False, "Copy the post-trained side's Python files too.", group="Output")
    output: str = option(
        "model",
        "What to write: the whole model, or an adapter where the post-trained side is one.",
        choices=("model", "adapter"),
        flag="--as",
        group="Output",
    )
    download: str = option(
        "ranges",
        "What to download from the Hub: only the byte ranges needed, or the full files into the Hub's cache.",
        choices=("ranges", "full"),
        group="Hub",
    )
    threads: int | None = option(
        None, "Number of threads.", minimum=1, default_help="one per core; 8 from the Hub", group="Resources"
    )
    ray: str | None = option(
        None, "Run on a Ray cluster: auto, local, or HOST:PORT.", metavar="ADDRESS", group="Resources"
    )
    fsync: bool = option(True, "Wait until everything is on the disk.", flag="--fsync/--no-fsync", group="Output")
