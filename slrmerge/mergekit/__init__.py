"""mergekit's configs as merges of two checkpoints: what stands for which side, and the weight of each tensor.

mergekit's words: https://github.com/arcee-ai/mergekit, docs of the config and of its methods. Its `layer_range`s are
half-open, and this room alone knows that. What it does with more than two models, or with layers in another order, is
no merge of two checkpoints and refused.
"""

from slrmerge.mergekit.config import METHODS, is_config
from slrmerge.mergekit.read import read_config
from slrmerge.mergekit.rules import Rules
from slrmerge.mergekit.write import write_config

CONFIG_NAME = "mergekit_config.yml"

__all__ = ["CONFIG_NAME", "METHODS", "Rules", "is_config", "read_config", "write_config"]
