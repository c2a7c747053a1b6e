"""What most tests start from: a pair of small checkpoints and a recipe for them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from slrmerge.checkpoint import open_pair
from slrmerge.plan import MergePlan, plan_merge
from slrmerge.recipe import Recipe, load_recipe
from tests.checkpoints import Tensor, llama_tensors, write_checkpoint


@dataclass(frozen=True)
class Pair:
    """Two six-layer checkpoints, `pre` in one file and `post` in two, side by side in `folder`."""

    folder: Path
    pre: dict[str, Tensor]
    post: dict[str, Tensor]

    @property
    def out(self) -> Path:
        return self.folder / "hybrid"

    def recipe_file(self, name: str = "recipe.yaml", **content: Any) -> Path:
        """A recipe file beside the two checkpoints, for them unless `content` names others."""
        path = self.folder / name
        path.write_text(yaml.safe_dump({"pretrained": "./pre", "posttrained": "./post", **content}, sort_keys=False))
        return path

    def recipe(self, **content: Any) -> Recipe:
        return load_recipe(self.recipe_file(**content))

    def plan(self, **content: Any) -> MergePlan:
        recipe = self.recipe(**content)
        return plan_merge(recipe, open_pair(*recipe.source_folders()))


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    pre, post = llama_tensors("pre"), llama_tensors("post")
    write_checkpoint(tmp_path / "pre", pre)
    write_checkpoint(tmp_path / "post", post, shards=2)
    return Pair(tmp_path, pre, post)
