"""Which pre-trained tensor each post-trained one was trained from, whatever prefixes the names have.

Tensors in layers correspond by layer and by the name inside it, those outside by their names without prefixes. What
could be matched in two ways, or could mean something else, is not matched.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.embeddings import Embeddings, are_halves, find_embeddings, is_vocabulary_tensor, synonym
from slrmerge.checkpoint.layers import TOWER, LayerStack, split_layer

K = TypeVar("K", bound=Hashable)

_WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, Lightning, FSDP and activation checkpointing insert anywhere in a name."""

_CONTAINERS = frozenset({
    "model", "transformer", "language_model", "language", "text_model", "llm", "backbone", "auto_model", "thinker",
    "base_model", "module",
    "gpt_neox", "bert", "roberta", "distilbert", "electra", "albert", "deberta", "mpnet", "esm",
})  # fmt: skip
"""Modules that only contain the decoder, and that some checkpoints of a model have in their names and others lack."""

_DRAFT = re.compile(r"(?:^|[._])mtp[._]")
"""Modules that predict further tokens, where they are not layers past the decoder's, as in DeepSeek-V3."""

_OTHER_PART = re.compile("encoder|decoder|vision|visual|image|video|audio|speech|talker|draft|mtp")
"""Modules that are something else than the decoder, although their layers may look the same."""


@dataclass(frozen=True)
class Correspondence:
    """`twins` maps post-trained names to pre-trained ones.

    `by_tie` are those of them that correspond because one side's head is its embedding. `embeddings` are the
    post-trained side's, with its head; `pretrained_embeddings` the other's. `note` says how the names differ;
    `differing_layers` are the prefixes of stacks that could not be matched, pre-trained first; `stacks` are those that
    were.
    """

    twins: Mapping[str, str]
    by_tie: frozenset[str]
    embeddings: Embeddings
    pretrained_embeddings: Embeddings
    note: str
    differing_layers: tuple[str, str] | None
    stacks: tuple[LayerStack | None, LayerStack | None]
    keys: tuple[Mapping[str, str], Mapping[str, str]] = field(repr=False)
    """The names outside the layers of both sides, the pre-trained first → the same without prefixes."""

    @property
    def tied(self) -> list[tuple[str, ...]]:
        """Groups of post-trained names that are one tensor."""
        return self.embeddings.groups

    @property
    def untied_head(self) -> str | None:
        """The pre-trained head, where only the post-trained side ties its own to the embedding."""
        own = self.pretrained_embeddings
        return own.head if self.embeddings.is_tied and not own.is_tied else None

    def missing_part(self, name: str) -> str:
        """What a post-trained tensor around the decoder belongs to that the pre-trained side lacks entirely.

        A "tower" for images or audio, the "draft layers" that predict further tokens, or another "module", unless the
        pre-trained side may have it under another name; otherwise empty.
        """
        if part := self._part(1, name):
            return part if part not in self._pretrained_parts else ""
        is_head = name == self.embeddings.head
        return "module" if self._all_matched and self.is_new_module(name) and not is_head else ""

    @cached_property
    def _all_matched(self) -> bool:
        """Whether the layers and every pre-trained tensor outside them have a twin, but for a head."""
        twins = set(self.twins.values())
        return all(self.stacks) and all(
            name in twins or is_vocabulary_tensor(key) for name, key in self.keys[0].items()
        )

    @cached_property
    def _pretrained_parts(self) -> set[str]:
        return {self._part(0, name) for name in self.keys[0]}

    def _part(self, side: int, name: str) -> str:
        key, stack = self.keys[side].get(name, ""), self.stacks[side]
        if TOWER.search(key):
            return "tower"
        is_past = key and stack and (place := split_layer(name)) and place[0] == stack.prefix
        return "draft layers" if is_past or _DRAFT.search(key) else ""

    def is_vocabulary(self, name: str) -> bool:
        """Whether a post-trained tensor has a row for every token: an embedding, the head, or the head's bias."""
        return is_vocabulary_tensor(self.keys[1].get(name, ""))

    def is_new_module(self, name: str) -> bool:
        """Whether a post-trained tensor is outside the layers, in a module that the pre-trained side lacks."""
        pre, post = self.keys
        module = f"{post[name].partition('.')[0]}." if name in post else ""
        return bool(module) and not any(key.startswith(module) for key in pre.values())


