"""Recipe + headers → MergePlan. Pure: reads no weights, writes nothing, takes no decision later."""

from collections.abc import Iterator

from slrmerge.checkpoint import Checkpoint
from slrmerge.errors import CheckpointError, PlanError, Problem, raise_all
from slrmerge.plan.findings import PICTURE_NAME, SUMMARY_NAME, Finding, finding_of
from slrmerge.plan.model import Kind, MergePlan, PlannedFile, PlannedShard, PlannedTensor
from slrmerge.plan.routes import NO_STACK, route
from slrmerge.plan.shards import lay_out
from slrmerge.plan.sidefiles import (
    CARD_NAME,
    LOADED_SUFFIXES,
    MANIFEST_NAME,
    RECIPE_NAME,
    fetch_side_files,
    plan_files,
    side_files,
)
from slrmerge.plan.spelling import spelled_out
from slrmerge.plan.summary import Part, summarise_parts
from slrmerge.plan.tensors import TensorPlanner, plan_choices
from slrmerge.recipe import Recipe

__all__ = [
    "CARD_NAME",
    "LOADED_SUFFIXES",
    "MANIFEST_NAME",
    "NO_STACK",
    "PICTURE_NAME",
    "RECIPE_NAME",
    "SUMMARY_NAME",
    "Finding",
    "Kind",
    "MergePlan",
    "Part",
    "PlannedFile",
    "PlannedShard",
    "PlannedTensor",
    "depth_problems",
    "fetch_side_files",
    "plan_choices",
    "plan_merge",
    "route",
    "side_files",
    "spelled_out",
    "summarise_parts",
]

_INCIDENTAL_KEYS = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})


def plan_merge(recipe: Recipe, sides: tuple[Checkpoint, Checkpoint], *, allow_code: bool = False) -> MergePlan:
    """Work out every output tensor and file of a merge of `sides`, the pre-trained and the post-trained.

    The names, shapes and side files are the post-trained side's; so are dtypes unless the recipe gives one. Python
    files are copied only with `allow_code`. Raises PlanError with everything that does not fit: layers past the last,
    rules that match nothing, tensors that one side lacks, shapes that differ, quantised weights that would be blended.
    """
    pretrained, posttrained = sides
    alphas, problems = route(recipe, posttrained.weight_map, posttrained.stack)
    tensors, more, notes = TensorPlanner(pretrained, posttrained, recipe.dtype, blend=recipe.blend).plan(alphas)
    raise_all([*problems, *depth_problems(pretrained, posttrained), *more], PlanError)
    if recipe.mergekit is not None:
        notes[:0] = _mergekit_notes(recipe, posttrained)
    recipe = spelled_out(recipe, alphas, posttrained.stack)
    shards = lay_out(tensors, limit_bytes=recipe.max_shard_size)
    try:
        finding = finding_of(recipe)
        picture = finding.picture if finding else None
        files, code_notes = plan_files(
            posttrained,
            shards,
            dtype=recipe.dtype,
            allow_code=allow_code,
            picture=picture,
            tokenizer=pretrained if recipe.tokenizer == "pretrained" else posttrained,
            mergekit_text=recipe.mergekit_text,
        )
    except OSError as error:
        where = str(error.filename or posttrained)
        raise CheckpointError(Problem(where, f"cannot be read ({error.strerror})")) from error
    notes += [*_config_notes(pretrained, posttrained), *code_notes]
    return MergePlan(recipe, pretrained, posttrained, shards, tuple(files), tuple(notes), allow_code, finding)


def _mergekit_notes(recipe: Recipe, posttrained: Checkpoint) -> Iterator[str]:
    given = "config and tokenizer" if recipe.tokenizer == "posttrained" else "config"
    yield f"as mergekit has it, {posttrained} gives {given}: it is the post-trained side"
    if recipe.mergekit and recipe.mergekit.config.tokenizer_source is not None:
        yield "rows of embeddings stay in their places, where mergekit would move them if the two vocabularies differ"


def depth_problems(pretrained: Checkpoint, posttrained: Checkpoint) -> Iterator[Problem]:
    """Two models of different depth have no layers in common, whatever the names say."""
    if pretrained.stack and posttrained.stack and pretrained.stack.count != posttrained.stack.count:
        counts = f"{pretrained.stack.count} layers pre-trained and {posttrained.stack.count} post-trained"
        yield Problem(str(pretrained), f"{counts}: these are two models", "name the model it was trained from")


def _config_notes(pretrained: Checkpoint, posttrained: Checkpoint) -> Iterator[str]:
    keys = (pretrained.config.keys() | posttrained.config.keys()) - _INCIDENTAL_KEYS
    differing = sorted(key for key in keys if pretrained.config.get(key) != posttrained.config.get(key))
    if differing:
        yield f"the configs differ, the post-trained one counts: {', '.join(differing)}"
