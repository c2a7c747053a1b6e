"""Slots in the place of a model's layers: they record how the model calls a layer, and return states made elsewhere."""

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

_PLAIN = (type(None), int, float, str, bool, torch.dtype, torch.device)


class Call(NamedTuple):
    """How a model calls a layer; the hidden states are the first positional argument or `hidden_states`."""

    positional: tuple[Any, ...]
    keywords: Mapping[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        hidden: torch.Tensor = self.positional[0] if self.positional else self.keywords["hidden_states"]
        return hidden

    @property
    def others(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All arguments but the hidden states."""
        return self.positional[1:], {name: each for name, each in self.keywords.items() if name != "hidden_states"}

    def with_hidden(self, hidden: torch.Tensor) -> "Call":
        """The same call for other hidden states."""
        if self.positional:
            return Call((hidden, *self.positional[1:]), self.keywords)
        return Call((), {**self.keywords, "hidden_states": hidden})

    def with_keywords(self, **keywords: Any) -> "Call":
        return Call(self.positional, {**self.keywords, **keywords})

    def map_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Call":
        """The same call with every tensor changed that is an argument, or in tuples, lists and dicts of arguments."""
        return Call(_map(self.positional, change), _map(dict(self.keywords), change))


@dataclass(frozen=True)
class OutputForm:
    """What a layer returns: the states alone, or a tuple or list with the states at one place."""

    whole: Sequence[Any] | None = None
    place: int = 0

    @classmethod
    def of(cls, output: Any, hidden: torch.Tensor) -> "OutputForm | None":
        """The form of an output for these input states; None where no part of it has their shape."""
        if isinstance(output, torch.Tensor):
            return cls() if output.shape == hidden.shape else None
        if isinstance(output, tuple | list):
            for place, part in enumerate(output):
                if isinstance(part, torch.Tensor) and part.shape == hidden.shape:
                    return cls(output, place)
        return None

    def states(self, output: Any) -> torch.Tensor:
        """The states in an output of this form."""
        states: torch.Tensor = output if self.whole is None else output[self.place]
        return states

    def wrap(self, states: torch.Tensor) -> Any:
        """An output of this form."""
        if self.whole is None:
            return states
        parts = [*self.whole[: self.place], states, *self.whole[self.place + 1 :]]
        return parts if isinstance(self.whole, list) else tuple(parts)


LayerAction = Callable[[Call], Any]
"""What a slot does when the model calls it: the call → what the layer returns."""


class LayerSlots:
    """The layers of a model, each of which a slot can replace for the time of a forward pass."""

    def __init__(self, modules: torch.nn.ModuleList) -> None:
        self.layers: Sequence[torch.nn.Module] = list(modules)
        self._modules = modules
        self._slots = [_Slot(layer) for layer in self.layers]

    @contextmanager
    def replaced(self, actions: Sequence[LayerAction]) -> Iterator[None]:
        """Calls of every layer go to its action."""
        for number, (slot, action) in enumerate(zip(self._slots, actions, strict=True)):
            slot.action = action
            self._modules[number] = slot
        try:
            yield
        finally:
            for number, layer in enumerate(self.layers):
                self._modules[number] = layer


class _Slot(torch.nn.Module):
    """Takes the place of a layer; has the attributes of the layer, but not its parameters."""

    action: LayerAction

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # not a submodule, whose parameters would count

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, *positional: Any, **keywords: Any) -> Any:
        return self.action(Call(positional, keywords))


def same(one: Any, other: Any) -> bool:
    """Whether two arguments of layers are equal, tensors and the attributes of objects included."""
    if one is other:
        return True
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, _PLAIN) or type(one) is not type(other):
        return bool(type(one) is type(other) and one == other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, UserDict):
        return same(one.data, other.data)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(each, other[key]) for key, each in one.items())
    if isinstance(one, torch.nn.Module):
        return False  # not the same one
    return hasattr(one, "__dict__") and same(vars(one), vars(other))


def _map(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(each, change) for each in value))
    if isinstance(value, list | tuple):
        return type(value)(_map(each, change) for each in value)
    if isinstance(value, dict):
        return {key: _map(each, change) for key, each in value.items()}
    return value
