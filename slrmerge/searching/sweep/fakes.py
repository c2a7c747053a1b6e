"""Made-up weights that take no memory, for passes that show how a model calls its layers and what it uses."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_NUMBERS = ("layer_idx", "layer_id", "layer_number")
"""Attributes that number layers."""


def fake_weight(shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, seed: int) -> torch.Tensor:
    """Small numbers that depend on the seed and the place in the last dimension; the other dimensions are views."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    last = torch.randn(shape[-1:], generator=generator) / sqrt(max(1, *shape[-1:]))
    return last.to(device, dtype).expand(*shape)


def kind_of(layer: torch.nn.Module) -> object:
    """What layers have in common that run alike: the classes, settings and shapes of all their modules."""
    return tuple(
        (
            name,
            type(module),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if isinstance(value, bool | int | float | str | None) and key not in _NUMBERS
            ),
            tuple((key, tuple(own.shape)) for key, own in module.named_parameters(recurse=False)),
        )
        for name, module in layer.named_modules()
    )


class UsedTensors(TorchFunctionMode):
    """The names of tensors that functions of torch are called with, in a `with`."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._by_id = {id(tensor): name for name, tensor in tensors.items()}

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(function, "__name__", "") != "__get__":  # a shape or a dtype
            for each in tree_leaves((args, dict(kwargs or {}))):
                if isinstance(each, torch.Tensor) and (name := self._by_id.get(id(each))):
                    self.names.add(name)
        return function(*args, **(kwargs or {}))
