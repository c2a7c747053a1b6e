"""A model whose layers are slots: its own forward runs with weights that are passed in, and with actions as layers.

The model's own code computes everything (embedding scales, rotary positions, norms, caps). An action records how its
layer is called, returns states that were computed elsewhere, or runs the layer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from inspect import signature
from typing import Any

import torch

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.errors import UnsupportedModelError
from slrmerge.searching.sweep.architecture import model_without_weights, unsupported
from slrmerge.searching.sweep.embedding_rows import EmbeddingRows
from slrmerge.searching.sweep.fakes import fake_weight
from slrmerge.searching.sweep.loading import WeightLoader, Weights
from slrmerge.searching.sweep.slots import Call, LayerAction, LayerSlots, OutputForm
from slrmerge.searching.sweep.stages import model_tensors

VIEWS_FROM_BYTES = 1 << 31
"""From this size on, a layer's made-up weights are views; a few models take none."""


class SlottedModel:
    """The language model of a checkpoint, without weights.

    `forms` are those of its layers' outputs, and `width` that of its states, as a probe finds them. Raises
    UnsupportedModelError for a model without layers of its own, or whose tensors do not fit.
    """

    width: int

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.where = str(checkpoint)
        self.model = model_without_weights(checkpoint, dtype=dtype)
        for module in self.model.modules():
            for tensors in (module._buffers, vars(module)):  # some keep tensors as plain attributes
                for name, tensor in list(tensors.items()):
                    if isinstance(tensor, torch.Tensor):
                        tensors[name] = tensor.to(device)
        self._own_attention = self.model.config._attn_implementation
        self.accepted = signature(self.model.forward).parameters
        self.loader = WeightLoader(self.model, where=self.where, dtype=dtype, device=device)
        self.tensors = model_tensors(checkpoint, self.model, self.loader)
        self._slots = LayerSlots(self.model.get_submodule(self.tensors.prefix))
        self.layers = self._slots.layers
        self.embedding, self.head = self._outer_names()
        self.forms: list[OutputForm] = []

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def unsupported(self, code: str, what: str) -> UnsupportedModelError:
        return unsupported(code, self.where, what)

    @torch.inference_mode()
    def forward(
        self,
        weights: Weights,
        ids: torch.Tensor,
        actions: Sequence[LayerAction],
        *,
        embedded: Sequence[int] | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits by the model's own forward with these weights outside its layers, and actions in their place.

        Weights that are not given are made up.
        """
        weights = {**self.fake_outer, **weights}
        inputs: dict[str, Any] = {"input_ids": ids}
        if positions is not None:
            inputs["position_ids"] = positions
        if "use_cache" in self.accepted:
            inputs["use_cache"] = False
        rows = weights.get(self.embedding) if embedded is not None and self.embedding else None
        mode = EmbeddingRows(rows, embedded) if rows is not None and embedded is not None else nullcontext()
        with self._slots.replaced(actions), mode:
            output = torch.func.functional_call(self.model, weights, (), inputs, tie_weights=False)
        logits: torch.Tensor = output.logits
        return logits

    def record(
        self,
        weights: Weights,
        ids: torch.Tensor,
        *,
        embedded: Sequence[int] | None = None,
        positions: torch.Tensor | None = None,
        run: Callable[[int, Call], Any] | None = None,
    ) -> list[Call]:
        """How the model calls its layers for these ids, shape (batch, tokens), at these positions.

        `weights` are those of the first stage; of the embedding they have the rows of the tokens `embedded`, in order.
        `run` runs a layer; by default a layer returns its input. Raises UnsupportedModelError where the model changes
        the states between its layers, or calls them in another order.
        """
        calls: list[Call] = []
        latest: list[torch.Tensor] = []

        def action(number: int) -> LayerAction:
            def act(call: Call) -> Any:
                hidden = self._hidden_of(call, number, ids.shape)
                if number != len(calls):
                    raise self.unsupported("layers-not-in-order", f"{self.name} does not call its layers one by one")
                if latest and hidden is not latest[0]:
                    what = f"{self.name} changes the states between layers {number - 1} and {number}"
                    raise self.unsupported("states-change-between-layers", what)
                output = run(number, call) if run else self.forms[number].wrap(hidden + 0)
                latest[:] = [self.forms[number].states(output)]
                calls.append(call)
                return output

            return act

        without_head = {name: tensor for name, tensor in weights.items() if name not in self.head}
        actions = [action(number) for number in range(len(self.layers))]
        self.forward(without_head, ids, actions, embedded=embedded, positions=positions)
        if len(calls) != len(self.layers):
            raise self.unsupported("layers-not-in-order", f"{self.name} does not call each of its layers once")
        return calls

    @torch.inference_mode()
    def call_layer(self, number: int, weights: Weights, call: Call) -> torch.Tensor:
        """The states that a layer returns, in the shape of its input."""
        return self.forms[number].states(self.run_layer(number, weights, call))

    def run_layer(self, number: int, weights: Weights, call: Call) -> Any:
        """What a layer returns."""
        prefix_length = len(f"{self.tensors.prefix}.{number}.")
        inner = {name[prefix_length:]: tensor for name, tensor in weights.items()}
        return torch.func.functional_call(
            self.layers[number], inner, tuple(call.positional), dict(call.keywords), tie_weights=False
        )

    def logits(self, states: torch.Tensor, weights: Weights) -> torch.Tensor:
        """Logits, caps and scales included, from the last layer's states.

        (states, leaves, width) → (states, leaves, rows), the rows of the head that `weights` has.
        """
        count = len(self.layers)
        actions: list[LayerAction] = [self._returning_input(number) for number in range(count - 1)]
        # each a prompt of one token, (states * leaves, 1, width)
        actions.append(lambda _: self.forms[count - 1].wrap(states.flatten(0, 1)[:, None]))
        ids = torch.zeros(states.shape[0] * states.shape[1], 1, dtype=torch.long, device=self.device)
        return self.forward(weights, ids, actions, embedded=[0]).view(*states.shape[:2], -1)

    def use_attention(self, name: str) -> None:
        """Use another attention implementation of transformers from now on, where the model lets it be replaced."""
        from transformers.utils import logging as transformers_logging

        logging: Any = transformers_logging  # without types
        if self.model.config._attn_implementation != name:
            verbosity = logging.get_verbosity()
            logging.set_verbosity_error()  # it warns of vision towers, which are not run
            try:
                self.model.set_attn_implementation(name)
            finally:
                logging.set_verbosity(verbosity)

    def use_own_attention(self) -> None:
        """Use the attention that the model uses when it is loaded."""
        self.use_attention(self._own_attention)

    @contextmanager
    def eager_experts(self) -> Iterator[None]:
        """Compute experts one by one: other implementations take no weights that are views."""
        before = self.model.get_experts_implementation()
        self.model.set_experts_implementation("eager")
        try:
            yield
        finally:
            self.model.set_experts_implementation(before)

    # weights that are made up

    @cached_property
    def fake_outer(self) -> dict[str, torch.Tensor]:
        """Made-up weights outside the layers; one row of those that have a row for each token."""
        by_row = (self.embedding, *self.head)
        return {
            name: fake_weight((1, *own.shape[1:]) if name in by_row else own.shape, own.dtype, self.device, seed=0)
            for name, own in self.model.named_parameters(remove_duplicate=False)
            if not name.startswith(f"{self.tensors.prefix}.")
        }

    @property
    def embedding_fakes(self) -> dict[str, torch.Tensor]:
        """The made-up embedding: one row for all tokens."""
        return {name: rows for name, rows in self.fake_outer.items() if name == self.embedding}

    def fake_layer(self, number: int, *, seed: int) -> dict[str, torch.Tensor]:
        """Made-up weights of a layer."""
        prefix = f"{self.tensors.prefix}.{number}."
        own = dict(self.layers[number].named_parameters(remove_duplicate=False))
        made = {
            prefix + name: fake_weight(each.shape, each.dtype, self.device, seed=seed) for name, each in own.items()
        }
        if sum(each.nbytes for each in own.values()) > VIEWS_FROM_BYTES:
            return made
        return {name: each.contiguous() for name, each in made.items()}

    def _outer_names(self) -> tuple[str | None, tuple[str, ...]]:
        """The names of the embedding's weight, and of the head's weight and bias, in the model."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        names = {id(module): name for name, module in self.model.named_modules()}
        weight = f"{names[id(embedding)]}.weight" if id(embedding) in names else None
        parts = [f"{names[id(head)]}.{part}" for part, _ in head.named_parameters()] if id(head) in names else []
        return weight, tuple(parts)

    def _hidden_of(self, call: Call, number: int, shape: Sequence[int]) -> torch.Tensor:
        """The states of a call. Raises UnsupportedModelError where they are not one vector for each token."""
        hidden = call.positional[0] if call.positional else call.keywords.get("hidden_states")
        if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3 or hidden.shape[:2] != tuple(shape):
            what = f"{self.name} does not give layer {number} one state for each token"
            raise self.unsupported("unknown-layer-input", what)
        return hidden

    def _returning_input(self, number: int) -> LayerAction:
        return lambda call: self.forms[number].wrap(call.hidden)
