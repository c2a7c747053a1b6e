"""slrmerge: merge a pre-trained and a post-trained checkpoint, layer by layer, without loading either.

Names are imported when they are first used, so that `import slrmerge` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slrmerge.checkpoint import Checkpoint as Checkpoint
    from slrmerge.diff import Differences as Differences
    from slrmerge.diff import compare_checkpoints as compare_checkpoints
    from slrmerge.errors import SlrmergeError as SlrmergeError
    from slrmerge.evaluate.models import NamedModel as NamedModel
    from slrmerge.evaluate.models import parse_model as parse_model
    from slrmerge.evaluate.options import EvaluationOptions as EvaluationOptions
    from slrmerge.evaluate.run import Evaluation as Evaluation
    from slrmerge.hub import open_checkpoint as open_checkpoint
    from slrmerge.merge import MergeResult as MergeResult
    from slrmerge.merge import execute as execute
    from slrmerge.merge import merge_checkpoints as merge_checkpoints
    from slrmerge.plan import MergePlan as MergePlan
    from slrmerge.plan import plan_merge as plan_merge
    from slrmerge.push import PushResult as PushResult
    from slrmerge.push import push_to_hub as push_to_hub
    from slrmerge.recipe import Recipe as Recipe
    from slrmerge.recipe import load_recipe as load_recipe
    from slrmerge.recipe import parse_recipe as parse_recipe
    from slrmerge.repository import Repository as Repository
    from slrmerge.search.options import SearchOptions as SearchOptions
    from slrmerge.search.results import Report as Report
    from slrmerge.search.run import Search as Search
    from slrmerge.search.select import select as select
    from slrmerge.verify import VerifyReport as VerifyReport
    from slrmerge.verify import verify_checkpoint as verify_checkpoint

__version__ = "0.1.0"

_HOMES = {
    "Checkpoint": "checkpoint",
    "Differences": "diff",
    "Evaluation": "evaluate.run",
    "EvaluationOptions": "evaluate.options",
    "MergePlan": "plan",
    "MergeResult": "merge",
    "NamedModel": "evaluate.models",
    "PushResult": "push",
    "Recipe": "recipe",
    "Report": "search.results",
    "Repository": "repository",
    "Search": "search.run",
    "SearchOptions": "search.options",
    "SlrmergeError": "errors",
    "VerifyReport": "verify",
    "compare_checkpoints": "diff",
    "execute": "merge",
    "load_recipe": "recipe",
    "merge_checkpoints": "merge",
    "open_checkpoint": "hub",
    "parse_model": "evaluate.models",
    "parse_recipe": "recipe",
    "plan_merge": "plan",
    "push_to_hub": "push",
    "select": "search.select",
    "verify_checkpoint": "verify",
}

__all__ = [
    "Checkpoint",
    "Differences",
    "Evaluation",
    "EvaluationOptions",
    "MergePlan",
    "MergeResult",
    "NamedModel",
    "PushResult",
    "Recipe",
    "Report",
    "Repository",
    "Search",
    "SearchOptions",
    "SlrmergeError",
    "VerifyReport",
    "compare_checkpoints",
    "execute",
    "load_recipe",
    "merge_checkpoints",
    "open_checkpoint",
    "parse_model",
    "parse_recipe",
    "plan_merge",
    "push_to_hub",
    "select",
    "verify_checkpoint",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"slrmerge.{_HOMES[name]}"), name)
