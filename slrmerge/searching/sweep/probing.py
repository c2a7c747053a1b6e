"""Passes with made-up weights that show how a model calls its layers, what they return, and which weights it uses."""

from typing import Any, NamedTuple

import torch

from slrmerge.errors import first_line
from slrmerge.searching.sweep.fakes import UsedTensors, kind_of
from slrmerge.searching.sweep.slots import Call, OutputForm, same
from slrmerge.searching.sweep.slotted import SlottedModel

PROBE_TOKENS = 5
"""Tokens of a pass."""

FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError)
"""What a model's own code raises for arguments that it does not take."""


class UsedWeights(NamedTuple):
    """The weights outside the layers that are used before the last layer, and after it."""

    before: set[str]
    after: set[str]


def probe(model: SlottedModel) -> UsedWeights:
    """Find the form of every layer's output and the width of the states, and which weights are used.

    Compares two passes in which the layers have other weights. Raises UnsupportedModelError where a layer depends on
    earlier layers by more than the states, and where the model cannot be run with its layers one by one.
    """
    one, used = _pass(model, seed=1)
    model.width = one[0].hidden.shape[-1]
    other, _ = _pass(model, seed=2)
    for number, (call, again) in enumerate(zip(one, other, strict=True)):
        if not same(call.others, again.others):
            what = f"layer {number} of {model.name} gets more from earlier layers than their output"
            raise model.unsupported("layers-depend-on-layers", what)
    return used


def head_goes_by_row(model: SlottedModel) -> bool:
    """Whether each row of the head gives its logit whatever the other rows are."""
    states = torch.linspace(-1, 1, model.width, dtype=model.dtype, device=model.device)[None, None]
    rows = {name: torch.stack([fake[0], fake[0] + 1]) for name in model.head for fake in [model.fake_outer[name]]}
    try:
        both = model.logits(states, rows)
        one = model.logits(states, {name: each[:1] for name, each in rows.items()})
    except FAILURES:  # adds something that has the size of the vocabulary
        return False
    return both.shape[-1] == 2 and torch.allclose(both[..., :1], one)


def _pass(model: SlottedModel, *, seed: int) -> tuple[list[Call], UsedWeights]:
    used = UsedTensors(model.fake_outer)
    before: set[str] = set()
    last = len(model.layers) - 1
    forms: dict[object, OutputForm] = {}
    model.forms = []

    def run(number: int, call: Call) -> Any:
        if number == last:
            before.update(used.names)
            used.names.clear()
        kind = kind_of(model.layers[number])
        if kind not in forms:
            output = model.run_layer(number, model.fake_layer(number, seed=seed), call)
            form = OutputForm.of(output, call.hidden)
            if form is None:
                what = f"layer {number} of {model.name} does not return states of the shape of its input"
                raise model.unsupported("unknown-layer-output", what)
            forms[kind] = form
        model.forms.append(forms[kind])
        generator = torch.Generator(device="cpu").manual_seed(seed * 1000 + number)
        states = torch.randn(call.hidden.shape, generator=generator).to(call.hidden)
        return forms[kind].wrap(states)

    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=model.device)
    try:
        with torch.inference_mode(), model.eager_experts(), used:
            calls = model.record({}, ids, embedded=[0], run=run)
    except FAILURES as error:
        what = f"{model.name} cannot be run with its layers one by one ({first_line(error)})"  # the model's own code
        raise model.unsupported("unsupported-layer-call", what) from error
    return calls, UsedWeights(before, set(used.names))