def correspond(pre: Checkpoint, post: Checkpoint) -> Correspondence:
    """Match the tensors of two checkpoints by their names and configs."""
    post_stack, pre_stack = post.stack, _counterpart(pre, post)
    differing = (pre.stack.prefix if pre.stack else "", post_stack.prefix) if post_stack and not pre_stack else None
    twins: dict[str, str] = {}
    roots: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    if pre_stack and post_stack and _clean(pre_stack.prefix) != _clean(post_stack.prefix):
        roots = _roots(pre_stack, post_stack)
        twins = _match(pre, post, _inside(pre_stack), _inside(post_stack))
    else:
        left = post if not (differing and post_stack) else [name for name in post if not post_stack.locate(name)]
        if any(map(_is_unclean, pre)) or any(map(_is_unclean, post)):
            twins = _match(pre, left, _clean, _clean)
        else:
            twins = {name: name for name in left if name in pre}
    outside = pre_stack or (pre.stack if post_stack else None)
    keys = (_outside(pre, outside, roots[0]), _outside(post, post_stack, roots[1]))
    taken = set(twins.values())
    left_pre = [name for name in keys[0] if name not in taken]
    left_post = [name for name in keys[1] if name not in twins]
    twins |= _match(left_pre, left_post, keys[0].__getitem__, keys[1].__getitem__)
    embeddings = (find_embeddings(pre, _by_key(keys[0])), find_embeddings(post, _by_key(keys[1])))
    twins |= _synonyms(pre, post, twins, keys, embeddings)
    by_tie = _tied_twins(pre, post, twins, keys, embeddings)
    final = twins
    if by_tie:
        final = {name: twin for name in post if (twin := by_tie.get(name) or twins.get(name))}
    return Correspondence(
        final,
        frozenset(by_tie),
        embeddings[1],
        embeddings[0],
        _describe(twins, pre_stack, post_stack),
        differing,
        (pre_stack, post_stack),
        keys,
    )


def embeddings_of(checkpoint: Checkpoint) -> Embeddings:
    """The token embeddings and the head of a checkpoint by itself."""
    return find_embeddings(checkpoint, names_outside_layers(checkpoint))


def names_outside_layers(checkpoint: Checkpoint) -> dict[str, str]:
    """The tensors of a checkpoint outside its layers, by their names without prefixes."""
    return _by_key(_outside(checkpoint, checkpoint.stack, ()))


def without_prefixes(name: str) -> str:
    """A name outside the layers without wrappers and without the modules that contain the decoder."""
    return _without_containers(_clean(name), 2).replace("vision_tower.vision_model.", "vision_tower.")


def _counterpart(pre: Checkpoint, post: Checkpoint) -> LayerStack | None:
    """The pre-trained stack with the post-trained side's layers, or None where there is none for certain."""
    stack, own = post.stack, pre.stack
    if stack is None:
        return None
    if own and (own.prefix == stack.prefix or (stack.prefix not in pre.numbered_stacks and _same_layers(own, stack))):
        return own
    candidates = [LayerStack(prefix, run) for prefix, run in pre.numbered_stacks.items() if run >= stack.count]
    named = [candidate for candidate in candidates if candidate.prefix == stack.prefix]
    alike = named or [candidate for candidate in candidates if own is None and _same_layers(candidate, stack)]
    return LayerStack(alike[0].prefix, stack.count) if len(alike) == 1 else None


def _same_layers(first: LayerStack, second: LayerStack) -> bool:
    """Whether two prefixes differ only in modules that contain the decoder, or by one module that a side lacks."""
    short, long = sorted((_without_containers(_clean(stack.prefix)) for stack in (first, second)), key=len)
    module, _, rest = long.partition(".")
    return short == long or (short == _without_containers(rest) and not _OTHER_PART.search(module))


def _clean(name: str) -> str:
    """A name without wrappers, and with today's name of a norm that BERT's first checkpoints call gamma and beta."""
    if not _is_unclean(name):
        return name
    name = _WRAPPER.sub("", name)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _is_unclean(name: str) -> bool:
    """Whether a name may have wrappers, or an old norm's end; quick, as it is asked of every name."""
    is_wrapped = "_orig_mod." in name or "_forward_module." in name or "_wrapped_module." in name
    return is_wrapped or name.endswith((".gamma", ".beta"))


def _without_containers(name: str, components: int = 1) -> str:
    """A clean name without the modules that contain the decoder; the last `components` stay."""
    parts = name.split(".")
    start = 0
    while start < len(parts) - components and parts[start] in _CONTAINERS:
        start += 1
    return ".".join(parts[start:])


