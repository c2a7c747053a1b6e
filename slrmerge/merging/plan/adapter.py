"""A merge with an adapter, written as an adapter: restored modules are left out, blended ones are scaled."""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from slrmerge.checkpoint.adapter import AdapterCheckpoint
from slrmerge.checkpoint.adapter_fit import Delta
from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.header import DTYPE_BITS, TensorInfo
from slrmerge.checkpoint.location import Repository
from slrmerge.checkpoint.pair import ModelPair
from slrmerge.checkpoint.safetensors import SafetensorsCheckpoint
from slrmerge.checkpoint.side_files import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, is_tokenizer_file
from slrmerge.errors import PlanError, Problem, raise_all
from slrmerge.merging.plan.model import SCALED, MergePlan, PlannedFile, PlannedShard, PlannedTensor

_WIDE = "F32"
"""The dtype of scaled factors: rounded to 16 bits they would differ from the whole model by more than its rounding."""


@dataclass(frozen=True, repr=False)
class AdapterFile(SafetensorsCheckpoint):
    """The tensors in an adapter's own file; everything else is that of the adapter on its base."""

    whole: AdapterCheckpoint = field(kw_only=True)

    @property
    def locations(self) -> tuple[Path, ...]:
        return self.whole.locations

    @property
    def identity(self) -> tuple[object, ...]:
        return self.whole.identity

    def fingerprint(self) -> dict[str, Any]:
        return self.whole.fingerprint()

    def provenance(self, files: Collection[str]) -> dict[str, Any]:
        return self.whole.provenance(files)

    @property
    def reference(self) -> str:
        return self.whole.reference

    @property
    def model_name(self) -> str:
        return self.whole.model_name

    def __str__(self) -> str:
        return str(self.whole)


def as_adapter(plan: MergePlan) -> MergePlan:
    """The plan of an adapter that gives, on its base, the model that `plan` writes.

    Raises PlanError where there is none: the base is not the pre-trained side, a blend is not linear, nothing is left.
    """
    raise_all(_why_not(plan), PlanError)
    post = plan.pair.posttrained
    assert isinstance(post, AdapterCheckpoint)
    whole = {tensor.name: tensor for tensor in plan.tensors()}
    deltas = {name: update.delta for name, update in post.updates.items() if update.delta}
    planned = {tensor.name: tensor for tensor in _tensors(plan.pair.pretrained, post, whole)}
    problems = [*_row_problems(deltas, whole), *_bias_problems(deltas, planned)]
    if not planned:
        what, remedy = "leaves nothing of the adapter", "use the base itself, or restore fewer layers"
        problems.append(Problem("adapter-empty", plan.recipe.place("$"), what, remedy))
    raise_all(problems, PlanError)
    own = AdapterFile(post.folder, post.config, {ADAPTER_WEIGHTS_NAME: post.adapter.shard}, post.side_files, whole=post)
    ordered = sorted(planned.values(), key=lambda tensor: (-DTYPE_BITS[tensor.info.dtype], tensor.name))
    restored = [delta.left for name, delta in deltas.items() if delta.right is not None and whole[name].alpha == 1]
    config = PlannedFile(ADAPTER_CONFIG_NAME, content=_config(post, restored))
    tokenizer = [
        PlannedFile(name, file)
        for name, file in post.side_files.items()
        if is_tokenizer_file(name) and file != post.base.side_files.get(name)
    ]
    return replace(
        plan,
        pair=ModelPair(plan.pair.pretrained, own),
        shards=(PlannedShard(ADAPTER_WEIGHTS_NAME, tuple(ordered)),),
        files=tuple(sorted((config, *tokenizer), key=lambda file: file.name)),
        resharded="an adapter is written",
        whole=plan,
    )


def _why_not(plan: MergePlan) -> Iterator[Problem]:
    pre, post = plan.pair.pretrained, plan.pair.posttrained
    remedy = "write the whole model: leave out the option that asks for an adapter"
    if not isinstance(post, AdapterCheckpoint):
        yield Problem("not-an-adapter", str(post), "is not an adapter, so the merge cannot be written as one", remedy)
        return
    if not post.is_on(pre):
        what = f"is an adapter on {post.base}, so a merge with {pre} cannot be written as one"
        yield Problem("adapter-on-another-base", str(post), what, remedy)
    if plan.recipe.blend != "linear" and any(0 < tensor.alpha < 1 for tensor in plan.tensors()):
        what = f"a blend by {plan.recipe.blend} cannot be written as an adapter, only a linear one"
        yield Problem("adapter-blend", plan.recipe.place("$.blend"), what, remedy)
    if plan.recipe.dtype:
        what = "an adapter does not change the dtype of its base"
        yield Problem("adapter-dtype", plan.recipe.place("$.dtype"), what, "leave out `dtype`")
    if plan.recipe.tokenizer == "pretrained":
        what = "an adapter has no tokenizer of its base"
        yield Problem("adapter-tokenizer", plan.recipe.place("$.tokenizer"), what, "leave out `tokenizer`")


