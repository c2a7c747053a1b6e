"""Where each output tensor comes from, or why it cannot.

The output has exactly the post-trained side's names. Tensors that one side lacks are refused, unless they follow from
the config or belong to a part around the decoder, such as a vision tower.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import prod
from typing import NamedTuple

from slrmerge.checkpoint.buffers import is_constant
from slrmerge.checkpoint.fused import is_regrouped
from slrmerge.checkpoint.header import DTYPE_BITS, FLOATING, SAFETENSORS_DTYPES, TensorInfo
from slrmerge.checkpoint.pair import ModelPair
from slrmerge.errors import PlanError, Problem, raise_all
from slrmerge.merging.plan.model import ADAPTER, PlannedTensor
from slrmerge.merging.plan.quantized import refuse_quantized, refuse_split_modules
from slrmerge.merging.plan.refusals import (
    ALSO_THE_HEAD,
    ANOTHER_MODEL,
    KEEP,
    NO_SUCH_PART,
    QUANTIZED_ALIKE,
    Notes,
    Refusals,
)
from slrmerge.merging.plan.unmatched import CONSTANT, refuse_unmatched

_ROWS = "in a recipe, set `vocabulary: shared` to blend the rows that both sides have, or "


class PlannedTensors(NamedTuple):
    """Planned tensors, why others cannot be planned, and notes for the reader."""

    tensors: list[PlannedTensor]
    problems: list[Problem]
    notes: list[str]


class TensorPlanner:
    """Plans tensors one by one, and collects why others cannot be planned."""

    def __init__(
        self, pair: ModelPair, dtype: str | None, *, blend: str = "linear", shares_vocabulary: bool = False
    ) -> None:
        self._pair = pair
        self._names = pair.correspondence
        self._blend = blend
        self._dtype = SAFETENSORS_DTYPES[dtype] if dtype else None
        self._shares_vocabulary = shares_vocabulary
        self._refused = Refusals()
        self._notes = Notes()
        self._quantized_pre, self._quantized_post = pair.quantization.modules

    def plan(self, alphas: Mapping[str, float]) -> PlannedTensors:
        """Plan every tensor at its alpha."""
        casts = self._dtype is not None
        refuse_quantized(self._pair, alphas, self._refused, casts=casts)
        if self._refused:  # what else does not fit follows from this
            return PlannedTensors([], self._refused.problems(), [])
        planned = [tensor for name, alpha in alphas.items() if (tensor := self._plan_one(name, alpha))]
        refuse_split_modules(self._pair, alphas, self._refused, casts=casts)
        self._check_tied(alphas)
        refuse_unmatched(self._pair, alphas, self._refused, self._notes)
        notes = self._notes.lines()
        if self._names.note and any(alphas.values()):
            notes.insert(0, self._names.note)
        return PlannedTensors(planned, self._refused.problems(), notes)

    def _plan_one(self, name: str, alpha: float) -> PlannedTensor | None:
        post = self._pair.posttrained[name]
        if alpha == 0:
            return self._from_posttrained(name, post)
        twin = self._names.twins.get(name)
        if twin is None:
            return self._plan_unmatched(name, post)
        pre = self._pair.pretrained[twin]
        is_packed = self._pair.quantization.unknown and post.dtype not in FLOATING
        if is_packed or name in self._quantized_post or twin in self._quantized_pre:
            return self._plan_quantized(name, alpha, twin, pre, post)
        rows: int | None = None
        if not is_regrouped(pre.shape, post.shape):
            if is_constant(name, post, self._pair.posttrained.config):
                return self._keep(name, post, CONSTANT.format("kept from"))
            rows = self._shared_rows(name, pre, post)
            if rows is None:
                return None
        if name in self._names.by_tie:
            self._notes.add(f"tied in the pre-trained checkpoint, read from {twin}", name)
        if post.dtype not in FLOATING or pre.dtype not in FLOATING:
            if alpha < 1:
                self._notes.add("not floating, copied from the post-trained side", name)
                return self._from_posttrained(name, post)
            if pre.dtype != post.dtype:
                if is_constant(name, post, self._pair.posttrained.config):
                    return self._keep(name, post, CONSTANT.format("kept from"))
                what = f"is {pre.dtype} pre-trained and {post.dtype} post-trained"
                return self._refuse(name, "different-dtypes", what, self._remedy(name))
        output = self._output(post)
        if rows is not None:
            kind = "cast" if alpha == 1 else self._blend
            return PlannedTensor(name, output, alpha, kind, twin, name, rows)
        if alpha < 1 and self._pair.posttrained.inherits(name, self._pair.pretrained) and name == twin:
            return self._from_posttrained(name, post)._replace(alpha=alpha)
        if alpha == 1:
            return PlannedTensor(name, output, 1.0, self._copy_or_cast(name, pre, output), twin, None)
        return PlannedTensor(name, output, alpha, self._blend, twin, name)

    def _plan_unmatched(self, name: str, post: TensorInfo) -> PlannedTensor | None:
        """A post-trained tensor that corresponds to no pre-trained one: kept where that is safe."""
        if is_constant(name, post, self._pair.posttrained.config):
            return self._keep(name, post, CONSTANT.format("kept from"))
        if part := self._names.missing_part(name):
            return self._keep(name, post, NO_SUCH_PART.format(part))
        return None  # refused with the others that only one side has

    def _keep(self, name: str, post: TensorInfo, note: str) -> PlannedTensor:
        self._notes.add(note, name)
        return self._from_posttrained(name, post)

    def _shared_rows(self, name: str, pre: TensorInfo, post: TensorInfo) -> int | None:
        """How many rows of a tensor of another shape both vocabularies have; None where it is refused."""
        what = f"has shape {list(pre.shape)} pre-trained and {list(post.shape)} post-trained"
        if not (self._names.is_vocabulary(name) and pre.shape[1:] == post.shape[1:]):
            self._refuse(name, "different-shapes", what, self._remedy(name))
            return None
        if not self._shares_vocabulary:
            self._refuse(name, "different-vocabularies", what, _ROWS + KEEP)
            return None
        tokens, difference = self._pair.vocabulary
        rows = min(pre.shape[0], post.shape[0], *(() if tokens is None else (tokens,)))
        if difference is not None and difference < rows:
            what = f"has rows of other tokens on either side: id {difference} is another token"
            self._refuse(name, "different-tokens", what, f"leave out `vocabulary`, and {KEEP}")
            return None
        unchecked = "" if tokens else " (the tokens are not compared: a side has no tokenizer.json)"
        of = f"{rows:,} of {post.shape[0]:,} rows"
        self._notes.add(f"{of} are in both vocabularies, the others are post-trained{unchecked}", name)
        return rows

    def _remedy(self, name: str) -> str:
        """What to do about a tensor that does not fit: only outside the layers one can be kept by itself."""
        stack = self._pair.stack
        return ANOTHER_MODEL if stack and stack.locate(name) else KEEP

    def _plan_quantized(
        self, name: str, alpha: float, twin: str, pre: TensorInfo, post: TensorInfo
    ) -> PlannedTensor | None:
        if alpha != 1:
            what = "is quantized and cannot be blended"
            return self._refuse(name, "quantized-blend", what, "merge the unquantized models")
        is_one_sided = (name in self._quantized_post) != (twin in self._quantized_pre)
        if is_one_sided or pre.dtype != post.dtype:
            what = "is not quantized in the same way on both sides"
            return self._refuse(name, "different-quantization", what, QUANTIZED_ALIKE)
        if pre.shape == post.shape:
            return PlannedTensor(name, post, 1.0, "copy", twin, None)
        if not len(pre.shape) == len(post.shape) == 1:  # lists may have any length
            what = f"has shape {list(pre.shape)} pre-trained and {list(post.shape)} post-trained"
            return self._refuse(name, "different-shapes", what, QUANTIZED_ALIKE)
        return PlannedTensor(name, pre, 1.0, "copy", twin, None)

    def _from_posttrained(self, name: str, post: TensorInfo) -> PlannedTensor:
        output = self._output(post)
        computed = name in self._pair.posttrained.computed
        kind = ADAPTER if computed else self._copy_or_cast(name, post, output)
        return PlannedTensor(name, output, 0.0, kind, None, name)

    def _copy_or_cast(self, name: str, source: TensorInfo, output: TensorInfo) -> str:
        if source.dtype == output.dtype:
            return "copy"
        rounding = "" if DTYPE_BITS[source.dtype] < DTYPE_BITS[output.dtype] else ", rounded to nearest even"
        self._notes.add(f"cast from {source.dtype} to {output.dtype}{rounding}", name)
        return "cast"

    def _output(self, post: TensorInfo) -> TensorInfo:
        """The output tensor: post-trained shape, output dtype; `begin` is where the post-trained tensor is, or 0."""
        if self._dtype in (None, post.dtype) or post.dtype not in FLOATING:
            return post
        return TensorInfo(self._dtype, post.shape, prod(post.shape) * DTYPE_BITS[self._dtype] // 8, 0)

    def _check_tied(self, alphas: Mapping[str, float]) -> None:
        """Tensors that are one for a loader cannot become two."""
        embedding = self._names.embeddings.token
        if self._names.untied_head and embedding and alphas.get(embedding):
            self._refuse(embedding, "tied-differently", ALSO_THE_HEAD, KEEP)
        for group in self._names.tied:
            found = {alphas[name]: name for name in group if name in alphas}
            if len(found) > 1:
                what = (
                    f"are tied, and would have different alphas: {', '.join(f'{alpha:g}' for alpha in sorted(found))}"
                )
                self._refuse(" and ".join(sorted(found.values())), "tied-tensors", what, "give them one alpha")
            elif any(found):
                (alpha,) = found
                self._notes.add(f"tied, so treated as one tensor, at alpha {alpha:g}", " and ".join(group))

    def _refuse(self, name: str, code: str, what: str, remedy: str) -> PlannedTensor | None:
        """Keep `name` for the error that lists all refusals; it is planned as None."""
        self._refused.add(name, code, what, remedy)
        return None


def plan_tensor_alphas(
    wanted: Iterable[tuple[str, float]], pair: ModelPair, *, dtype: str | None, shares_vocabulary: bool = False
) -> dict[tuple[str, float], PlannedTensor]:
    """Plan tensors, each maybe at several alphas: (name, alpha) → what a merge would write for it.

    Raises PlanError with everything that cannot be planned.
    """
    names: dict[float, list[str]] = defaultdict(list)
    for name, alpha in wanted:
        names[alpha].append(name)
    planned: dict[tuple[str, float], PlannedTensor] = {}
    problems: dict[Problem, None] = {}
    for alpha, at_alpha in sorted(names.items()):
        found = TensorPlanner(pair, dtype, shares_vocabulary=shares_vocabulary).plan(
            dict.fromkeys(sorted(at_alpha), alpha)
        )
        planned |= {(tensor.name, alpha): tensor for tensor in found.tensors}
        problems |= dict.fromkeys(found.problems)
    raise_all(problems, PlanError)
    return planned
