"""Which tensors belong to which decoder layer.

Names alone are ambiguous: a vision tower has numbered layers too. The stack is the one as long as the config says.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LAYER_COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names of the number of decoder layers in configs; the first one present counts."""

TEXT_CONFIG_KEYS = ("text_config", "language_config", "llm_config")
"""Sections that hold the decoder's config in models with several towers."""

STACK_PREFIXES = (
    "model.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "transformer.h",
    "gpt_neox.layers",
    "model.decoder.layers",
    "blk",  # GGUF
)
"""Prefixes of decoder layers. Only needed where a model has two stacks of the right length: the first here wins."""

_LAYER = re.compile(r"\.(\d{1,9})\.", re.ASCII)


@dataclass(frozen=True, slots=True)
class LayerStack:
    """The decoder layers: tensors named `<prefix>.<k>.<inner>` with 0 <= k < count."""

    prefix: str
    count: int

    def locate(self, name: str) -> tuple[int, str] | None:
        """The layer of a tensor and its name inside the layer, or None for a tensor outside the stack.

        Layers past `count` (the extra prediction layers of DeepSeek-V3) are outside.
        """
        found = _LAYER.match(name, len(self.prefix)) if name.startswith(self.prefix) else None
        if not found or (layer := int(found[1])) >= self.count or found.end() == len(name):
            return None
        return layer, name[found.end() :]


def layer_count(config: Mapping[str, Any]) -> int | None:
    """The number of decoder layers in a config, or None where there is none."""
    nested = [config[key] for key in TEXT_CONFIG_KEYS if isinstance(config.get(key), dict)]
    for section in (config, *nested):
        for key in LAYER_COUNT_KEYS:
            if type(section.get(key)) is int:
                return int(section[key])
    return None


def numbered_stacks(names: Iterable[str]) -> dict[str, int]:
    """The outermost numbered prefixes, each with its number of consecutive layers from 0."""
    members: dict[str, set[int]] = defaultdict(set)
    for name in names:
        if (found := _LAYER.search(name, 1)) and not "0" <= name[0] <= "9":
            members[name[: found.start()]].add(int(found[1]))
    return {prefix: _run_from_zero(numbers) for prefix, numbers in members.items()}


def find_stack(stacks: Mapping[str, int], config: Mapping[str, Any]) -> LayerStack | None:
    """The decoder stack among the numbered ones; None where none fits the config, or several do equally well."""
    count = layer_count(config)
    stacks = _decoder_like(stacks)
    if count is not None:
        long_enough = {prefix: count for prefix, run in stacks.items() if run >= count}
        stacks = {prefix: count for prefix, run in stacks.items() if run == count} or long_enough
    if not stacks or (len(stacks) > 1 and stacks.keys().isdisjoint(STACK_PREFIXES)):
        return None
    chosen = next(iter(stacks))
    return LayerStack(chosen, stacks[chosen]) if stacks[chosen] > 0 else None


def longest_stack(stacks: Mapping[str, int]) -> int:
    """The number of layers in the weights: of the stack with a known name, or of the longest."""
    return max(_decoder_like(stacks).values(), default=0)


def _decoder_like(stacks: Mapping[str, int]) -> dict[str, int]:
    """The stacks with a known name, in the order of `STACK_PREFIXES`; all stacks where none has one."""
    known = {prefix: stacks[prefix] for prefix in STACK_PREFIXES if prefix in stacks}
    return known or {prefix: run for prefix, run in stacks.items() if run}


def _run_from_zero(numbers: set[int]) -> int:
    return next(k for k in range(len(numbers) + 1) if k not in numbers)