def _tensors(pre: Checkpoint, post: AdapterCheckpoint, whole: Mapping[str, PlannedTensor]) -> Iterator[PlannedTensor]:
    """What is left of the adapter's tensors: those stored whole, and the factors of modules that are not restored."""
    for name, update in post.updates.items():
        if update.value is not None:
            yield _value(pre, post, update.value, whole[name])
        if update.delta is not None and whole[name].rows is None and whole[name].alpha < 1:
            yield from _factors(post, update.delta, whole[name].alpha)


def _row_problems(deltas: Mapping[str, Delta], whole: Mapping[str, PlannedTensor]) -> Iterator[Problem]:
    for name in deltas:
        if whole[name].rows is not None:
            what = "has rows that only the adapter has, which a scaled B · A cannot leave as they are"
            yield Problem("adapter-rows", name, what, "write the whole model, or leave out `vocabulary`")


def _bias_problems(deltas: Mapping[str, Delta], planned: Mapping[str, PlannedTensor]) -> Iterator[Problem]:
    for name, delta in deltas.items():
        is_bias = delta.right is None and delta.left in planned
        if is_bias and delta.left.removesuffix("bias") + "weight" not in planned:
            what, remedy = "would be kept without the weight of its module", "restore both, or write the whole model"
            yield Problem("adapter-bias-alone", name, what, remedy)


def _value(pre: Checkpoint, post: AdapterCheckpoint, stored: str, whole: PlannedTensor) -> PlannedTensor:
    """A tensor that the adapter stores whole, as the `whole` model has it. peft requires restored ones too."""
    info = post.adapter.shard.tensors[stored]
    if whole.pretrained is None:
        return PlannedTensor(stored, info, 0.0, "copy", None, stored)
    if whole.rows is not None:
        return PlannedTensor(stored, info, whole.alpha, whole.kind, whole.pretrained, stored, whole.rows)
    if whole.alpha == 1:
        return PlannedTensor(stored, pre[whole.pretrained], 1.0, "copy", whole.pretrained, None)
    return PlannedTensor(stored, info, whole.alpha, "linear", whole.pretrained, stored)


def _factors(post: AdapterCheckpoint, delta: Delta, alpha: float) -> Iterator[PlannedTensor]:
    """The factors of a delta, one of them scaled by 1 - alpha: the same factor of a module at every alpha."""
    for number, stored in enumerate((delta.left, delta.right)):
        if stored is None:
            continue
        info = post.adapter.shard.tensors[stored]
        is_scaled = alpha > 0 and number == (1 if delta.transposed else 0)  # B, or an embedding's
        if is_scaled and info.dtype in ("F16", "BF16"):
            info = TensorInfo(_WIDE, info.shape, prod(info.shape) * DTYPE_BITS[_WIDE] // 8, 0)
        yield PlannedTensor(stored, info, alpha, SCALED if is_scaled else "copy", None, stored)


def _config(post: AdapterCheckpoint, restored: Iterable[str]) -> bytes:
    """The adapter's config without the modules of the factors in `restored`; a base in a folder is absolute."""
    content: dict[str, Any] = dict(post.adapter.content)
    modules = [re.sub(r"^base_model\.model\.|\.lora_(embedding_)?[AB](\..*)?$", "", name) for name in restored]
    if modules:
        before = content.get("exclude_modules")
        if isinstance(before, str):
            content["exclude_modules"] = "|".join([f"({before})", *map(re.escape, modules)])
        else:
            content["exclude_modules"] = [*(before or ()), *modules]
    content["base_model_name_or_path"] = _base_name(post, post.adapter.config.base_model_name_or_path)
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _base_name(post: AdapterCheckpoint, named: str | None) -> str:
    """How the output names its base: a repository as before, a folder by its absolute path."""
    is_folder = Path(post.base.reference).is_absolute()
    is_repository = named and Repository.parse(named) and not Path(named).exists()
    return named if named and is_repository else post.base.reference if is_folder else post.base.model_name
