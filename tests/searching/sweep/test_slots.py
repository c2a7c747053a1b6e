"""Calls of layers, what they return, and when two calls are the same."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from slrmerge.searching.sweep.slots import Call, LayerSlots, OutputForm, same

X, Y = torch.arange(6.0).view(1, 2, 3), torch.zeros(1, 2, 3)


@dataclass
class Cache:
    """An argument that is an object."""

    content: list[Any]


SAME = [1, None, "a", 1.5, True, X, (X, [Y, 1]), {"a": X, "b": (1, 2)}, Cache([X]), torch.float32]
DIFFERENT = [
    (1, 2), (None, 0), (1, True), (X, Y), (X, None), (X, X[:, :1]), ((X, X), (X, Y)), ((X,), [X]), ((X,), (X, X)),
    ({"a": X}, {"a": Y}), ({"a": X}, {"b": X}), (Cache([X]), Cache([Y])), (Cache([X]), 1),
    (torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("value", SAME, ids=repr)
def test_equal_arguments_are_the_same(value: Any) -> None:
    copied = value.clone() if isinstance(value, torch.Tensor) else value
    assert same(value, copied)
    assert same(Cache([X, value]), Cache([X.clone(), value]))


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_arguments_are_not_the_same(one: Any, other: Any) -> None:
    assert not same(one, other)
    assert not same([1, one], [1, other])


@pytest.mark.parametrize(
    "call", [Call((X, 1), {"b": Y}), Call((), {"hidden_states": X, "b": Y})], ids=["first", "named"]
)
def test_other_states_are_put_in_the_place_of_the_first(call: Call) -> None:
    changed = call.with_hidden(Y)
    assert call.hidden is X
    assert changed.hidden is Y
    assert same(changed.others, call.others)
    assert "hidden_states" not in call.others[1]


def test_tensors_inside_arguments_are_mapped() -> None:
    call = Call((X,), {"pair": (X, 1), "more": {"y": Y}, "name": "n"}).map_tensors(lambda tensor: tensor + 1)
    assert same(call.positional, (X + 1,))
    assert same(dict(call.keywords), {"pair": (X + 1, 1), "more": {"y": Y + 1}, "name": "n"})


@pytest.mark.parametrize("output", [Y, (Y, None), ("weights", Y, 3), [Y, 1]], ids=["alone", "first", "second", "list"])
def test_states_are_taken_from_an_output_and_put_into_one(output: Any) -> None:
    form = OutputForm.of(output, X)
    assert form is not None
    assert form.states(output) is Y
    wrapped = form.wrap(X)
    assert form.states(wrapped) is X
    assert type(wrapped) is type(output)


@pytest.mark.parametrize("output", [Y[:, :1], (None, 1), None, {"states": Y}], ids=["shape", "none", "nothing", "dict"])
def test_an_output_without_states_has_no_form(output: Any) -> None:
    assert OutputForm.of(output, X) is None


def test_slots_take_the_place_of_layers_for_a_time_and_have_their_attributes() -> None:
    modules = torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(2)])
    slots, layers = LayerSlots(modules), list(modules)
    with slots.replaced([lambda call: call.hidden, lambda call: call.hidden * 2]):
        assert modules[1](modules[0](X)).equal(X * 2)
        assert modules[0].in_features == 3
        assert list(modules.parameters()) == []
    assert list(modules) == layers
    with pytest.raises(ZeroDivisionError), slots.replaced([lambda call: 1 // 0] * 2):
        modules[0](X)
    assert list(modules) == layers
