"""What quantization allows a merge to take from the pre-trained side, decided for the whole pair."""

from collections import defaultdict
from collections.abc import Mapping

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.layers import LayerStack
from slrmerge.checkpoint.pair import ModelPair
from slrmerge.checkpoint.quantized import Quantization
from slrmerge.merging.plan.refusals import QUANTIZED_ALIKE, Refusals

_ALIKE_OR_NOT = f"{QUANTIZED_ALIKE}, or the unquantized ones"
_WHOLE_LAYERS = "restore whole layers with `restore`, or merge the unquantized models"


def refuse_quantized(pair: ModelPair, alphas: Mapping[str, float], refused: Refusals, *, casts: bool) -> None:
    """Refuse alphas for which one side is quantized, both differ, or the format is not known.

    `casts` says whether the recipe gives a dtype.
    """
    pre, post = pair.quantization
    touched = {name for name, alpha in alphas.items() if alpha}
    if _touches(pair.posttrained, post, pair.posttrained, touched) or _touches(
        pair.pretrained, pre, pair.posttrained, touched
    ):
        if post is not None and pre is None:
            what = f"the post-trained side is quantized{post.name}, the pre-trained side is not"
            return refused.add(str(pair.posttrained), "quantized-one-side", what, _ALIKE_OR_NOT)
        if pre is not None and post is None:
            what = f"the pre-trained side is quantized{pre.name}, the post-trained side is not"
            return refused.add(str(pair.pretrained), "quantized-one-side", what, "use the unquantized base (bf16)")
        if pre and post and (difference := pre.difference(post)):
            what = f"the two sides are quantized differently: {difference}"
            return refused.add(str(pair.pretrained), "different-quantization", what, _ALIKE_OR_NOT)
    if pair.quantization.unknown:
        _refuse_unknown(pair, pair.quantization.unknown, alphas, refused, casts=casts)
    return None


def refuse_split_modules(pair: ModelPair, alphas: Mapping[str, float], refused: Refusals, *, casts: bool) -> None:
    """Refuse to take apart what is one value in several tensors: a module, or a layer; and to cast it."""
    _, quantization = pair.quantization
    modules = quantization.modules if quantization else {}
    by_module: dict[str, set[float]] = defaultdict(set)
    for name, module in modules.items():
        if name in alphas:
            by_module[module].add(alphas[name])
    for module, found in by_module.items():
        if len(found) > 1:
            what = "is quantized, and its tensors would come from different sides"
            refused.add(module, "quantized-module-split", what, "give the whole module one alpha")
    if quantization and quantization.shares_scales and pair.stack:
        _refuse_split_layers(pair.stack, quantization, alphas, refused)
    if casts and modules:
        what = "is quantized and cannot be cast to another dtype"
        refused.add(next(iter(modules)), "quantized-cast", what, "leave out `dtype`")


def _refuse_split_layers(
    stack: LayerStack, quantization: Quantization, alphas: Mapping[str, float], refused: Refusals
) -> None:
    """Where the tensors of a layer share factors, such as one moved from weights to the norm before them."""
    by_layer: dict[int, set[float]] = defaultdict(set)
    quantized: set[int] = set()
    for name, alpha in alphas.items():
        if place := stack.locate(name):
            by_layer[place[0]].add(alpha)
            quantized |= {place[0]} if name in quantization.modules else set()
    split = sorted(layer for layer in quantized if by_layer[layer] not in ({0}, {1}))
    if split:
        what = f"is quantized{quantization.name} by a method with factors that the tensors of a layer share"
        more = f" and {len(split) - 1} more layers" if len(split) > 1 else ""
        refused.add(f"{stack.prefix}.{split[0]}{more}", "quantized-layer-split", what, _WHOLE_LAYERS)


def _touches(checkpoint: Checkpoint, quantization: Quantization | None, post: Checkpoint, touched: set[str]) -> bool:
    """Whether any of the post-trained tensors `touched` belongs to a quantized module of `checkpoint`."""
    if quantization is None:
        return False
    if quantization.unknown:
        return bool(touched)
    modules = {_place(checkpoint, module) for module in set(quantization.modules.values())}
    for name in touched:
        parts = _place(post, name).split(".")
        if any(".".join(parts[:end]) in modules for end in range(len(parts), 1, -1)):
            return True
    return False


def _place(checkpoint: Checkpoint, name: str) -> str:
    """The name of a tensor or a module without the prefix of the layer stack, which may differ between the sides."""
    place = checkpoint.stack.locate(name) if checkpoint.stack else None
    return f"{place[0]}.{place[1]}" if place else name


def _refuse_unknown(pair: ModelPair, why: str, alphas: Mapping[str, float], refused: Refusals, *, casts: bool) -> None:
    """Refuse everything but whole layers: packed values and their scales may be in any tensors of a layer."""
    code, is_in = "unknown-quantization", f"is in a model quantized in an unknown format ({why})"
    if casts:
        what = f"is quantized in an unknown format ({why})"
        refused.add(str(pair.posttrained), code, what, "leave out `dtype`")
    twins = pair.correspondence.twins
    stack, by_layer = pair.stack, defaultdict[int, dict[str, float]](dict)
    for name, alpha in alphas.items():
        place = stack.locate(name) if stack else None
        if 0 < alpha < 1:
            refused.add(name, code, f"{is_in} and cannot be blended", _WHOLE_LAYERS)
        elif place:
            by_layer[place[0]][name] = alpha
        elif alpha:
            what = f"{is_in} and cannot be restored: it is outside the layers"
            refused.add(name, code, what, _WHOLE_LAYERS)
    for members in by_layer.values():
        is_split = len(set(members.values())) > 1
        for name in (name for name, alpha in members.items() if alpha):
            pre, post = pair.pretrained.get(twins.get(name, "")), pair.posttrained[name]
            if is_split:
                refused.add(name, code, f"{is_in}; only part of its layer would be restored", _WHOLE_LAYERS)
            elif pre is not None and pre.dtype != post.dtype:
                what = f"{is_in}; it is {pre.dtype} pre-trained and {post.dtype} post-trained"
                refused.add(name, "different-quantization", what, _ALIKE_OR_NOT)
