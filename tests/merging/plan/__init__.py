"""Plans over small checkpoints made for one test."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slrmerge.merging.plan.model import MergePlan
from slrmerge.merging.plan.planner import plan_merge
from tests.checkpoints import Tensor, write_checkpoint

Tensors = Mapping[str, Tensor]
Config = Mapping[str, Any] | None


def write_pair(
    folder: Path, pre: Tensors, post: Tensors, *, pre_config: Config = None, post_config: Config = None
) -> None:
    """Two checkpoints, `folder/pre` and `folder/post`."""
    write_checkpoint(folder / "pre", pre, pre_config)
    write_checkpoint(folder / "post", post, post_config)


def plan_of(folder: Path, *, allow_code: bool = False, **content: Any) -> MergePlan:
    """The plan of a recipe with `content` for the two checkpoints in `folder`."""
    recipe = {"pretrained": str(folder / "pre"), "posttrained": str(folder / "post"), **content}
    return plan_merge(recipe, allow_code=allow_code)
