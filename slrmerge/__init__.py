"""slrmerge: merge a pre-trained and a post-trained checkpoint, layer by layer, without loading either.

    import slrmerge as slr

    pair = slr.open_pair("org/model", "org/model-instruct")
    found = slr.search(pair, out="search")
    slr.merge(found.choice, out="hybrid")
    slr.verify("hybrid")

Names are imported when they are first used, so that `import slrmerge` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from slrmerge._version import __version__ as __version__

if TYPE_CHECKING:
    from slrmerge.checkpoint.base import Checkpoint as Checkpoint
    from slrmerge.checkpoint.location import Repository as Repository
    from slrmerge.checkpoint.opening import open_checkpoint as open_checkpoint
    from slrmerge.checkpoint.opening import open_pair as open_pair
    from slrmerge.checkpoint.pair import ModelPair as ModelPair
    from slrmerge.errors import SlrmergeError as SlrmergeError
    from slrmerge.evaluation.result import EvaluationResult as EvaluationResult
    from slrmerge.evaluation.run import evaluate as evaluate
    from slrmerge.io.progress import Progress as Progress
    from slrmerge.merging.diff import diff as diff
    from slrmerge.merging.diff_result import DiffResult as DiffResult
    from slrmerge.merging.executor import MergeResult as MergeResult
    from slrmerge.merging.executor import execute as execute
    from slrmerge.merging.executor import merge as merge
    from slrmerge.merging.hub_commit import PushResult as PushResult
    from slrmerge.merging.plan.model import MergePlan as MergePlan
    from slrmerge.merging.plan.planner import plan as plan
    from slrmerge.merging.push import push as push
    from slrmerge.merging.verify import VerifyResult as VerifyResult
    from slrmerge.merging.verify import verify as verify
    from slrmerge.recipe.load import load_recipe as load_recipe
    from slrmerge.recipe.model import Recipe as Recipe
    from slrmerge.searching.results import SearchResult as SearchResult
    from slrmerge.searching.run import search as search
    from slrmerge.searching.select import select as select

_MODULES = {
    "Checkpoint": "checkpoint.base",
    "DiffResult": "merging.diff_result",
    "EvaluationResult": "evaluation.result",
    "MergePlan": "merging.plan.model",
    "MergeResult": "merging.executor",
    "ModelPair": "checkpoint.pair",
    "Progress": "io.progress",
    "PushResult": "merging.hub_commit",
    "Recipe": "recipe.model",
    "Repository": "checkpoint.location",
    "SearchResult": "searching.results",
    "SlrmergeError": "errors",
    "VerifyResult": "merging.verify",
    "diff": "merging.diff",
    "evaluate": "evaluation.run",
    "execute": "merging.executor",
    "load_recipe": "recipe.load",
    "merge": "merging.executor",
    "open_checkpoint": "checkpoint.opening",
    "open_pair": "checkpoint.opening",
    "plan": "merging.plan.planner",
    "push": "merging.push",
    "search": "searching.run",
    "select": "searching.select",
    "verify": "merging.verify",
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"slrmerge.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
