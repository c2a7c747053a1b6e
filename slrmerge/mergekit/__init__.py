"""mergekit's configs as merges of two checkpoints: what stands for which side, and the weight of each tensor.

mergekit's words: https://github.com/arcee-ai/mergekit, docs of the config and of its methods. Its `layer_range`s are
half-open, and this room alone knows that. What it does with more than two models, or with layers in another order, is
no merge of two checkpoints and refused. `config` is what people write, `read` and `rules` what it says, `write` the way
back; they are imported where there is a config, since most recipes are none.
"""

from collections.abc import Mapping
from typing import Any

CONFIG_NAME = "mergekit_config.yml"


def is_config(content: Mapping[Any, Any]) -> bool:
    """Whether a YAML file's content is shaped like a mergekit config."""
    return "merge_method" in content
