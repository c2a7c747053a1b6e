"""Notes on a plan: where the output does not compute what one would expect of the two models."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from slrmerge.checkpoint.buffers import is_constant
from slrmerge.checkpoint.config_defaults import config_defaults
from slrmerge.checkpoint.config_differences import Difference
from slrmerge.checkpoint.layers import TOWER
from slrmerge.checkpoint.pair import ModelPair

_SHARED_BLOCKS = {"zamba": "shared_transf", "zamba2": "shared_transformer"}
"""Architectures whose layers share a block of weights, and its name."""

_RUNS_SHARED_BLOCK = "mamba_decoder."
"""What layers that run such a block have besides."""

_NUMBERED = re.compile(r"(.+)\.(\d{1,9})(\.\w+)?")
"""A tensor in a list: `attn_queries.3`, or `gates.3.weight`."""


def model_notes(pair: ModelPair, alphas: Mapping[str, float], differences: Iterable[Difference]) -> Iterator[str]:
    """Notes on a merge of `pair`, whose configs have these `differences`."""
    yield from _config_notes(differences)
    yield from _head_notes(pair)
    yield from _shared_block_notes(pair, alphas)
    yield from _list_notes(pair, alphas)
    yield from _idle_notes(pair, alphas)


def _config_notes(differences: Iterable[Difference]) -> Iterator[str]:
    """Differences with which restored layers do not compute what they were trained to."""
    described = "; ".join(map(str, differences))
    if described:
        yield f"the configs differ, restored layers run with the post-trained values: {described}"


def _head_notes(pair: ModelPair) -> Iterator[str]:
    """A language model without a head: loaders initialize it at random where the config does not tie it."""
    post = pair.posttrained
    embeddings, architectures = pair.correspondence.embeddings, post.config.get("architectures")
    is_language_model = isinstance(architectures, list) and any(
        str(each).endswith(("ForCausalLM", "LMHeadModel")) for each in architectures
    )
    is_default_known = str(post.config.get("model_type")) in config_defaults()
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


def _list_notes(pair: ModelPair, alphas: Mapping[str, float]) -> Iterator[str]:
    """Lists outside the layers with one tensor for each of them, which rules for layers do not reach."""
    layers = range(pair.stack.count if pair.stack else 0)
    _, outside = pair.correspondence.keys
    lists: dict[str, dict[str, int]] = defaultdict(dict)
    for name in outside:
        if (place := _NUMBERED.fullmatch(name)) and not TOWER.search(name):
            lists[place[1]][name] = int(place[2])
    for prefix, numbers in lists.items():
        is_one_each = len(layers) > 1 and sorted(numbers.values()) == [*layers]
        if is_one_each and len({alpha for name, alpha in alphas.items() if name in numbers or name not in outside}) > 1:
            yield (
                f"{prefix}.* are numbered like the layers and may belong to them, but are outside of them: only "
                "rules under `tensors` decide about each"
            )


def _idle_notes(pair: ModelPair, alphas: Mapping[str, float]) -> Iterator[str]:
    """Rules without an effect, and weights that no rule reaches: those of sentence-transformers' other modules."""
    modules = [name for name in pair.posttrained.side_files if name.endswith((".safetensors", ".bin"))]
    pre, twins = pair.pretrained, pair.correspondence.twins
    left_out = pre.keys() - set(twins.values())
    if alphas and not any(alphas.values()):
        yield "nothing is taken from the pre-trained side: the output has the post-trained model's weights"
    elif modules:
        yield f"not in the model's own files, kept from the post-trained side whatever the rules: {', '.join(modules)}"
    elif (
        alphas
        and all(alpha == 1 for alpha in alphas.values())
        and alphas.keys() <= twins.keys()
        and all(is_constant(name, pre[name], pre.config) for name in left_out)
    ):
        yield "everything is taken from the pre-trained side: the output has the pre-trained model's weights"


def left_out_notes(pair: ModelPair) -> Iterator[str]:
    """Files beside the post-trained weights that are not copied."""
    names = pair.posttrained.left_out
    if names:
        others = f" and {len(names) - 8} more" if len(names) > 9 else ""
        shown = names if not others else names[:8]
        yield f"left out, beside the post-trained weights: {', '.join(shown)}{others}"
