"""What quantisation allows a merge to take from the pre-trained side, decided for the whole pair."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.pair import ModelPair
from slrmerge.checkpoint.quantised import Quantisation


class QuantisedPair(NamedTuple):
    """How each side is quantised; None where it is not."""

    pretrained: Quantisation | None
    posttrained: Quantisation | None

    @property
    def unknown(self) -> str:
        """Why the format of one side is not known, or empty."""
        return next((side.unknown for side in self if side and side.unknown), "")


class Refusal(NamedTuple):
    """A tensor or a checkpoint that cannot be merged, and why."""

    where: str
    code: str
    what: str
    remedy: str


_LIKE_BOTH = "merge two models quantised in the same way, or the unquantised ones"


def refuse_quantised(
    pair: ModelPair, quantised: QuantisedPair, alphas: Mapping[str, float], *, casts: bool
) -> Iterator[Refusal]:
    """Why these alphas cannot be merged: one side is quantised, both differ, or the format is not known.

    `casts` says whether the recipe gives a dtype.
    """
    pre, post = quantised
    touched = {name for name, alpha in alphas.items() if alpha}
    if not (pre or post):
        return
    if _touches(pair.posttrained, post, pair.posttrained, touched) or _touches(
        pair.pretrained, pre, pair.posttrained, touched
    ):
        if pre is None and post is not None:
            what = f"the post-trained side is quantised{post.name}, the pre-trained side is not"
            yield Refusal(str(pair.posttrained), "quantised-one-side", what, _LIKE_BOTH)
            return
        if pre is not None and post is None:
            what = f"the pre-trained side is quantised{pre.name}, the post-trained side is not"
            yield Refusal(str(pair.pretrained), "quantised-one-side", what, "use the unquantised base (bf16)")
            return
        if pre and post and (difference := pre.difference(post)):
            what = f"the two sides are quantised differently: {difference}"
            yield Refusal(str(pair.pretrained), "different-quantisation", what, _LIKE_BOTH)
            return
    if quantised.unknown:
        yield from _refuse_unknown(pair, quantised.unknown, alphas, casts=casts)


def _touches(checkpoint: Checkpoint, quantisation: Quantisation | None, post: Checkpoint, touched: set[str]) -> bool:
    """Whether any of the post-trained tensors `touched` belongs to a quantised module of `checkpoint`."""
    if quantisation is None:
        return False
    if quantisation.unknown:
        return bool(touched)
    modules = {_place(checkpoint, module) for module in set(quantisation.modules.values())}
    for name in touched:
        parts = _place(post, name).split(".")
        if any(".".join(parts[:end]) in modules for end in range(len(parts), 1, -1)):
            return True
    return False


def _place(checkpoint: Checkpoint, name: str) -> str:
    """The name of a tensor or a module without the prefix of the layer stack, which may differ between the sides."""
    place = checkpoint.stack.locate(name) if checkpoint.stack else None
    return f"{place[0]}.{place[1]}" if place else name


def _refuse_unknown(pair: ModelPair, why: str, alphas: Mapping[str, float], *, casts: bool) -> Iterator[Refusal]:
    """Everything but whole layers: packed values and their scales may be in any tensors of a layer."""
    code, whole = "unknown-quantisation", "restore whole layers with `restore`, or merge the unquantised models"
    is_in = f"is in a model quantised in an unknown format ({why})"
    if casts:
        yield Refusal(str(pair.posttrained), code, f"is quantised in an unknown format ({why})", "leave out `dtype`")
    twins = pair.correspondence.twins
    stack, by_layer = pair.stack, defaultdict[int, dict[str, float]](dict)
    for name, alpha in alphas.items():
        place = stack.locate(name) if stack else None
        if 0 < alpha < 1:
            yield Refusal(name, code, f"{is_in} and cannot be blended", whole)
        elif place:
            by_layer[place[0]][name] = alpha
        elif alpha:
            yield Refusal(name, code, f"{is_in} and cannot be restored: it is outside the layers", whole)
    for members in by_layer.values():
        if len(set(members.values())) > 1:
            what = f"{is_in}; only part of its layer would be restored"
            yield from (Refusal(name, code, what, whole) for name, alpha in members.items() if alpha)
            continue
        for name, alpha in members.items():
            pre, post = pair.pretrained.get(twins.get(name, "")), pair.posttrained[name]
            if alpha and pre is not None and pre.dtype != post.dtype:
                what = f"{is_in}; it is {pre.dtype} pre-trained and {post.dtype} post-trained"
                yield Refusal(name, "different-quantisation", what, _LIKE_BOTH)
