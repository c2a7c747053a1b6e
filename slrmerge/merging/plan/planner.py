"""Recipe and headers → MergePlan. Pure: reads no weights, writes nothing."""

import sys
from collections.abc import Iterator

from slrmerge.checkpoint.pair import ModelPair, require_pair, require_same_depth
from slrmerge.errors import PlanError, raise_all
from slrmerge.io.garbage import collector_paused
from slrmerge.merging.finding import Finding, find_search_result
from slrmerge.merging.plan.files import plan_files
from slrmerge.merging.plan.gguf import plan_gguf_tensors
from slrmerge.merging.plan.model import MergePlan
from slrmerge.merging.plan.shards import lay_out
from slrmerge.merging.plan.tensors import TensorPlanner
from slrmerge.recipe.load import RecipeLike, as_recipe, require_rules

_INCIDENTAL_KEYS = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})


@collector_paused()
def plan_merge(
    recipe: RecipeLike, pair: ModelPair | None = None, *, allow_code: bool = False, finding: Finding | None = None
) -> MergePlan:
    """Plan every output tensor and file of a merge of `pair`, by default the pair that the recipe names.

    Names, shapes and side files are the post-trained side's, and so are dtypes unless the recipe gives one. Python
    files are copied only with `allow_code`. Raises PlanError with everything that does not fit: layers that do not
    exist, rules that match nothing, tensors that one side lacks, shapes that differ, quantised weights to be blended.
    """
    recipe = as_recipe(recipe)
    require_rules(recipe)
    pair = recipe.open_pair() if pair is None else pair
    require_pair(pair)
    alphas, problems = recipe.resolve(pair)
    if pair.posttrained.format == "gguf":
        planned, limit_bytes = plan_gguf_tensors(recipe, pair, alphas), sys.maxsize
    else:
        planned, limit_bytes = TensorPlanner(pair, recipe.dtype, blend=alphas.blend).plan(alphas), recipe.max_shard_size
    raise_all([*problems, *require_same_depth(pair), *planned.problems], PlanError)
    shards, resharded = lay_out(planned.tensors, pair.posttrained.shards, limit_bytes=limit_bytes)
    files, code_notes = plan_files(recipe, pair, shards, allow_code=allow_code, finding=finding)
    notes = (*recipe.notes(pair), *planned.notes, *_config_notes(pair), *code_notes)
    return MergePlan(recipe, pair, shards, tuple(files), notes, resharded, allow_code, finding)


def plan(recipe: RecipeLike, pair: ModelPair | None = None, *, allow_code: bool = False) -> MergePlan:
    """Plan a merge as `merge` would execute it: `plan_merge`, with the result of the search that wrote the recipe."""
    recipe = as_recipe(recipe)
    return plan_merge(recipe, pair, allow_code=allow_code, finding=find_search_result(recipe))


def _config_notes(pair: ModelPair) -> Iterator[str]:
    pre, post = pair.pretrained.config, pair.posttrained.config
    keys = (pre.keys() | post.keys()) - _INCIDENTAL_KEYS
    differing = sorted(key for key in keys if pre.get(key) != post.get(key))
    if differing:
        yield f"the configs differ, the post-trained one is used: {', '.join(differing)}"
