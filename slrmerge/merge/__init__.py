"""Execute a plan; never leave half a checkpoint."""

from slrmerge.merge.executor import MergeResult, available_cores, execute, merge_checkpoints
from slrmerge.merge.target import free_bytes, require_space, resolve_target, target_problems

__all__ = [
    "MergeResult",
    "available_cores",
    "execute",
    "free_bytes",
    "merge_checkpoints",
    "require_space",
    "resolve_target",
    "target_problems",
]
