"""Which tensors belong to which decoder layer.

Names alone are ambiguous: a vision tower has numbered layers too. The stack is the one as long as the config says. In
an encoder-decoder it is the decoder's.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LAYER_COUNT_KEYS = ("num_hidden_groups", "num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names of the number of decoder layers in configs; the first one present counts. ALBERT repeats its groups."""

DECODER_COUNT_KEYS = ("decoder_layers", "num_decoder_layers")
ENCODER_COUNT_KEYS = ("encoder_layers", "num_encoder_layers")
"""Names of the number of layers of either half of an encoder-decoder. The keys above may count either half there."""

TEXT_CONFIG_KEYS = ("text_config", "language_config", "llm_config", "decoder")
"""Sections that hold the decoder's config in models with several towers."""

STACK_PREFIXES = (
    "model.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "transformer.h",
    "gpt_neox.layers",
    "model.decoder.layers",
    "text_decoder.layers",
    "thinker.model.layers",
    "thinker.model.language_model.layers",
    "blk",  # GGUF
)
"""Prefixes of decoder layers. Only needed where a model has two stacks of the right length: the first here wins."""

TOWER = re.compile(
    r"(?:^|[._])(?:vision|visual|vit|image|video|audio|speech|codec|vq_?model|multi_?modal|mm|perceiver|q_?former"
    r"|resampler|connector)(?:[._]|$)"
)
"""Modules of vision and audio towers, codecs included, and what connects them to the decoder."""

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


def split_layer(name: str) -> tuple[str, int, str] | None:
    """The outermost numbered prefix of a name, the layer, and the name inside it; None for a name outside layers."""
    found = _LAYER.search(name, 1)
    return (name[: found.start()], int(found[1]), name[found.end() :]) if found else None


def writing_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config, in Qwen's Omni models with the section about the part that writes text; another part speaks."""
    thinker = config.get("thinker_config")
    return {**config, **thinker} if isinstance(thinker, dict) else config


def text_sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config itself, and its sections about the decoder."""
    config = writing_part(config)
    return [config, *(config[key] for key in TEXT_CONFIG_KEYS if isinstance(config.get(key), dict))]


def layer_count(config: Mapping[str, Any], keys: tuple[str, ...] = LAYER_COUNT_KEYS) -> int | None:
    """The number of decoder layers in a config, or None where there is none; a section's rather than the whole's.

    CLAP's whole config adds the layers of text and audio.
    """
    for section in reversed(text_sections(config)):
        for key in keys:
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
    found = _decoder_like(stacks)
    counts = {prefix: _count_of(prefix, stacks, config) for prefix in found}
    exact = {prefix: run for prefix, run in found.items() if run == counts[prefix]}
    longer = {prefix: count for prefix, run in found.items() if (count := counts[prefix]) is not None and run >= count}
    open_ended = {prefix: run for prefix, run in found.items() if counts[prefix] is None}
    found = exact or longer or open_ended
    found = {prefix: run for prefix, run in found.items() if not TOWER.search(prefix)} or found
    if not found or _are_ambiguous(found):
        return None
    chosen = next(iter(found))
    return LayerStack(chosen, found[chosen]) if found[chosen] > 0 else None


def missing_layers(stacks: Mapping[str, int], config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The number of layers that the config says and the weights have, where these have fewer; otherwise None."""
    found = _decoder_like(stacks)
    if _are_ambiguous(found):
        return None
    short = [(count, run) for prefix, run in found.items() if (count := _count_of(prefix, stacks, config) or 0) > run]
    if found and len(short) == len(found):
        return max(short, key=lambda pair: pair[1])
    if not found and (wanted := layer_count(config) or 0) > 0:
        return wanted, 0
    encoders = {encoder for prefix in found if (encoder := _encoder_of(prefix, stacks))}
    wanted = layer_count(config, ENCODER_COUNT_KEYS) or 0
    longest = max((stacks[prefix] for prefix in encoders), default=wanted)
    return (wanted, longest) if wanted > longest else None


def _decoder_like(stacks: Mapping[str, int]) -> dict[str, int]:
    """The stacks with a known name, in the order of `STACK_PREFIXES`; all stacks where none has one.

    In an encoder-decoder only the decoder's; a tower is none, such as the codec of MusicGen.
    """
    halves = {prefix: run for prefix, run in stacks.items() if _encoder_of(prefix, stacks)}
    stacks = {prefix: run for prefix, run in halves.items() if not TOWER.search(prefix)} or stacks
    known = {prefix: stacks[prefix] for prefix in STACK_PREFIXES if prefix in stacks}
    return known or {prefix: run for prefix, run in stacks.items() if run}


def _are_ambiguous(stacks: Mapping[str, int]) -> bool:
    return len(stacks) > 1 and stacks.keys().isdisjoint(STACK_PREFIXES)


def _encoder_of(prefix: str, stacks: Mapping[str, int]) -> str | None:
    """The encoder stack of an encoder-decoder, given its decoder stack; otherwise None.

    The longest, where convolutions before the layers are numbered too.
    """
    dotted = f".{prefix}."
    decoder = re.search(r"\.(?:text_)?decoder\.", dotted)
    if not decoder:
        return None
    encoder = (dotted[: decoder.start()] + decoder[0].replace("decoder", "encoder")).removeprefix(".")
    halves = (other for other, run in stacks.items() if run and f"{other}.".startswith(encoder))
    return max(halves, key=lambda other: stacks[other], default=None)


def _count_of(prefix: str, stacks: Mapping[str, int], config: Mapping[str, Any]) -> int | None:
    """The number of layers that the config says a stack has, or None where it does not say."""
    for half, keys in (("decoder", DECODER_COUNT_KEYS), ("encoder", ENCODER_COUNT_KEYS)):
        if half in re.split(r"[._]", prefix) and (count := layer_count(config, keys)) is not None:
            return count
    count = layer_count(config)
    encoder = _encoder_of(prefix, stacks)
    counts_encoder = encoder is not None and count == stacks[encoder] != stacks[prefix]
    return None if counts_encoder else count


def _run_from_zero(numbers: set[int]) -> int:
    return next(k for k in range(len(numbers) + 1) if k not in numbers)


def group_names(names: Iterable[str]) -> Iterator[str]:
    """Names that differ in numbers only, as one: `model.layers.*.mlp.up_proj.weight (32 tensors)`."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)].append(name)
    for group, members in groups.items():
        yield members[0] if len(members) == 1 else f"{group} ({len(members)} tensors)"
