"""Execute a plan; never leave half a checkpoint."""

from slrmerge.merge.executor import (
    Download,
    MergeResult,
    available_cores,
    default_threads,
    execute,
    merge_checkpoints,
    with_whole_files,
)
from slrmerge.merge.target import folder_problems, require_space, resolve_target, target_problems

__all__ = [
    "Download",
    "MergeResult",
    "available_cores",
    "default_threads",
    "execute",
    "folder_problems",
    "merge_checkpoints",
    "require_space",
    "resolve_target",
    "target_problems",
    "with_whole_files",
]
