"""Pairs of GGUF files: quantized tensors are copied as they are, and only floating ones can be blended.

The output is the post-trained side's files with some tensors overwritten, so key-values, types and offsets are theirs.
"""

from collections.abc import Iterator, Mapping

from slrmerge.checkpoint.gguf import GgufCheckpoint, differing_values
from slrmerge.checkpoint.gguf_header import QUANTIZED
from slrmerge.checkpoint.header import FLOATING, TensorInfo
from slrmerge.checkpoint.layers import group_names
from slrmerge.checkpoint.pair import ModelPair
from slrmerge.errors import Problem
from slrmerge.merging.plan.model import PlannedTensor
from slrmerge.merging.plan.refusals import ALSO_THE_HEAD, ANOTHER_MODEL, KEEP, NO_SUCH_PART, Notes, Refusals
from slrmerge.merging.plan.tensors import PlannedTensors
from slrmerge.recipe.alphas import TensorAlphas
from slrmerge.recipe.load import AnyRecipe
from slrmerge.recipe.model import DEFAULT_SHARD_BYTES

DERIVED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Constants of the post-trained side's context length, which its key-values go with."""

_HEAD_KEYS = ("head_count", "head_count_kv", "key_length")
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_ORIGINALS = "merge the original checkpoints, and convert the result"
_CONVERT_ALIKE = "convert both models with the same --outtype"
_SAME_RELEASE = "convert both models by the same release of the converter, or name the model that it was trained from"
_QUANTIZE_ALIKE = "quantize both models by the same command, both with an importance matrix or both without"


def plan_gguf_tensors(recipe: AnyRecipe, pair: ModelPair, alphas: TensorAlphas) -> PlannedTensors:
    """Plan every tensor of a GGUF pair at its alpha; problems include keys of the recipe that have no meaning here."""
    pre, post = pair.pretrained, pair.posttrained
    assert isinstance(pre, GgufCheckpoint)
    assert isinstance(post, GgufCheckpoint)
    problems = list(_recipe_problems(recipe))
    if pre.architecture != post.architecture:
        what = f"is {pre.architecture}, {post} is {post.architecture}"
        remedy = "name the model that it was trained from"
        return PlannedTensors([], [*problems, Problem("different-architectures", str(pre), what, remedy)], [])
    planned: list[PlannedTensor] = []
    refused, kept = Refusals(), Notes()
    for name, alpha in alphas.items():
        is_new = bool(alpha) and name not in pre and name not in DERIVED
        if is_new and (part := pair.correspondence.missing_part(name)):
            kept.add(NO_SUCH_PART.format(part), name)
            alpha = 0.0
        found = _plan_tensor(name, alpha, alphas.blend, pre, post)
        if isinstance(found, PlannedTensor):
            planned.append(found)
        else:
            refused.add(name, *found)
    _refuse_unmatched(pair, alphas, refused)
    _refuse_other_heads(pre, post, alphas, refused)
    return PlannedTensors(planned, problems + refused.problems(), [*_notes(pre, post, alphas), *kept.lines()])


def _plan_tensor(
    name: str, alpha: float, blend: str, pre: Mapping[str, TensorInfo], post: GgufCheckpoint
) -> PlannedTensor | tuple[str, str, str]:
    """Where a tensor comes from, or why it cannot: code, reason and remedy."""
    info = post[name]
    if alpha == 0 or name in DERIVED or (alpha < 1 and info.dtype not in QUANTIZED | FLOATING):
        return PlannedTensor(name, info, 0.0, "copy", None, name)
    twin = _EMBEDDING if name == _HEAD and name not in pre else name
    is_in_layer = post.stack and post.stack.locate(name)
    if twin not in pre:
        return "not-in-pretrained", "is not in the pre-trained checkpoint", _SAME_RELEASE if is_in_layer else KEEP
    if pre[twin].shape != info.shape:
        what = f"has shape {list(pre[twin].shape)} pre-trained and {list(info.shape)} post-trained"
        return "different-shapes", what, ANOTHER_MODEL if is_in_layer else KEEP
    types = {pre[twin].dtype, info.dtype}
    if alpha < 1 and types & QUANTIZED:
        return "quantized-blend", "is quantized and cannot be blended", _ORIGINALS
    if len(types) > 1:
        what = f"is {pre[twin].dtype} pre-trained and {info.dtype} post-trained"
        return "different-types", what, _QUANTIZE_ALIKE if types & QUANTIZED else _CONVERT_ALIKE
    if alpha == 1:
        return PlannedTensor(name, info, 1.0, "copy", twin, None)
    return PlannedTensor(name, info, alpha, blend, twin, name)


