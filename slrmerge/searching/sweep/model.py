"""A model run stage by stage: embedding, each layer, head, each with weights that are passed in.

The model's own code computes everything (embedding scales, rotary positions, norms, caps). Slots in the place of its
layers record how a layer is called, return states that were computed elsewhere, or run the layer.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from inspect import signature
from typing import Any

import torch

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.errors import UnsupportedModelError, first_line
from slrmerge.searching.sweep.architecture import model_without_weights, unsupported
from slrmerge.searching.sweep.embedding_rows import EmbeddingRows, rows_in_use
from slrmerge.searching.sweep.fakes import UsedTensors, fake_weight, kind_of
from slrmerge.searching.sweep.loading import WeightLoader, Weights
from slrmerge.searching.sweep.slots import Call, LayerAction, LayerSlots, OutputForm, same
from slrmerge.searching.sweep.stages import model_tensors, require_tensors

VIEWS_FROM_BYTES = 1 << 31
"""From this size on, a layer's made-up weights are views; a few models take none."""

PROBE_TOKENS = 5
"""Tokens of the forward passes with made-up weights that show how a model calls its layers."""

FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError)
"""What a model's own code raises for arguments that it does not take."""


class StagedModel:
    """The language model of a checkpoint, without weights.

    `stages` names the tensors of the checkpoint that each stage uses, `by_row` those of the first and of the last stage
    that have a row for each token. `why_rows` says why contexts are rows and no trie; None for a trie. The constructor
    reads no weights. It raises UnsupportedModelError for a model that cannot be run stage by stage.
    """

    why_rows: str | None = "not tried"

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
        self._loader = WeightLoader(self.model, where=self.where, dtype=dtype, device=device)
        self._tensors = model_tensors(checkpoint, self.model, self._loader)
        self._slots = LayerSlots(self.model.get_submodule(self._tensors.prefix))
        self.layers = self._slots.layers
        self.embedding, self._head = self._outer_names()
        self.forms: list[OutputForm] = []
        before, after = self._probe()
        require_tensors(self._tensors.without_tensors(before | after), self.model, self.where)
        self.stages = (self._tensors.of_weights(before), *self._tensors.layers, self._tensors.of_weights(after))
        self.by_row = self._named_by_row(after)
        head = self.by_row[1][0] if self.by_row[1] else None
        self.vocabulary = checkpoint[head].shape[0] if head else int(self.model.config.get_text_config().vocab_size)

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def unsupported(self, code: str, what: str) -> UnsupportedModelError:
        return unsupported(code, self.where, what)

    # weights

    def weights(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights from whole tensors of one stage, by their names in the checkpoint."""
        loaded = self._loader.load(tensors) if tensors else {}
        return loaded | {name: loaded[tied] for name, tied in self._tensors.ties.items() if tied in loaded}

    def row_weights(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights from rows of tensors that have a row for each token."""
        made = {}
        for name, rows in tensors.items():
            placement = self._tensors.placements[name]
            made[placement.target] = rows.to(self.device, self._loader.dtype_of(placement))
        return made | {name: made[tied] for name, tied in self._tensors.ties.items() if tied in made}

    def embedding_weights(
        self, whole: Mapping[str, torch.Tensor], by_row: Mapping[str, torch.Tensor], rows: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """The first stage's weights from whole tensors and from `rows` of others; of the embedding only these rows."""
        made = self.weights(whole)
        if self.embedding in made:  # cannot be loaded by row
            made[self.embedding] = made[self.embedding][list(rows)]
        return made | self.row_weights(by_row)

    # stages

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

        without_head = {name: tensor for name, tensor in weights.items() if name not in self._head}
        actions = [action(number) for number in range(len(self.layers))]
        self.forward(without_head, ids, actions, embedded=embedded, positions=positions)
        if len(calls) != len(self.layers):
            raise self.unsupported("layers-not-in-order", f"{self.name} does not call each of its layers once")
        return calls

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

    @torch.inference_mode()
    def call_layer(self, number: int, weights: Weights, call: Call) -> torch.Tensor:
        """The states that a layer returns, in the shape of its input."""
        return self.forms[number].states(self._run_layer(number, weights, call))

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

    def reference_states(
        self, contexts: Sequence[Sequence[int]], stage_weights: Callable[[int], Weights]
    ) -> torch.Tensor:
        """The last layer's states at the end of each context, by the model's own forward: (1, contexts, width).

        One batch for each length, with transformers' own masks and attention. `stage_weights` is called for one stage
        after the other; of the embedding it returns only the rows of the contexts.
        """
        ends: list[torch.Tensor | None] = [None] * len(contexts)
        embedded = rows_in_use(token for ids in contexts for token in ids)

        def running(number: int) -> LayerAction:
            return lambda call: self._run_layer(number, stage_weights(number + 1), call)

        latest = self.model.config._attn_implementation
        self.use_own_attention()
        for numbers in by_length(contexts):
            ids = torch.tensor([contexts[number] for number in numbers], device=self.device)
            outputs: list[torch.Tensor] = []

            def keep(call: Call, outputs: list[torch.Tensor] = outputs) -> Any:
                output = running(len(self.layers) - 1)(call)
                outputs.append(self.forms[-1].states(output))
                return output

            actions = [*(running(number) for number in range(len(self.layers) - 1)), keep]
            self.forward(stage_weights(0), ids, actions, embedded=embedded)
            for row, number in enumerate(numbers):
                ends[number] = outputs[0][row, -1]
        self.use_attention(latest)
        return torch.stack([end for end in ends if end is not None])[None]

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

    # how the model calls its layers

    def _probe(self) -> tuple[set[str], set[str]]:
        """The weights outside the layers that are used before the last layer, and after it.

        Finds the form of every layer's output, and compares two passes in which the layers have other weights. Raises
        UnsupportedModelError where a layer depends on earlier layers by more than the states.
        """
        one, used = self._probe_once(seed=1)
        self.width = one[0].hidden.shape[-1]
        other, _ = self._probe_once(seed=2)
        for number, (call, again) in enumerate(zip(one, other, strict=True)):
            if not same(call.others, again.others):
                what = f"layer {number} of {self.name} gets more from earlier layers than their output"
                raise self.unsupported("layers-depend-on-layers", what)
        return used

    def _probe_once(self, *, seed: int) -> tuple[list[Call], tuple[set[str], set[str]]]:
        used = UsedTensors(self.fake_outer)
        before: set[str] = set()
        last = len(self.layers) - 1
        forms: dict[object, OutputForm] = {}
        self.forms = []

        def run(number: int, call: Call) -> Any:
            if number == last:
                before.update(used.names)
                used.names.clear()
            kind = kind_of(self.layers[number])
            if kind not in forms:
                output = self._run_layer(number, self.fake_layer(number, seed=seed), call)
                form = OutputForm.of(output, call.hidden)
                if form is None:
                    what = f"layer {number} of {self.name} does not return states of the shape of its input"
                    raise self.unsupported("unknown-layer-output", what)
                forms[kind] = form
            self.forms.append(forms[kind])
            generator = torch.Generator(device="cpu").manual_seed(seed * 1000 + number)
            states = torch.randn(call.hidden.shape, generator=generator).to(call.hidden)
            return forms[kind].wrap(states)

        ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=self.device)
        try:
            with torch.inference_mode(), self.eager_experts(), used:
                calls = self.record({}, ids, embedded=[0], run=run)
        except FAILURES as error:
            what = f"{self.name} cannot be run with its layers one by one ({first_line(error)})"  # the model's own code
            raise self.unsupported("unsupported-layer-call", what) from error
        return calls, (before, set(used.names))

    def _hidden_of(self, call: Call, number: int, shape: Sequence[int]) -> torch.Tensor:
        """The states of a call. Raises UnsupportedModelError where they are not one vector for each token."""
        hidden = call.positional[0] if call.positional else call.keywords.get("hidden_states")
        if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3 or hidden.shape[:2] != tuple(shape):
            what = f"{self.name} does not give layer {number} one state for each token"
            raise self.unsupported("unknown-layer-input", what)
        return hidden

    def _run_layer(self, number: int, weights: Weights, call: Call) -> Any:
        prefix_length = len(f"{self._tensors.prefix}.{number}.")
        inner = {name[prefix_length:]: tensor for name, tensor in weights.items()}
        return torch.func.functional_call(
            self.layers[number], inner, tuple(call.positional), dict(call.keywords), tie_weights=False
        )

    def _returning_input(self, number: int) -> LayerAction:
        return lambda call: self.forms[number].wrap(call.hidden)

    # weights that are made up

    @cached_property
    def fake_outer(self) -> dict[str, torch.Tensor]:
        """Made-up weights outside the layers; one row of those that have a row for each token."""
        by_row = (self.embedding, *self._head)
        return {
            name: fake_weight((1, *own.shape[1:]) if name in by_row else own.shape, own.dtype, self.device, seed=0)
            for name, own in self.model.named_parameters(remove_duplicate=False)
            if not name.startswith(f"{self._tensors.prefix}.")
        }

    @property
    def embedding_fakes(self) -> dict[str, torch.Tensor]:
        """The made-up embedding: one row for all tokens."""
        return {name: rows for name, rows in self.fake_outer.items() if name == self.embedding}

    def fake_layer(self, number: int, *, seed: int) -> dict[str, torch.Tensor]:
        """Made-up weights of a layer."""
        prefix = f"{self._tensors.prefix}.{number}."
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

    def _named_by_row(self, after: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The tensors of the first and of the last stage of which some rows can be loaded."""

        def plain(weights: Sequence[str | None]) -> tuple[str, ...]:
            names = []
            for weight in weights:
                wanted = self._tensors.ties.get(weight, weight) if weight else None
                names += [
                    name for name, made in self._tensors.outer.items()
                    if made == (wanted,) and not self._tensors.placements[name].is_converted
                ]  # fmt: skip
            return tuple(names)

        embedding, head = plain([self.embedding]), plain(self._head)
        is_whole = len(head) == len(self._head) and set(self._head) <= after
        return embedding, head if is_whole and self._head_goes_by_row() else ()

    def _head_goes_by_row(self) -> bool:
        """Whether each row of the head gives its logit whatever the other rows are."""
        states = torch.linspace(-1, 1, self.width, dtype=self.dtype, device=self.device)[None, None]
        rows = {name: torch.stack([fake[0], fake[0] + 1]) for name in self._head for fake in [self.fake_outer[name]]}
        try:
            both = self.logits(states, rows)
            one = self.logits(states, {name: each[:1] for name, each in rows.items()})
        except FAILURES:  # adds something that has the size of the vocabulary
            return False
        return both.shape[-1] == 2 and torch.allclose(both[..., :1], one)


def by_length(contexts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The numbers of contexts, grouped by their length."""
    groups: dict[int, list[int]] = defaultdict(list)
    for number, ids in enumerate(contexts):
        groups[len(ids)].append(number)
    return list(groups.values())
