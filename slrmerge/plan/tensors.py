"""Each output tensor's sources, or why it cannot have them.

The output has exactly the post-trained side's names: whatever is not asked for is copied, whatever is missing refused.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Literal

from slrmerge.blend import DTYPES
from slrmerge.checkpoint import DTYPE_BITS, FLOATING, Checkpoint, TensorInfo, quantisation_config, quantised_groups
from slrmerge.errors import PlanError, Problem, raise_all
from slrmerge.plan.model import Kind, PlannedTensor

DTYPE_NAMES = {name: dtype for dtype, name in DTYPES.items()}
"""A recipe's dtypes in safetensors' words."""

DERIVED_SUFFIXES = ("rotary_emb.inv_freq", "attn.masked_bias", "attention.masked_bias")
"""Constants that old checkpoints store and newer ones compute; taken from whichever side has them."""

INPUT_EMBEDDING_SUFFIXES = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
"""What a tied head (`tie_word_embeddings`) is stored as."""

_HEAD = "lm_head.weight"


class TensorPlanner:
    """Plans tensors one by one and gathers, by reason, the names that cannot be planned."""

    def __init__(
        self,
        pretrained: Checkpoint,
        posttrained: Checkpoint,
        dtype: str | None,
        *,
        blend: Literal["linear", "slerp"] = "linear",
    ) -> None:
        self._blend: Kind = "slerp" if blend == "slerp" else "blend"
        self.pretrained = pretrained
        self.posttrained = posttrained
        self.dtype = DTYPE_NAMES[dtype] if dtype else None
        self.refused: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.notes: dict[str, list[str]] = defaultdict(list)
        self._quantised_pre = quantised_groups(pretrained.items())
        self._quantised_post = quantised_groups(posttrained.items())
        self._quantised_alike = quantisation_config(pretrained.config) == quantisation_config(posttrained.config)

    def plan(self, alphas: Mapping[str, float]) -> tuple[list[PlannedTensor], list[Problem], list[str]]:
        """Every tensor with its alpha → planned tensors, problems and notes."""
        planned = [tensor for name, alpha in alphas.items() if (tensor := self._plan_one(name, alpha))]
        self._check_quantised_modules(alphas)
        self._check_left_behind(alphas)
        if self.dtype and self._quantised_post:
            self._refuse(
                "is quantised, and a packed weight has no other dtype",
                "leave out `dtype`",
                next(iter(self._quantised_post)),
            )
        problems = [
            Problem(where, what, remedy) for (what, remedy), names in self.refused.items() for where in summarise(names)
        ]
        return planned, problems, [f"{what}: {_some(names)}" for what, names in self.notes.items()]

    def _plan_one(self, name: str, alpha: float) -> PlannedTensor | None:
        post = self.posttrained[name]
        if alpha == 0:
            return self._from_one(name, post, 0.0, posttrained=name, source=post)
        twin = self._twin(name)
        if twin is None:
            if name.endswith(DERIVED_SUFFIXES):
                return self._from_one(name, post, 0.0, posttrained=name, source=post)
            return self._refuse(
                "is not in the pre-trained checkpoint", "give it alpha: 0 under `tensors` to keep it post-trained", name
            )
        pre = self.pretrained[twin]
        if pre.shape != post.shape:
            return self._refuse(
                f"has shape {list(pre.shape)} pre-trained and {list(post.shape)} post-trained",
                "give it alpha: 0 under `tensors` to keep it post-trained",
                name,
            )
        if name in self._quantised_post or twin in self._quantised_pre:
            return self._plan_quantised(name, alpha, twin, pre, post)
        if post.dtype not in FLOATING or pre.dtype not in FLOATING:
            if alpha < 1:
                self.notes["not floating, copied from the post-trained side"].append(name)
                return self._from_one(name, post, 0.0, posttrained=name, source=post)
            if pre.dtype != post.dtype:
                return self._refuse(
                    f"is {pre.dtype} pre-trained and {post.dtype} post-trained",
                    "give it alpha: 0 under `tensors` to keep it post-trained",
                    name,
                )
        if alpha == 1:
            return self._from_one(name, post, 1.0, pretrained=twin, source=pre)
        return PlannedTensor(name, self._output(post), alpha, self._blend, twin, name)

    def _plan_quantised(
        self, name: str, alpha: float, twin: str, pre: TensorInfo, post: TensorInfo
    ) -> PlannedTensor | None:
        if alpha != 1:
            return self._refuse(
                "is quantised, and a blend of packed weights is nonsense", "merge the unquantised models", name
            )
        alike = name in self._quantised_post and twin in self._quantised_pre and pre.dtype == post.dtype
        if not (alike and self._quantised_alike):
            return self._refuse("is not quantised alike on both sides", "merge two models quantised the same way", name)
        return PlannedTensor(name, post, 1.0, "copy", twin, None)

    def _from_one(
        self,
        name: str,
        post: TensorInfo,
        alpha: float,
        *,
        source: TensorInfo,
        pretrained: str | None = None,
        posttrained: str | None = None,
    ) -> PlannedTensor:
        output = self._output(post)
        kind: Kind = "copy" if source.dtype == output.dtype else "cast"
        if kind == "cast":
            rounding = "" if DTYPE_BITS[source.dtype] < DTYPE_BITS[output.dtype] else ", rounded to nearest even"
            self.notes[f"cast from {source.dtype} to {output.dtype}{rounding}"].append(name)
        return PlannedTensor(name, output, alpha, kind, pretrained, posttrained)

    def _output(self, post: TensorInfo) -> TensorInfo:
        """The tensor as it will be: post-trained shape, output dtype; its place is not known yet."""
        if self.dtype is None or post.dtype not in FLOATING:
            return post
        return TensorInfo(self.dtype, post.shape, (0, prod(post.shape) * DTYPE_BITS[self.dtype] // 8))

    def _twin(self, name: str) -> str | None:
        """The pre-trained tensor that corresponds to `name`: its namesake, or what a tied head is stored as."""
        if name in self.pretrained:
            return name
        if name.endswith(_HEAD) and self.pretrained.config.get("tie_word_embeddings"):
            prefix = name.removesuffix(_HEAD)
            for candidate in self.pretrained.weight_map:
                if candidate.startswith(prefix) and candidate.endswith(INPUT_EMBEDDING_SUFFIXES):
                    self.notes[f"the pre-trained head is tied, read from {candidate}"].append(name)
                    return candidate
        return None

    def _check_quantised_modules(self, alphas: Mapping[str, float]) -> None:
        """A quantised module's tensors are one value: they cannot come from different sides."""
        of_module: dict[str, set[float]] = defaultdict(set)
        for name, module in self._quantised_post.items():
            if name in alphas:
                of_module[module].add(alphas[name])
        for module, found in of_module.items():
            if len(found) > 1:
                self._refuse(
                    "is quantised, and the recipe takes its tensors from different sides",
                    "give the whole module one alpha",
                    module,
                )

    def _check_left_behind(self, alphas: Mapping[str, float]) -> None:
        """A restored layer must be the whole pre-trained layer, not the part that post-training kept."""
        stack = self.posttrained.stack
        touched = {place[0] for name, alpha in alphas.items() if alpha and stack and (place := stack.locate(name))}
        for name in self.pretrained.weight_map:
            if name in self.posttrained or name.endswith(DERIVED_SUFFIXES):
                continue
            place = stack.locate(name) if stack else None
            if place and place[0] in touched:
                self._refuse(
                    "is in the pre-trained layer, and the post-trained checkpoint has no such tensor",
                    "these two are not the same architecture",
                    name,
                )
            elif not place and any(alphas.values()):
                self.notes["only in the pre-trained checkpoint, left out"].append(name)

    def _refuse(self, what: str, remedy: str, *names: str) -> PlannedTensor | None:
        """Keep `names` for the error that lists them all; what they would have been planned as is None."""
        self.refused[what, remedy].extend(names)
        return None


