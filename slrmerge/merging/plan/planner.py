"""Recipe and headers → MergePlan. Pure: reads no weights, writes nothing."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from slrmerge.checkpoint.config_differences import Difference, compare_configs
from slrmerge.checkpoint.header import FLOATING
from slrmerge.checkpoint.layers import group_names
from slrmerge.checkpoint.pair import ModelPair, require_pair, require_same_depth
from slrmerge.checkpoint.side_files import CONFIG_NAME
from slrmerge.errors import PlanError, Problem, raise_all
from slrmerge.io.garbage import collector_paused
from slrmerge.io.names import is_inside
from slrmerge.io.options import checks_types
from slrmerge.merging.finding import Finding, find_search_result
from slrmerge.merging.options import MergeOptions
from slrmerge.merging.plan.adapter import as_adapter
from slrmerge.merging.plan.files import plan_files
from slrmerge.merging.plan.gguf import plan_gguf_tensors
from slrmerge.merging.plan.metadata import plan_metadata
from slrmerge.merging.plan.model import MergePlan, PlannedTensor
from slrmerge.merging.plan.notes import left_out_notes, model_notes
from slrmerge.merging.plan.shards import lay_out
from slrmerge.merging.plan.tensors import PlannedTensors, TensorPlanner
from slrmerge.merging.plan.tokenizer import tokenizer_notes
from slrmerge.recipe.alphas import TensorAlphas
from slrmerge.recipe.load import AnyRecipe, RecipeLike, as_recipe, require_rules


@collector_paused()
def plan_merge(
    recipe: RecipeLike,
    pair: ModelPair | None = None,
    *,
    allow_code: bool = False,
    output: str = "model",
    finding: Finding | None = None,
) -> MergePlan:
    """Plan every output tensor and file of a merge of `pair`, by default the pair that the recipe names.

    Names, shapes and side files are the post-trained side's, and so are dtypes unless the recipe gives one. Python
    files are copied only with `allow_code`. The `output` is the whole "model" or an "adapter". Raises PlanError with
    everything that does not fit: layers that do not exist, rules that match nothing, tensors that one side lacks,
    shapes that differ, quantized weights to be blended.
    """
    recipe = as_recipe(recipe)
    require_rules(recipe)
    pair = recipe.open_pair() if pair is None else pair
    require_pair(pair)
    alphas, problems = recipe.resolve(pair)
    raise_all(_empty_problems(pair, alphas), PlanError)
    planned = _plan_tensors(recipe, pair, alphas)
    limit_bytes = sys.maxsize if pair.posttrained.format == "gguf" else recipe.max_shard_size
    metadata = plan_metadata(pair, planned.tensors)
    differences = compare_configs(pair.pretrained.config, pair.posttrained.config)
    problems += [
        *_size_problems(planned.tensors, limit_bytes, recipe.place("$.max_shard_size")),
        *require_same_depth(pair),
        *(_head_problems(pair, differences) if any(alphas.values()) else ()),
        *planned.problems,
        *metadata.problems,
    ]
    raise_all(problems, PlanError)
    shards, resharded = lay_out(
        planned.tensors,
        pair.posttrained.shards,
        limit_bytes=limit_bytes,
        metadata=metadata.metadata,
        keeps_metadata=metadata.is_posttrained,
    )
    files, code_notes = plan_files(recipe, pair, shards, allow_code=allow_code, finding=finding)
    names = [*(shard.name for shard in shards), *(file.name for file in files)]
    raise_all(_name_problems(names), PlanError)
    notes = (
        *model_notes(pair, alphas, differences),
        *recipe.notes(pair),
        *pair.posttrained.notes,
        *planned.notes,
        *code_notes,
        *left_out_notes(pair),
    )
    plan = MergePlan(recipe, pair, shards, tuple(files), notes, resharded, allow_code, finding)
    return as_adapter(plan) if output == "adapter" else plan


@checks_types
def plan(
    recipe: RecipeLike, pair: ModelPair | None = None, *, allow_code: bool = False, output: str = "model"
) -> MergePlan:
    """What a merge by `recipe` would read and write, as a value: print it, compare it, pickle it, `execute` it.

    Reads headers only. `recipe` and `pair` are those of `merge`, and so are the two options. Raises RecipeError,
    CheckpointError, and PlanError with everything that does not fit.
    """
    MergeOptions(allow_code=allow_code, output=output)
    recipe = as_recipe(recipe)
    made = plan_merge(recipe, pair, allow_code=allow_code, output=output, finding=find_search_result(recipe))
    whole = made.whole or made
    return replace(made, notes=(*tokenizer_notes(recipe.tokenizer, whole.pair, whole.tensors()), *made.notes))


def _plan_tensors(recipe: AnyRecipe, pair: ModelPair, alphas: TensorAlphas) -> PlannedTensors:
    if pair.posttrained.format == "gguf":
        return plan_gguf_tensors(recipe, pair, alphas)
    shares_vocabulary = recipe.vocabulary == "shared"
    planner = TensorPlanner(pair, recipe.dtype, blend=alphas.blend, shares_vocabulary=shares_vocabulary)
    return planner.plan(alphas)


def _head_problems(pair: ModelPair, differences: Iterable[Difference]) -> Iterator[Problem]:
    """Layers of equal shapes that are cut into other attention heads do not fit, whatever the shapes say."""
    for difference in differences:
        if difference.is_about_heads:
            remedy = "name the model that the post-trained one was trained from"
            yield Problem("different-heads", f"{pair.pretrained}/{CONFIG_NAME}", str(difference), remedy)


def _empty_problems(pair: ModelPair, alphas: Mapping[str, float]) -> Iterator[Problem]:
    """Tensors without elements, which DeepSpeed ZeRO-3 leaves where weights were not gathered before saving."""
    for side, checkpoint in pair.items():
        empty = (name for name, info in checkpoint.items() if info.shape == (0,) and info.dtype in FLOATING)
        for where in group_names(name for name in empty if side == "posttrained" or alphas.get(name)):
            what = f"has no elements in {checkpoint}, as DeepSpeed ZeRO-3 saves weights that it has not gathered"
            remedy = "gather them while saving (stage3_gather_16bit_weights_on_model_save), or run its zero_to_fp32.py"
            yield Problem("empty-tensor", where, what, remedy)


def _name_problems(names: Iterable[str]) -> Iterator[Problem]:
    """Names that a manifest cannot have: on some systems they lead out of a folder."""
    for name in names:
        if not is_inside(name):
            yield Problem("invalid-name", name, "cannot be the name of a merge's file", "rename it, without : and \\")


def _size_problems(tensors: Sequence[PlannedTensor], limit_bytes: int, where: str) -> Iterator[Problem]:
    """A limit for files that is below the size of most tensors, which would then get a file each."""
    too_large = [tensor.info.nbytes for tensor in tensors if tensor.info.nbytes > limit_bytes]
    if len(tensors) > 2 and len(too_large) * 2 > len(tensors):
        what = f"{limit_bytes:,} bytes hold hardly any tensor: most have {min(too_large):,} bytes or more"
        remedy = "write a size in bytes with its unit, such as 5GB (5B is five bytes)"
        yield Problem("shard-size-too-small", where, what, remedy)
