"""Recipe and headers → MergePlan. Pure: reads no weights, writes nothing."""

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from slrmerge.checkpoint.config_defaults import config_defaults
from slrmerge.checkpoint.config_differences import compare_configs
from slrmerge.checkpoint.header import FLOATING
from slrmerge.checkpoint.layers import group_names
from slrmerge.checkpoint.pair import ModelPair, require_pair, require_same_depth
from slrmerge.checkpoint.side_files import CONFIG_NAME
from slrmerge.errors import PlanError, Problem, raise_all
from slrmerge.io.garbage import collector_paused
from slrmerge.merging.finding import Finding, find_search_result
from slrmerge.merging.plan.adapter import as_adapter
from slrmerge.merging.plan.files import plan_files
from slrmerge.merging.plan.gguf import plan_gguf_tensors
from slrmerge.merging.plan.metadata import plan_metadata
from slrmerge.merging.plan.model import MergePlan, PlannedTensor
from slrmerge.merging.plan.shards import lay_out
from slrmerge.merging.plan.tensors import TensorPlanner
from slrmerge.merging.plan.tokenizer import tokenizer_notes
from slrmerge.recipe.load import AnyRecipe, RecipeLike, as_recipe, require_rules

_SHARED_BLOCKS = {"zamba": "shared_transf", "zamba2": "shared_transformer"}
"""Architectures whose layers share a block of weights, and its name."""

_RUNS_SHARED_BLOCK = "mamba_decoder."
"""What layers that run such a block have besides."""


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
    if pair.posttrained.format == "gguf":
        planned, limit_bytes = plan_gguf_tensors(recipe, pair, alphas), sys.maxsize
    else:
        shared = recipe.vocabulary == "shared"
        planner = TensorPlanner(pair, recipe.dtype, blend=alphas.blend, shares_vocabulary=shared)
        planned, limit_bytes = planner.plan(alphas), recipe.max_shard_size
        problems += _size_problems(planned.tensors, recipe)
    metadata = plan_metadata(pair, planned.tensors)
    problems += [*require_same_depth(pair), *_head_problems(pair, alphas), *planned.problems, *metadata.problems]
    raise_all(problems, PlanError)
    shards, resharded = lay_out(
        planned.tensors,
        pair.posttrained.shards,
        limit_bytes=limit_bytes,
        metadata=metadata.metadata,
        keeps_metadata=metadata.is_posttrained,
    )
    files, code_notes = plan_files(recipe, pair, shards, allow_code=allow_code, finding=finding)
    notes = (
        *_config_notes(pair),
        *_head_notes(pair),
        *_shared_block_notes(pair, alphas),
        *_idle_notes(alphas),
        *recipe.notes(pair),
        *pair.posttrained.notes,
        *planned.notes,
        *code_notes,
        *_left_out_notes(pair),
    )
    plan = MergePlan(recipe, pair, shards, tuple(files), notes, resharded, allow_code, finding)
    return as_adapter(plan) if output == "adapter" else plan


def plan(
    recipe: RecipeLike, pair: ModelPair | None = None, *, allow_code: bool = False, output: str = "model"
) -> MergePlan:
    """Plan a merge as `merge` would execute it: `plan_merge`, with what files beside recipe and weights say.

    They are the result of the search that wrote the recipe, and the tokenizer, which may not fit the embedding.
    """
    recipe = as_recipe(recipe)
    made = plan_merge(recipe, pair, allow_code=allow_code, output=output, finding=find_search_result(recipe))
    whole = made.whole or made
    return replace(made, notes=(*tokenizer_notes(recipe.tokenizer, whole.pair, whole.tensors()), *made.notes))


def _config_notes(pair: ModelPair) -> Iterator[str]:
    """Differences that make restored layers compute otherwise than they were trained to."""
    differences = "; ".join(map(str, compare_configs(pair.pretrained.config, pair.posttrained.config)))
    if differences:
        yield f"the configs differ, restored layers run with the post-trained values: {differences}"


def _head_problems(pair: ModelPair, alphas: Mapping[str, float]) -> Iterator[Problem]:
    """Layers of equal shapes that are cut into other attention heads do not fit, whatever the shapes say."""
    if not any(alphas.values()):
        return
    for difference in compare_configs(pair.pretrained.config, pair.posttrained.config):
        if difference.is_about_heads:
            remedy = "name the model that the post-trained one was trained from"
            yield Problem("different-heads", f"{pair.pretrained}/{CONFIG_NAME}", str(difference), remedy)


