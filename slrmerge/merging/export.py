"""A plan as the mergekit config that gives the same merge."""

from typing import Any

from slrmerge.checkpoint.header import TORCH_DTYPES
from slrmerge.checkpoint.pair import require_layers
from slrmerge.errors import PlanError, Problem
from slrmerge.io.strict_yaml import write_yaml
from slrmerge.merging.plan.model import MergePlan
from slrmerge.recipe.alphas import TensorAlphas
from slrmerge.recipe.mergekit.write import write_config


def export_mergekit(plan: MergePlan) -> str:
    """The YAML of a mergekit config that gives the merge of `plan`; folders are absolute, repositories pinned.

    Raises PlanError where the decoder layers are unknown, and for GGUF files; RecipeError where mergekit cannot express
    the merge.
    """
    if plan.pair.posttrained.format == "gguf":
        what, remedy = "mergekit does not read GGUF files", "export a recipe for the original checkpoints"
        raise PlanError(Problem("gguf-mergekit", str(plan.pair.posttrained), what, remedy))
    alphas = TensorAlphas({tensor.name: tensor.alpha for tensor in plan.tensors()}, blend=plan.recipe.blend)
    names = {side: checkpoint.reference for side, checkpoint in plan.pair.items()}
    config: dict[str, Any] = write_config(alphas, require_layers(plan.pair), **names)
    dtypes = {tensor.info.dtype for tensor in plan.tensors()} & TORCH_DTYPES.keys()
    if len(dtypes) == 1:
        output = TORCH_DTYPES[dtypes.pop()]
        # mergekit rounds its inputs to `dtype`: blends are computed wide and rounded once.
        wide = "float64" if output == "float64" else "float32"
        copies = config["merge_method"] == "passthrough"
        config |= {"dtype": output} if copies else {"dtype": wide, "out_dtype": output}
    if plan.recipe.tokenizer == "pretrained":
        config["tokenizer_source"] = names["pretrained"]
    return write_yaml(config)
