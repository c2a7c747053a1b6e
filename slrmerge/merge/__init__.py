"""Execute a plan; never leave half a checkpoint."""

from slrmerge.merge.executor import MergeResult, available_cores, execute, merge_checkpoints
from slrmerge.merge.target import folder_problems, free_bytes, require_space, resolve_target, target_problems

__all__ = [
    "MergeResult",
    "available_cores",
    "execute",
    "folder_problems",
    "free_bytes",
    "merge_checkpoints",
    "require_space",
    "resolve_target",
    "target_problems",
]