def _head_notes(pair: ModelPair) -> Iterator[str]:
    """A language model without a head: loaders initialize it at random where the config does not tie it."""
    post = pair.posttrained
    embeddings, architectures = pair.correspondence.embeddings, post.config.get("architectures")
    is_language_model = isinstance(architectures, list) and any(
        str(each).endswith(("ForCausalLM", "LMHeadModel")) for each in architectures
    )
    is_default_known = post.config.get("model_type") in config_defaults()
    is_untied = not embeddings.is_tied and (is_default_known or not embeddings.may_lack_one)
    if is_language_model and embeddings.token and embeddings.head is None and is_untied:
        yield (
            f"the post-trained side stores no head, and its config does not tie one to {embeddings.token}: loaders "
            "initialize it at random; set tie_word_embeddings: true in its config if the embedding serves as both"
        )


def _shared_block_notes(pair: ModelPair, alphas: Mapping[str, float]) -> Iterator[str]:
    """A block that several layers run is stored in one of them, and follows the rules of that one."""
    block, stack = _SHARED_BLOCKS.get(str(pair.posttrained.config.get("model_type"))), pair.stack
    if block is None or stack is None:
        return
    found: dict[int, set[float]] = defaultdict(set)
    storing: set[int] = set()
    for name, alpha in alphas.items():
        place = stack.locate(name)
        if place and place[1].startswith((f"{block}.", _RUNS_SHARED_BLOCK)):
            found[place[0]].add(alpha)
            storing |= {place[0]} if place[1].startswith(f"{block}.") else set()
    if found.keys() - storing and len(set().union(*found.values())) > 1:
        layers, stored = (", ".join(map(str, sorted(numbers))) for numbers in (found, storing))
        yield f"layers {layers} run {block} of layer {stored}, whose rules decide about it for all of them"


def _left_out_notes(pair: ModelPair) -> Iterator[str]:
    names = pair.posttrained.left_out
    if names:
        others = f" and {len(names) - 8} more" if len(names) > 9 else ""
        shown = names if not others else names[:8]
        yield f"left out, beside the post-trained weights: {', '.join(shown)}{others}"


def _empty_problems(pair: ModelPair, alphas: Mapping[str, float]) -> Iterator[Problem]:
    """Tensors without elements, which DeepSpeed ZeRO-3 leaves where weights were not gathered before saving."""
    for side, checkpoint in pair.items():
        empty = (name for name, info in checkpoint.items() if info.shape == (0,) and info.dtype in FLOATING)
        for where in group_names(name for name in empty if side == "posttrained" or alphas.get(name)):
            what = f"has no elements in {checkpoint}, as DeepSpeed ZeRO-3 saves weights that it has not gathered"
            remedy = "gather them while saving (stage3_gather_16bit_weights_on_model_save), or run its zero_to_fp32.py"
            yield Problem("empty-tensor", where, what, remedy)


def _size_problems(tensors: Sequence[PlannedTensor], recipe: AnyRecipe) -> Iterator[Problem]:
    """A limit for files that is below most tensors, which would then get a file each."""
    too_large = [tensor for tensor in tensors if tensor.info.nbytes > recipe.max_shard_size]
    if len(tensors) > 2 and len(too_large) * 2 > len(tensors):
        smallest = min(tensor.info.nbytes for tensor in too_large)
        what = f"{recipe.max_shard_size:,} bytes hold hardly any tensor: most have {smallest:,} bytes or more"
        remedy = "write a size in bytes with its unit, such as 5GB (5B is five bytes)"
        yield Problem("shard-size-too-small", recipe.place("$.max_shard_size"), what, remedy)


def _idle_notes(alphas: Mapping[str, float]) -> Iterator[str]:
    if alphas and not any(alphas.values()):
        yield "nothing is taken from the pre-trained side: the output has the post-trained model's weights"
    elif alphas and all(alpha == 1 for alpha in alphas.values()):
        yield "everything is taken from the pre-trained side: the output has the pre-trained model's weights"
