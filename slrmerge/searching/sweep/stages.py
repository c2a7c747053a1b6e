"""Which tensors of a checkpoint each stage of a sweep uses: the embedding, every layer, the head."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.quantized import quantized_groups
from slrmerge.errors import Problem, UnsupportedModelError, raise_all
from slrmerge.searching.sweep.architecture import QUANTIZED_REMEDY, unsupported
from slrmerge.searching.sweep.loading import Placement, WeightLoader, stored_dtype

_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "q_scale", "k_scale", "v_scale", "kv_scale")
"""Ends of names of tensors with which kernels round activations; dense weights do without."""


@dataclass(frozen=True)
class ModelTensors:
    """The tensors of a checkpoint by their place in its model.

    `prefix` is that of the layers in the model, `layers` names the tensors of each. `outer` maps the other tensors to
    the weights that they make; `ties` maps weights that have no tensor of their own to those that they are tied to.
    """

    prefix: str
    layers: tuple[tuple[str, ...], ...]
    outer: Mapping[str, tuple[str, ...]]
    placements: Mapping[str, Placement]
    ties: Mapping[str, str]

    def without_tensors(self, weights: Collection[str]) -> set[str]:
        """Those of some weights outside the layers that no tensor makes."""
        made = {weight for weights in self.outer.values() for weight in weights}
        return set(weights) - made - self.ties.keys()

    def of_weights(self, weights: Collection[str]) -> tuple[str, ...]:
        """The tensors outside the layers that make these weights."""
        wanted = {self.ties.get(weight, weight) for weight in weights}
        return tuple(name for name, made in self.outer.items() if not wanted.isdisjoint(made))


def model_tensors(checkpoint: Checkpoint, model: Any, loader: WeightLoader) -> ModelTensors:
    """Find the place of every tensor by a load on the meta device, which reads no weights.

    Raises UnsupportedModelError for tensors of another shape, weights without tensors, layers that share weights, and
    tensors outside the layers that make weights inside them.
    """
    where, stack = str(checkpoint), checkpoint.stack
    if stack is None:
        raise unsupported("layers-elsewhere", where, "its decoder layers cannot be identified")
    placements = loader.placements(checkpoint)
    _require_companions(checkpoint, placements)
    of_layer: dict[int | None, list[str]] = defaultdict(list)
    for name in placements:
        place = stack.locate(name)
        of_layer[place[0] if place else None].append(name)
    layers = tuple(tuple(of_layer[number]) for number in range(stack.count))
    made = [loader.load(_on_meta(checkpoint, names)).keys() for names in layers]
    prefix = _layers_prefix(model, made, where)
    _require_own_weights(model, prefix, where)
    for number, weights in enumerate(made):
        for weight in weights:
            if not weight.startswith(f"{prefix}.{number}."):
                what = f"the tensors of layer {number} make {weight}, outside that layer"
                raise unsupported("layers-not-separate", where, what)
    outer = _outer_weights(checkpoint, of_layer[None], placements, loader)
    for name, outside in outer.items():
        if inner := next((weight for weight in outside if weight.startswith(f"{prefix}.")), None):
            raise unsupported("layers-not-separate", where, f"{name}, outside its layers, makes {inner} inside one")
    loaded = set().union(*made, *outer.values())
    tensors = ModelTensors(prefix, layers, outer, placements, _ties(model, loaded))
    in_layers = {name for name, _ in model.named_parameters() if name.startswith(f"{prefix}.")}
    require_tensors(in_layers - loaded, model, where)
    return tensors


def _require_companions(checkpoint: Checkpoint, placements: Mapping[str, Placement]) -> None:
    """Raise UnsupportedModelError where transformers would make dense weights without, say, their scales."""
    names = quantized_groups(checkpoint).keys() - placements.keys()
    if left := sorted(name for name in names if not name.endswith(_OF_ACTIVATIONS)):
        what = f"transformers {version('transformers')} would not read {left[0]}"
        raise UnsupportedModelError(Problem("quantized-model", str(checkpoint), what, QUANTIZED_REMEDY))


def require_tensors(missing: Collection[str], model: Any, where: str) -> None:
    """Raise UnsupportedModelError for weights without a tensor, which transformers would initialize at random."""
    problems = [
        Problem(
            "parameter-mismatch",
            where,
            f"{type(model).__name__} has {name}, the checkpoint has no tensor for it",
            "check that config.json belongs to these weights",
        )
        for name in sorted(missing)[:3]
    ]
    raise_all(problems, UnsupportedModelError)


def _on_meta(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(checkpoint[name].shape, dtype=stored_dtype(name, checkpoint[name]), device="meta")
        for name in names
    }


def _outer_weights(
    checkpoint: Checkpoint, names: Iterable[str], placements: Mapping[str, Placement], loader: WeightLoader
) -> dict[str, tuple[str, ...]]:
    """Each tensor outside the layers, and the weights that it makes, alone or with the others of its conversion."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[placements[name].target].append(name)
    converted = [group for group in groups.values() if any(placements[name].is_converted for name in group)]
    plain = [name for group in groups.values() if group not in converted for name in group]
    loader.load(_on_meta(checkpoint, plain))  # compares shapes
    made: dict[str, tuple[str, ...]] = {name: (placements[name].target,) for name in plain}
    for group in converted:
        made |= dict.fromkeys(group, tuple(loader.load(_on_meta(checkpoint, group))))
    return made


def _layers_prefix(model: Any, made: list[Any], where: str) -> str:
    """The module list whose element k has the weights of layer k."""
    for name, module in model.named_modules():
        found = [any(weight.startswith(f"{name}.{k}.") for weight in weights) for k, weights in enumerate(made)]
        if isinstance(module, torch.nn.ModuleList) and len(module) == len(made) and all(found):
            return str(name)
    what = f"{type(model).__name__} has no list of {len(made)} layers with the tensors of the checkpoint's layers"
    raise unsupported("layers-elsewhere", where, what)


def _require_own_weights(model: Any, prefix: str, where: str) -> None:
    owners: dict[int, str] = {}
    for name, parameter in model.get_submodule(prefix).named_parameters(remove_duplicate=False):
        number = name.partition(".")[0]
        if owners.setdefault(id(parameter), number) != number:
            what = f"layers {owners[id(parameter)]} and {number} share a weight ({name.partition('.')[2]})"
            raise unsupported("shared-weights", where, what)
    for one, other in model.all_tied_weights_keys.items():
        if one.startswith(f"{prefix}.") or other.startswith(f"{prefix}."):
            raise unsupported("shared-weights", where, f"{one} in a layer is the same weight as {other}")


def _ties(model: Any, loaded: Collection[str]) -> dict[str, str]:
    """Weights without a tensor, and the loaded ones that they are tied to."""
    groups: dict[str, set[str]] = defaultdict(set)
    for one, other in model.all_tied_weights_keys.items():
        groups[other] |= {one, other}
    ties: dict[str, str] = {}
    for group in groups.values():
        if source := next((name for name in sorted(group) if name in loaded), None):
            ties |= {name: source for name in group if name not in loaded}
    return ties
