"""Where each output tensor comes from, or why it cannot.

The output has exactly the post-trained side's names. Tensors that one side lacks are refused.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import NamedTuple

from slrmerge.checkpoint.header import DTYPE_BITS, FLOATING, TensorInfo
from slrmerge.checkpoint.pair import ModelPair
from slrmerge.checkpoint.quantised import quantisation_config, quantised_groups
from slrmerge.errors import PlanError, Problem, raise_all
from slrmerge.merging.blend import DTYPES
from slrmerge.merging.plan.model import PlannedTensor

SAFETENSORS_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
"""A recipe's dtypes → safetensors' names."""

DERIVED_SUFFIXES = ("rotary_emb.inv_freq", "attn.masked_bias", "attention.masked_bias")
"""Constants that old checkpoints store and newer ones compute; taken from whichever side has them."""

INPUT_EMBEDDING_SUFFIXES = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
"""What a tied head (`tie_word_embeddings`) is stored as."""

_HEAD = "lm_head.weight"
_KEEP = "keep it post-trained: give it alpha: 0 under `tensors`"


class PlannedTensors(NamedTuple):
    """Planned tensors, why others cannot be planned, and notes for the reader."""

    tensors: list[PlannedTensor]
    problems: list[Problem]
    notes: list[str]


class _Refusal(NamedTuple):
    """Why tensors cannot be planned; the same refusal of several tensors is reported once."""

    code: str
    what: str
    remedy: str


class TensorPlanner:
    """Plans tensors one by one, and collects the names that cannot be planned by reason."""

    def __init__(self, pair: ModelPair, dtype: str | None, *, blend: str = "linear") -> None:
        self._pair = pair
        self._blend = blend
        self._dtype = SAFETENSORS_DTYPES[dtype] if dtype else None
        self._refused: dict[_Refusal, list[str]] = defaultdict(list)
        self._notes: dict[str, list[str]] = defaultdict(list)
        self._quantised_pre = quantised_groups(pair.pretrained.items())
        self._quantised_post = quantised_groups(pair.posttrained.items())
        self._same_quantisation = quantisation_config(pair.pretrained.config) == quantisation_config(
            pair.posttrained.config
        )

    def plan(self, alphas: Mapping[str, float]) -> PlannedTensors:
        """Plan every tensor at its alpha."""
        planned = [tensor for name, alpha in alphas.items() if (tensor := self._plan_one(name, alpha))]
        self._check_quantised_modules(alphas)
        self._check_left_out(alphas)
        if self._dtype and self._quantised_post:
            remedy, name = "leave out `dtype`", next(iter(self._quantised_post))
            self._refuse(name, "quantised-cast", "is quantised and cannot be cast to another dtype", remedy)
        problems = [
            Problem(refusal.code, where, refusal.what, refusal.remedy)
            for refusal, names in self._refused.items()
            for where in group_names(names)
        ]
        return PlannedTensors(planned, problems, [f"{what}: {_some(names)}" for what, names in self._notes.items()])

    def _plan_one(self, name: str, alpha: float) -> PlannedTensor | None:
        post = self._pair.posttrained[name]
        if alpha == 0:
            return self._from_posttrained(name, post)
        twin = self._twin(name)
        if twin is None:
            if name.endswith(DERIVED_SUFFIXES):
                return self._from_posttrained(name, post)
            return self._refuse(name, "not-in-pretrained", "is not in the pre-trained checkpoint", _KEEP)
        pre = self._pair.pretrained[twin]
        if pre.shape != post.shape:
            what = f"has shape {list(pre.shape)} pre-trained and {list(post.shape)} post-trained"
            return self._refuse(name, "different-shapes", what, _KEEP)
        if name in self._quantised_post or twin in self._quantised_pre:
            return self._plan_quantised(name, alpha, twin, pre, post)
        if post.dtype not in FLOATING or pre.dtype not in FLOATING:
            if alpha < 1:
                self._notes["not floating, copied from the post-trained side"].append(name)
                return self._from_posttrained(name, post)
            if pre.dtype != post.dtype:
                what = f"is {pre.dtype} pre-trained and {post.dtype} post-trained"
                return self._refuse(name, "different-dtypes", what, _KEEP)
        output = self._output(post)
        if alpha == 1:
            return PlannedTensor(name, output, 1.0, self._copy_or_cast(name, pre, output), twin, None)
        return PlannedTensor(name, output, alpha, self._blend, twin, name)

    def _plan_quantised(
        self, name: str, alpha: float, twin: str, pre: TensorInfo, post: TensorInfo
    ) -> PlannedTensor | None:
        if alpha != 1:
            what = "is quantised and cannot be blended"
            return self._refuse(name, "quantised-blend", what, "merge the unquantised models")
        same = name in self._quantised_post and twin in self._quantised_pre and pre.dtype == post.dtype
        if not (same and self._same_quantisation):
            what = "is not quantised in the same way on both sides"
            return self._refuse(name, "different-quantisation", what, "merge two models quantised in the same way")
        return PlannedTensor(name, post, 1.0, "copy", twin, None)

    def _from_posttrained(self, name: str, post: TensorInfo) -> PlannedTensor:
        output = self._output(post)
        return PlannedTensor(name, output, 0.0, self._copy_or_cast(name, post, output), None, name)

    def _copy_or_cast(self, name: str, source: TensorInfo, output: TensorInfo) -> str:
        if source.dtype == output.dtype:
            return "copy"
        rounding = "" if DTYPE_BITS[source.dtype] < DTYPE_BITS[output.dtype] else ", rounded to nearest even"
        self._notes[f"cast from {source.dtype} to {output.dtype}{rounding}"].append(name)
        return "cast"

    def _output(self, post: TensorInfo) -> TensorInfo:
        """The output tensor: post-trained shape, output dtype; `begin` is where the post-trained tensor is, or 0."""
        if self._dtype in (None, post.dtype) or post.dtype not in FLOATING:
            return post
        return TensorInfo(self._dtype, post.shape, prod(post.shape) * DTYPE_BITS[self._dtype] // 8, 0)

    def _twin(self, name: str) -> str | None:
        """The pre-trained tensor that corresponds to `name`: its namesake, or what a tied head is stored as."""
        pretrained = self._pair.pretrained
        if name in pretrained:
            return name
        if name.endswith(_HEAD) and pretrained.config.get("tie_word_embeddings"):
            prefix = name.removesuffix(_HEAD)
            for candidate in pretrained:
                if candidate.startswith(prefix) and candidate.endswith(INPUT_EMBEDDING_SUFFIXES):
                    self._notes[f"the pre-trained head is tied, read from {candidate}"].append(name)
                    return candidate
        return None

    def _check_quantised_modules(self, alphas: Mapping[str, float]) -> None:
        """A quantised module's tensors are one value: they cannot come from different sides."""
        by_module: dict[str, set[float]] = defaultdict(set)
        for name, module in self._quantised_post.items():
            if name in alphas:
                by_module[module].add(alphas[name])
        for module, found in by_module.items():
            if len(found) > 1:
                what = "is quantised, and its tensors would come from different sides"
                self._refuse(module, "quantised-module-split", what, "give the whole module one alpha")

    def _check_left_out(self, alphas: Mapping[str, float]) -> None:
        """A restored layer must be the whole pre-trained layer, not only what the post-trained side has of it."""
        stack = self._pair.stack
        touched = {place[0] for name, alpha in alphas.items() if alpha and stack and (place := stack.locate(name))}
        for name in self._pair.pretrained:
            if name in self._pair.posttrained or name.endswith(DERIVED_SUFFIXES):
                continue
            place = stack.locate(name) if stack else None
            if place and place[0] in touched:
                what = "is in a pre-trained layer, but not in the post-trained checkpoint"
                self._refuse(name, "different-architectures", what, "the two are not the same architecture")
            elif not place and any(alphas.values()):
                self._notes["only in the pre-trained checkpoint, left out"].append(name)

    def _refuse(self, name: str, code: str, what: str, remedy: str) -> PlannedTensor | None:
        """Keep `name` for the error that lists all refusals; it is planned as None."""
        self._refused[_Refusal(code, what, remedy)].append(name)
        return None


def plan_tensor_alphas(
    wanted: Iterable[tuple[str, float]], pair: ModelPair, *, dtype: str | None
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
        found = TensorPlanner(pair, dtype).plan(dict.fromkeys(sorted(at_alpha), alpha))
        planned |= {(tensor.name, alpha): tensor for tensor in found.tensors}
        problems |= dict.fromkeys(found.problems)
    raise_all(problems, PlanError)
    return planned


def _some(names: list[str]) -> str:
    """Names for a note: up to three groups, or the number of names and the first group."""
    groups = list(group_names(names))
    return "; ".join(groups) if len(groups) <= 3 else f"{len(names):,} tensors, among them {groups[0]}"


def group_names(names: Iterable[str]) -> Iterator[str]:
    """Names that differ in numbers only, as one: `model.layers.*.mlp.up_proj.weight (32 tensors)`."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)].append(name)
    for group, members in groups.items():
        yield members[0] if len(members) == 1 else f"{group} ({len(members)} tensors)"