def plan_choices(
    choices: Iterable[tuple[str, float]], pretrained: Checkpoint, posttrained: Checkpoint, *, dtype: str | None
) -> dict[tuple[str, float], PlannedTensor]:
    """Tensors at alphas, one tensor maybe at several: (name, alpha) → what a merge would write for it.

    Raises PlanError with everything that cannot be planned.
    """
    names: dict[float, list[str]] = defaultdict(list)
    for name, alpha in choices:
        names[alpha].append(name)
    planned: dict[tuple[str, float], PlannedTensor] = {}
    problems: dict[Problem, None] = {}
    for alpha, wanted in sorted(names.items()):
        tensors, found, _ = TensorPlanner(pretrained, posttrained, dtype).plan(dict.fromkeys(sorted(wanted), alpha))
        planned |= {(tensor.name, alpha): tensor for tensor in tensors}
        problems |= dict.fromkeys(found)
    raise_all(problems, PlanError)
    return planned


def _some(names: list[str]) -> str:
    """Names for a note: all families of a few, of many the first."""
    families = list(summarise(names))
    return "; ".join(families) if len(families) <= 3 else f"{len(names):,} tensors, among them {families[0]}"


def summarise(names: Iterable[str]) -> Iterator[str]:
    """Names that differ in numbers only, as one line each: `model.layers.*.mlp.up_proj.weight (32 tensors)`."""
    families: dict[str, list[str]] = defaultdict(list)
    for name in names:
        families[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)].append(name)
    for family, members in families.items():
        yield members[0] if len(members) == 1 else f"{family} ({len(members)} tensors)"
