"""Where each output tensor comes from, or why it cannot.

The output has exactly the post-trained side's names. Tensors that one side lacks are refused, unless they follow from
the config or belong to a vision or audio tower.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import NamedTuple

from slrmerge.checkpoint.buffers import is_constant
from slrmerge.checkpoint.fused import fusion, is_regrouped
from slrmerge.checkpoint.header import DTYPE_BITS, FLOATING, TensorInfo
from slrmerge.checkpoint.layers import split_layer
from slrmerge.checkpoint.pair import ModelPair
from slrmerge.checkpoint.quantised import Quantisation
from slrmerge.errors import PlanError, Problem, raise_all
from slrmerge.merging.blend import DTYPES
from slrmerge.merging.plan.model import ADAPTER, PlannedTensor
from slrmerge.merging.plan.quantised import QuantisedPair, refuse_quantised

SAFETENSORS_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
"""A recipe's dtypes → safetensors' names."""

_KEEP = "keep it post-trained: give it alpha: 0 under `tensors`"
_ANOTHER_MODEL = "the two are not the same architecture: name the model that it was trained from"
_TIE = "set tie_word_embeddings: true in its config if its embedding serves as the head; otherwise "
_ROWS = "in a recipe, set `vocabulary: shared` to blend the rows that both sides have, or "
_LORA = re.compile(r"\.(?:lora_[A-Za-z_]+|base_layer)\.")
_CONSTANT = "computed from the config, {} the post-trained side"
_OUTSIDE_PAIR = "only in the pre-trained checkpoint, left out"


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

    def __init__(
        self, pair: ModelPair, dtype: str | None, *, blend: str = "linear", shares_vocabulary: bool = False
    ) -> None:
        self._pair = pair
        self._names = pair.correspondence
        self._blend = blend
        self._dtype = SAFETENSORS_DTYPES[dtype] if dtype else None
        self._shares_vocabulary = shares_vocabulary
        self._refused: dict[_Refusal, dict[str, None]] = defaultdict(dict)
        self._notes: dict[str, list[str]] = defaultdict(list)
        self._quantised = QuantisedPair(Quantisation.of(pair.pretrained), Quantisation.of(pair.posttrained))
        self._quantised_pre, self._quantised_post = (side.modules if side else {} for side in self._quantised)

    def plan(self, alphas: Mapping[str, float]) -> PlannedTensors:
        """Plan every tensor at its alpha."""
        for refusal in refuse_quantised(self._pair, self._quantised, alphas, casts=self._dtype is not None):
            self._refuse(*refusal)
        if self._refused:  # what else does not fit follows from this
            return PlannedTensors([], self._problems(), [])
        planned = [tensor for name, alpha in alphas.items() if (tensor := self._plan_one(name, alpha))]
        self._check_quantised_modules(alphas)
        self._check_quantised_layers(alphas)
        self._check_tied(alphas)
        self._check_unmatched(alphas)
        if self._dtype and self._quantised_post:
            remedy, name = "leave out `dtype`", next(iter(self._quantised_post))
            self._refuse(name, "quantised-cast", "is quantised and cannot be cast to another dtype", remedy)
        notes = [f"{what}: {_some(names)}" for what, names in self._notes.items()]
        if self._names.note and any(alphas.values()):
            notes.insert(0, self._names.note)
        return PlannedTensors(planned, self._problems(), notes)

    def _problems(self) -> list[Problem]:
        return [
            Problem(refusal.code, where, refusal.what, refusal.remedy)
            for refusal, names in self._refused.items()
            for where in group_names(names)
        ]

    def _plan_one(self, name: str, alpha: float) -> PlannedTensor | None:
        post = self._pair.posttrained[name]
        if alpha == 0:
            return self._from_posttrained(name, post)
        twin = self._names.twins.get(name)
        if twin is None:
            return self._plan_unmatched(name, post)
        pre = self._pair.pretrained[twin]
        is_packed = self._quantised.unknown and post.dtype not in FLOATING
        if is_packed or name in self._quantised_post or twin in self._quantised_pre:
            return self._plan_quantised(name, alpha, twin, pre, post)
        rows: int | None = None
        if not is_regrouped(pre.shape, post.shape):
            if is_constant(name, post, self._pair.posttrained.config):
                return self._keep(name, post, _CONSTANT.format("kept from"))
            rows = self._shared_rows(name, pre, post)
            if rows is None:
                return None
        if name in self._names.by_tie:
            self._notes[f"tied in the pre-trained checkpoint, read from {twin}"].append(name)
        if post.dtype not in FLOATING or pre.dtype not in FLOATING:
            if alpha < 1:
                self._notes["not floating, copied from the post-trained side"].append(name)
                return self._from_posttrained(name, post)
            if pre.dtype != post.dtype:
                if is_constant(name, post, self._pair.posttrained.config):
                    return self._keep(name, post, _CONSTANT.format("kept from"))
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
            return self._keep(name, post, _CONSTANT.format("kept from"))
        if self._names.is_tower(name):
            return self._keep(name, post, "the pre-trained model has no such tower, kept from the post-trained side")
        return None  # refused with the others that only one side has

    def _keep(self, name: str, post: TensorInfo, note: str) -> PlannedTensor:
        self._notes[note].append(name)
        return self._from_posttrained(name, post)

    def _shared_rows(self, name: str, pre: TensorInfo, post: TensorInfo) -> int | None:
        """How many rows of a tensor of another shape both vocabularies have; None where it is refused."""
        what = f"has shape {list(pre.shape)} pre-trained and {list(post.shape)} post-trained"
        if not (self._names.is_vocabulary(name) and pre.shape[1:] == post.shape[1:]):
            self._refuse(name, "different-shapes", what, self._remedy(name))
            return None
        if not self._shares_vocabulary:
            self._refuse(name, "different-vocabularies", what, _ROWS + _KEEP)
            return None
        tokens, difference = self._pair.vocabulary
        rows = min(pre.shape[0], post.shape[0], *(() if tokens is None else (tokens,)))
        if difference is not None and difference < rows:
            what = f"has rows of other tokens on either side: id {difference} is another token"
            self._refuse(name, "different-tokens", what, f"leave out `vocabulary`, and {_KEEP}")
            return None
        unchecked = "" if tokens else " (the tokens are not compared: a side has no tokenizer.json)"
        self._notes[
            f"{rows:,} of {post.shape[0]:,} rows are in both vocabularies, the others are post-trained{unchecked}"
        ].append(name)
        return rows

    def _remedy(self, name: str) -> str:
        """What to do about a tensor that does not fit: only outside the layers one can be kept by itself."""
        stack = self._pair.stack
        return _ANOTHER_MODEL if stack and stack.locate(name) else _KEEP

    def _plan_quantised(
        self, name: str, alpha: float, twin: str, pre: TensorInfo, post: TensorInfo
    ) -> PlannedTensor | None:
        if alpha != 1:
            what = "is quantised and cannot be blended"
            return self._refuse(name, "quantised-blend", what, "merge the unquantised models")
        is_one_sided = (name in self._quantised_post) != (twin in self._quantised_pre)
        if is_one_sided or pre.dtype != post.dtype:
            what = "is not quantised in the same way on both sides"
            return self._refuse(name, "different-quantisation", what, "merge two models quantised in the same way")
        if pre.shape == post.shape:
            return PlannedTensor(name, post, 1.0, "copy", twin, None)
        if not len(pre.shape) == len(post.shape) == 1:  # lists may have any length
            what = f"has shape {list(pre.shape)} pre-trained and {list(post.shape)} post-trained"
            return self._refuse(name, "different-shapes", what, "merge two models quantised in the same way")
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
        self._notes[f"cast from {source.dtype} to {output.dtype}{rounding}"].append(name)
        return "cast"

    def _output(self, post: TensorInfo) -> TensorInfo:
        """The output tensor: post-trained shape, output dtype; `begin` is where the post-trained tensor is, or 0."""
        if self._dtype in (None, post.dtype) or post.dtype not in FLOATING:
            return post
        return TensorInfo(self._dtype, post.shape, prod(post.shape) * DTYPE_BITS[self._dtype] // 8, 0)

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

    def _check_quantised_layers(self, alphas: Mapping[str, float]) -> None:
        """Where factors were moved between the tensors of a layer, such as from weights to the norm before them."""
        quantisation, stack = self._quantised.posttrained, self._pair.stack
        if not (quantisation and quantisation.moves_scales and stack):
            return
        by_layer: dict[int, set[float]] = defaultdict(set)
        quantised: set[int] = set()
        for name, alpha in alphas.items():
            if place := stack.locate(name):
                by_layer[place[0]].add(alpha)
                quantised |= {place[0]} if name in self._quantised_post else set()
        split = sorted(layer for layer in quantised if by_layer[layer] not in ({0}, {1}))
        if split:
            what = f"is quantised{quantisation.name} by a method that may move factors between the tensors of a layer"
            remedy = "restore whole layers with `restore`, or merge the unquantised models"
            more = f" and {len(split) - 1} more layers" if len(split) > 1 else ""
            self._refuse(f"{stack.prefix}.{split[0]}{more}", "quantised-layer-split", what, remedy)

    def _check_tied(self, alphas: Mapping[str, float]) -> None:
        """Tensors that are one for a loader cannot become two."""
        for group in self._names.tied:
            found = {alphas[name]: name for name in group if name in alphas}
            if len(found) > 1:
                what = (
                    f"are tied, and would have different alphas: {', '.join(f'{alpha:g}' for alpha in sorted(found))}"
                )
                self._refuse(" and ".join(sorted(found.values())), "tied-tensors", what, "give them one alpha")
            elif any(found):
                (alpha,) = found
                self._notes[f"tied, so treated as one tensor, at alpha {alpha:g}"].append(" and ".join(group))

    def _check_unmatched(self, alphas: Mapping[str, float]) -> None:
        """Refuse tensors that only one side has, wherever they would matter; each kind of reason once."""
        pre, post = self._pair.pretrained, self._pair.posttrained
        pre_stack, post_stack = self._names.stacks
        layers = {
            place[0] for name, alpha in alphas.items() if alpha and post_stack and (place := post_stack.locate(name))
        }
        only_post = [
            name
            for name, alpha in alphas.items()
            if alpha
            and name not in self._names.twins
            and not (is_constant(name, post[name], post.config) or self._names.is_tower(name))
        ]
        twins = set(self._names.twins.values())
        left = [name for name in pre if name not in twins]
        only_pre: list[str] = []
        for name in left if any(alphas.values()) else ():
            if is_constant(name, pre[name], pre.config):
                self._notes[_CONSTANT.format("not in")].append(name)
            elif pre_stack and (place := pre_stack.locate(name)):
                only_pre += [name] if place[0] in layers else []
            elif not (self._names.differing_layers and self._pair.pretrained.stack):
                self._notes[_OUTSIDE_PAIR].append(name)
        found_pre = set(map(fusion, only_pre))
        fused = {
            what: "post-trained" if is_fused else "pre-trained"
            for what, is_fused in filter(None, map(fusion, only_post))
            if (what, not is_fused) in found_pre
        }
        modules_pre, modules_post = set(self._quantised_pre.values()), set(self._quantised_post.values())
        for name in only_post:
            if module := _module_of(name, self._quantised_post, modules_pre):
                self._refuse_quantised(module)
            elif not self._refuse_fused(name, fused, "post-trained"):
                self._refuse_post(name)
        for name in only_pre:
            if module := _module_of(name, self._quantised_pre, modules_post):
                self._refuse_quantised(module)
            elif not self._refuse_fused(name, fused, "pre-trained"):
                what = "is in a pre-trained layer, but not in the post-trained checkpoint"
                self._refuse(name, "different-architectures", what, _ANOTHER_MODEL)

    def _refuse_quantised(self, module: str) -> None:
        side = "post-trained" if self._quantised_post else "pre-trained"
        if self._quantised_post and self._quantised_pre:
            what = "is not quantised in the same way on both sides"
        else:
            what = f"is quantised on the {side} side only"
        self._refuse(module, "different-quantisation", what, "merge two models quantised in the same way, or neither")

    def _refuse_fused(self, name: str, fused: Mapping[str, str], side: str) -> bool:
        """Whether a tensor is fused, or not, unlike on the other side; reported by the names of the fused side."""
        found = fusion(name)
        if found is None or found[0] not in fused:
            return False
        if fused[found[0]] == side:
            what = f"{found[0]} are fused on the {side} side only"
            self._refuse(name, "fused-differently", what, "save both checkpoints alike, with the same program")
        return True

    def _refuse_post(self, name: str) -> None:
        """Refuse a post-trained tensor that has no counterpart, with what can be done about it."""
        stack = self._pair.stack
        what = "is not in the pre-trained checkpoint"
        if _LORA.search(name):
            what = "belongs to a LoRA that is not merged into the weights"
            self._refuse(name, "lora-not-merged", what, "merge it first (PEFT merge_and_unload)")
        elif differing := self._names.differing_layers:  # the reason for tensors outside the layers too
            what = f"has no layers {differing[1]}.* like the post-trained model"
            what += f"; its own are {differing[0]}.*" if differing[0] else ""
            self._refuse(str(self._pair.pretrained), "different-layers", what, _ANOTHER_MODEL)
        elif stack.locate(name) if stack else split_layer(name):
            self._refuse(name, "not-in-pretrained", what, _ANOTHER_MODEL)
        elif name == self._names.head:
            what += ", whose config says that its head is not tied to its embedding"
            self._refuse(name, "not-in-pretrained", what, _TIE + _KEEP)
        else:
            self._refuse(name, "not-in-pretrained", what, _KEEP if self._names.is_new_module(name) else _ANOTHER_MODEL)

    def _refuse(self, name: str, code: str, what: str, remedy: str) -> PlannedTensor | None:
        """Keep `name` for the error that lists all refusals; it is planned as None."""
        self._refused[_Refusal(code, what, remedy)][name] = None
        return None


def _module_of(name: str, own: Mapping[str, str], others: set[str]) -> str | None:
    """The quantised module of a tensor that only one side has; `own` are that side's modules, `others` the other's."""
    return own.get(name) or next((each for each in (name, name.rpartition(".")[0]) if each in others), None)


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
