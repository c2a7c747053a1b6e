"""A first recipe for a pair, with the other keys as comments."""

from importlib.resources import as_file, files
from pathlib import Path

from slrmerge.io.strict_yaml import write_yaml
from slrmerge.recipe.model import Recipe

_TEXT = """\
# yaml-language-server: $schema={schema}
{sources}
# Layers to reset to their pre-trained weights: first and last, both included. The model has layers 0 to {last}.
# `slrmerge search` finds the interval.
# restore: [{first_restored}, {last_restored}]

# Or a soup: the share of the pre-trained weights in every tensor.
# alpha: 0.1

# Alphas for layers, for modules inside them, and for tensors by name. Later entries win.
# layers:
#   - range: [0, {first_restored}]
#     modules: [self_attn]
#     alpha: 0.5
# tensors:
#   - match: "lm_head.*"
#     alpha: 0.25

# dtype: bfloat16
# max_shard_size: 5GB
# tokenizer: posttrained
"""


def starter_recipe(pair: Recipe, folder: Path, *, layers: int) -> str:
    """The text of a recipe file in `folder` for the two checkpoints of `pair`, which have `layers` layers."""
    sources = pair.relative_to(folder)
    with as_file(files("slrmerge.recipe").joinpath("recipe.schema.json")) as schema:
        return _TEXT.format(
            schema=schema.as_uri(),
            sources=write_yaml({side: sources[side] for side in ("pretrained", "posttrained")}),
            last=layers - 1,
            first_restored=layers * 2 // 5,
            last_restored=layers * 3 // 5,
        )