def _roots(pre: LayerStack, post: LayerStack) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What comes before the part that both prefixes end with."""
    one, two = (_clean(stack.prefix).split(".") for stack in (pre, post))
    common = 0
    while common < min(len(one), len(two)) and one[-1 - common] == two[-1 - common]:
        common += 1
    return tuple(one[: len(one) - common]), tuple(two[: len(two) - common])


def _outside(checkpoint: Checkpoint, stack: LayerStack | None, root: tuple[str, ...]) -> dict[str, str]:
    """The names outside the layers, each with the name without prefixes."""

    def key(name: str) -> str:
        name = _clean(name)
        for module in root:  # the head of `wrapper.model.layers` may be `wrapper.lm_head`
            name = name.removeprefix(f"{module}.")
        return without_prefixes(name)

    return {name: key(name) for name in checkpoint if not (stack and stack.locate(name))}


def _inside(stack: LayerStack) -> Callable[[str], tuple[int, str] | None]:
    """The place of a tensor in a stack, without wrappers."""

    def key(name: str) -> tuple[int, str] | None:
        place = stack.locate(name)
        return (place[0], _clean(place[1])) if place else None

    return key


def _match(
    pre: Iterable[str], post: Iterable[str], pre_key: Callable[[str], Hashable], post_key: Callable[[str], Hashable]
) -> dict[str, str]:
    """Names with the same key; a key that several names of one side have matches none."""
    by_key = _unique(pre, pre_key)
    found = ((name, by_key.get(key)) for key, name in _unique(post, post_key).items())
    return {name: twin for name, twin in found if twin is not None}


def _unique(names: Iterable[str], key: Callable[[str], Hashable]) -> dict[Hashable, str]:
    return _by_key({name: found for name in names if (found := key(name)) is not None})


def _by_key(keys: Mapping[str, K]) -> dict[K, str]:
    """Names by their keys, without the keys that several of them have."""
    counts = Counter(keys.values())
    return {key: name for name, key in keys.items() if counts[key] == 1}


def _synonyms(
    pre: Checkpoint,
    post: Checkpoint,
    twins: Mapping[str, str],
    keys: tuple[Mapping[str, str], Mapping[str, str]],
    embeddings: tuple[Embeddings, Embeddings],
) -> dict[str, str]:
    """Twins of a head and of its bias that the two sides store under different names."""
    by_key = _by_key(keys[0])
    found = {name: by_key.get(synonym(key) or "") for name, key in keys[1].items()}
    if embeddings[1].head is not None:
        found[embeddings[1].head] = embeddings[0].head
    return {
        name: twin
        for name, twin in found.items()
        if twin is not None and name not in twins and pre[twin].shape[1:] == post[name].shape[1:]
    }


def _tied_twins(
    pre: Checkpoint,
    post: Checkpoint,
    twins: Mapping[str, str],
    keys: tuple[Mapping[str, str], Mapping[str, str]],
    embeddings: tuple[Embeddings, Embeddings],
) -> dict[str, str]:
    """Twins of embeddings and heads that the pre-trained side stores as another tensor."""
    found: dict[str, str | None] = {}
    own, (tokens, head) = embeddings[0], (embeddings[1].tokens, embeddings[1].head)
    for name in tokens:
        if name not in twins:
            if own.is_shared and own.token and are_halves(keys[0][own.token], keys[1][name]):
                found[name] = own.token
            elif not own.tokens and own.may_lack_one:
                found[name] = own.head
    if head is not None:
        if head not in twins and own.head is None and own.may_lack_one:
            found[head] = own.token
        if embeddings[1].is_tied and not own.is_tied and (token := embeddings[1].token) and token in twins:
            found[head] = twins[token]  # what serves as both was trained from the embedding
    return {
        name: twin for name, twin in found.items() if twin is not None and pre[twin].shape[1:] == post[name].shape[1:]
    }


def _describe(twins: Mapping[str, str], pre: LayerStack | None, post: LayerStack | None) -> str:
    """How the names of the two sides differ, in one line."""
    renamed = [(name, twin) for name, twin in twins.items() if name != twin]
    if not renamed:
        return ""
    if pre and post and pre.prefix != post.prefix:
        names = f"{pre.prefix}.* in the pre-trained checkpoint, {post.prefix}.* in the post-trained one"
        return f"the layers are called {names}; matched by layer and name"
    (name, twin), *others = renamed
    more = f", and {len(others):,} more" if others else ""
    return f"matched under another name: {name} is {twin} in the pre-trained checkpoint{more}"
