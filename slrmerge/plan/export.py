"""A plan as the mergekit config that gives the same merge."""

import yaml

from slrmerge.blend import DTYPES
from slrmerge.checkpoint import Checkpoint
from slrmerge.errors import PlanError, Problem
from slrmerge.mergekit.write import write_config
from slrmerge.plan.model import MergePlan
from slrmerge.plan.routes import NO_STACK


def mergekit_config(plan: MergePlan) -> str:
    """The YAML of a mergekit config that merges as `plan` does; its folders are absolute, its repositories pinned.

    Raises PlanError where no stack of layers is known, RecipeError where mergekit has no words for the recipe.
    """
    stack = plan.posttrained.stack
    if stack is None:
        raise PlanError(Problem(str(plan.posttrained), NO_STACK))
    alphas = {tensor.name: tensor.alpha for tensor in plan.tensors()}
    names = {"pretrained": _called(plan.pretrained), "posttrained": _called(plan.posttrained)}
    config = write_config(alphas, stack.locate, stack.count, blend=plan.recipe.blend, **names)
    dtypes = {tensor.info.dtype for tensor in plan.tensors()} & DTYPES.keys()
    if len(dtypes) == 1:
        output = DTYPES[dtypes.pop()]
        exact = "float64" if output == "float64" else "float32"
        # mergekit rounds what it reads to `dtype`; so blends are told to compute wide, and to round once.
        config |= (
            {"dtype": output} if config["merge_method"] == "passthrough" else {"dtype": exact, "out_dtype": output}
        )
    if plan.recipe.tokenizer == "pretrained":
        config["tokenizer_source"] = names["pretrained"]
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, default_flow_style=None)


def _called(checkpoint: Checkpoint) -> str:
    return str(checkpoint.snapshot.pinned) if checkpoint.snapshot else str(checkpoint.folder.resolve())
