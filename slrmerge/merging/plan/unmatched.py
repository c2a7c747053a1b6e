"""Tensors that only one side has: refused wherever they would matter, each kind of reason once."""

import re
from collections.abc import Mapping

from slrmerge.checkpoint.buffers import is_constant
from slrmerge.checkpoint.fused import fusion
from slrmerge.checkpoint.layers import split_layer
from slrmerge.checkpoint.pair import ModelPair
from slrmerge.merging.plan.refusals import ANOTHER_MODEL, KEEP, QUANTIZED_ALIKE, Notes, Refusals

CONSTANT = "computed from the config, {} the post-trained side"
"""A note on tensors that follow from the config."""

_LEFT_OUT = "only in the pre-trained checkpoint, left out"
_LEFT_OUT_TIED = f"{_LEFT_OUT}, as its config ties it to {{}} (transformers 5 does so only where the two are equal)"

_TIE = "set tie_word_embeddings: true in its config if its embedding serves as the head; otherwise "
_SAVE_ALIKE = (
    "load both with transformers 5 and save each with `save_pretrained(FOLDER, save_original_format=False)`; "
    "if their tensors still have other names, name the model that it was trained from"
)
_LORA = re.compile(r"\.(?:lora_[A-Za-z_]+|base_layer)\.")


def refuse_unmatched(pair: ModelPair, alphas: Mapping[str, float], refused: Refusals, notes: Notes) -> None:
    """Refuse what has no counterpart, and note what is left out."""
    only_post, only_pre = _only_posttrained(pair, alphas), _only_pretrained(pair, alphas, notes)
    found_pre = set(map(fusion, only_pre))
    fused = {
        what: "post-trained" if is_fused else "pre-trained"
        for what, is_fused in filter(None, map(fusion, only_post))
        if (what, not is_fused) in found_pre
    }
    is_one_type = pair.pretrained.config.get("model_type") == pair.posttrained.config.get("model_type")
    renamed = _SAVE_ALIKE if is_one_type else ANOTHER_MODEL
    pre, post = pair.quantization.modules
    pre_modules, post_modules = set(pre.values()), set(post.values())
    for name in only_post:
        if module := _module_of(name, post, pre_modules):
            _refuse_quantized(module, pair, refused)
        elif not _refuse_fused(name, fused, "post-trained", refused, renamed):
            may_be_renamed = only_pre or pair.correspondence.differing_layers
            _refuse_posttrained(name, pair, refused, renamed if may_be_renamed else ANOTHER_MODEL)
    for name in only_pre:
        if module := _module_of(name, pre, post_modules):
            _refuse_quantized(module, pair, refused)
        elif not _refuse_fused(name, fused, "pre-trained", refused, renamed):
            what = "is in a pre-trained layer, but not in the post-trained checkpoint"
            refused.add(name, "different-architectures", what, renamed if only_post else ANOTHER_MODEL)


def _only_posttrained(pair: ModelPair, alphas: Mapping[str, float]) -> list[str]:
    """Post-trained tensors that would be restored or blended, and have no counterpart."""
    names, post = pair.correspondence, pair.posttrained
    return [
        name
        for name, alpha in alphas.items()
        if alpha
        and name not in names.twins
        and not (is_constant(name, post[name], post.config) or names.missing_part(name))
    ]


def _only_pretrained(pair: ModelPair, alphas: Mapping[str, float], notes: Notes) -> list[str]:
    """Pre-trained tensors of layers that would be restored or blended, and have no counterpart; others are noted."""
    if not any(alphas.values()):
        return []
    names, pre = pair.correspondence, pair.pretrained
    pre_stack, post_stack = names.stacks
    layers = {place[0] for name, alpha in alphas.items() if alpha and post_stack and (place := post_stack.locate(name))}
    twins = set(names.twins.values())
    taken = {twin for name, twin in names.twins.items() if alphas.get(name)}
    groups = names.pretrained_embeddings.groups
    tied = {name: one for group in groups for one in taken.intersection(group) for name in group}
    found = []
    for name in pre:
        if name in twins:
            continue
        if is_constant(name, pre[name], pre.config):
            notes.add(CONSTANT.format("not in"), name)
        elif pre_stack and (place := pre_stack.locate(name)):
            found += [name] if place[0] in layers else []
        elif not (names.differing_layers and pre.stack):
            notes.add(_LEFT_OUT_TIED.format(tied[name]) if name in tied else _LEFT_OUT, name)
    return found


def _module_of(name: str, own: Mapping[str, str], others: set[str]) -> str | None:
    """The quantized module of a tensor that only one side has; `own` are that side's modules, `others` the other's."""
    return own.get(name) or next((each for each in (name, name.rpartition(".")[0]) if each in others), None)


def _refuse_quantized(module: str, pair: ModelPair, refused: Refusals) -> None:
    pre, post = pair.quantization.modules
    if pre and post:
        what = "is not quantized in the same way on both sides"
    else:
        what = f"is quantized on the {'post-trained' if post else 'pre-trained'} side only"
    refused.add(module, "different-quantization", what, f"{QUANTIZED_ALIKE}, or neither")


def _refuse_fused(name: str, fused: Mapping[str, str], side: str, refused: Refusals, remedy: str) -> bool:
    """Whether a tensor is fused on one side only; reported by the names of the fused side."""
    found = fusion(name)
    if found is None or found[0] not in fused:
        return False
    if fused[found[0]] == side:
        what = f"{found[0]} are fused on the {side} side only"
        refused.add(name, "fused-differently", what, remedy)
    return True


def _refuse_posttrained(name: str, pair: ModelPair, refused: Refusals, remedy: str) -> None:
    """Refuse a post-trained tensor that has no counterpart; `remedy` is what to do about one in a layer."""
    stack, names = pair.stack, pair.correspondence
    what = "is not in the pre-trained checkpoint"
    if _LORA.search(name):
        what = "belongs to a LoRA that is not merged into the weights"
        refused.add(name, "lora-not-merged", what, "merge it first (PEFT merge_and_unload)")
    elif differing := names.differing_layers:  # the reason for tensors outside the layers too
        what = f"has no layers {differing[1]}.* like the post-trained model"
        what += f"; its own are {differing[0]}.*" if differing[0] else ""
        refused.add(str(pair.pretrained), "different-layers", what, remedy)
    elif stack.locate(name) if stack else split_layer(name):
        refused.add(name, "not-in-pretrained", what, remedy)
    elif name == names.embeddings.head:
        what += ", whose config does not tie its head to its embedding"
        refused.add(name, "not-in-pretrained", what, _TIE + KEEP)
    else:
        refused.add(name, "not-in-pretrained", what, KEEP if names.is_new_module(name) else ANOTHER_MODEL)