def _recipe_problems(recipe: AnyRecipe) -> Iterator[Problem]:
    """Keys of a recipe that a merge of GGUF files cannot follow."""
    if recipe.is_mergekit:
        what = "is a mergekit config, which names tensors as safetensors do"
        yield Problem("gguf-mergekit", recipe.place("$"), what, "write a recipe for GGUF files")
    as_many = "the output has as many GGUF files as the post-trained side"
    same_shape = "the embeddings of GGUF files are blended only where they have the same shape"
    for key, default, code, what in (
        ("dtype", None, "gguf-dtype", "the tensors of GGUF files keep their types"),
        ("max_shard_size", DEFAULT_SHARD_BYTES, "gguf-shard-size", as_many),
        ("vocabulary", "same", "gguf-vocabulary", same_shape),
        ("tokenizer", "posttrained", "gguf-tokenizer", "the tokenizer is in the post-trained side's GGUF file"),
    ):
        if getattr(recipe, key) != default:
            yield Problem(code, recipe.place(f"$.{key}"), what, "leave it out")


def _refuse_unmatched(pair: ModelPair, alphas: TensorAlphas, refused: Refusals) -> None:
    """Refuse to leave out pre-trained tensors without which what is restored would not compute what it did."""
    stack = pair.stack
    touched = {place[0] for name, alpha in alphas.items() if alpha and stack and (place := stack.locate(name))}
    for name in pair.pretrained:
        if name not in pair.posttrained and stack and (place := stack.locate(name)) and place[0] in touched:
            what = "is in a pre-trained layer, but not in the post-trained file"
            refused.add(name, "different-architectures", what, _SAME_RELEASE)
    if _HEAD in pair.pretrained and _HEAD not in pair.posttrained and alphas.get(_EMBEDDING):
        refused.add(_EMBEDDING, "tied-differently", ALSO_THE_HEAD, KEEP)


def _refuse_other_heads(
    pre: GgufCheckpoint, post: GgufCheckpoint, alphas: Mapping[str, float], refused: Refusals
) -> None:
    """Layers of equal shapes that are cut into other attention heads do not fit, whatever the shapes say."""
    for key in _HEAD_KEYS if any(alphas.values()) else ():
        own, other = (side.key_values.get(f"{post.architecture}.attention.{key}") for side in (pre, post))
        if own is not None and other is not None and own != other:
            what = f"{key} is {own} pre-trained and {other} post-trained"
            refused.add(str(pre), "different-heads", what, ANOTHER_MODEL)


def _notes(pre: GgufCheckpoint, post: GgufCheckpoint, alphas: TensorAlphas) -> Iterator[str]:
    differing = list(differing_values(pre, post))
    if differing:
        yield f"key-values differ (pre- and post-trained), the post-trained ones are used: {', '.join(differing)}"
    constants = [name for name in DERIVED if (name in pre) != (name in post)]
    if constants:
        yield f"only one side has {', '.join(constants)}: rotary embeddings are those of the post-trained side"
    if _HEAD in post and _HEAD not in pre and alphas[_HEAD]:
        yield f"the pre-trained head is tied, read from {_EMBEDDING}: {_HEAD}"
    others = [name for name in pre if name not in post and name not in DERIVED]
    if others and any(alphas.values()):
        yield f"only in the pre-trained file, left out: {', '.join(group_names(others))}"
