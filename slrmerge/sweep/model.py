"""A model run stage by stage: embedding, each layer, head, each with whatever weights are given to it.

The model's own code does everything (embedding scales, rotary positions, norms, caps). In the place of its layers stand
stand-ins, which tell how a layer is called, hand over states worked out elsewhere, or run the layer after all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from slrmerge.checkpoint import Checkpoint
from slrmerge.errors import Problem, UnsupportedModelError, first_line
from slrmerge.sweep.architecture import REMEDY, head_name, is_tied, model_without_weights
from slrmerge.sweep.attention import NAME, Kept, TrieAttention, trie_attention
from slrmerge.sweep.trie import TokenTrie

Weights = Mapping[str, torch.Tensor]
"""Tensors by their names in the checkpoint."""

LayerCall = Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]
"""What stands in for a layer: its input, shape (batch, tokens, width), and its other arguments → its output."""


@dataclass(frozen=True)
class Layout:
    """A packing of prompts as a model wants it: how each layer is called for all tokens and for the leaves alone."""

    trie: TokenTrie
    calls: Sequence[dict[str, Any]]
    leaf_calls: Sequence[dict[str, Any]]
    attention: TrieAttention
    leaf_attention: TrieAttention
    rules: Sequence[torch.Tensor]


class StagedModel:
    """The causal language model of a checkpoint, without weights.

    `stages` names, stage by stage, the tensors of the checkpoint that it uses; those of `vocabulary_names` in the last
    one have a row for each token. Raises UnsupportedModelError, with the reasons, for a model that cannot be run so.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, trie_attention)
        self.dtype, self.device = dtype, device
        self._where = str(checkpoint)
        self._model = model_without_weights(checkpoint, dtype=dtype, attention=NAME)
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        embedding = self._model.get_input_embeddings()
        embedding.padding_idx = None  # no row is special when only the rows in use are there
        self.embedding_name = next(
            f"{name}.weight" for name, module in self._model.named_modules() if module is embedding
        )
        self._head_name = head_name(self._model)
        self.head_name = self.embedding_name if is_tied(checkpoint, self._model) else self._head_name
        self.vocabulary, self.width = checkpoint[self.head_name].shape
        self._layers, self._stand_ins, self._prefix = self._take_layers(checkpoint)
        self.vocabulary_names = (self.head_name, self._head_name.removesuffix("weight") + "bias")
        self.stages = self._name_stages()

    @property
    def name(self) -> str:
        return type(self._model).__name__

    def lay_out(self, trie: TokenTrie) -> Layout:
        """How the layers are called for `trie`. Raises UnsupportedModelError where a layer's rule cannot be read."""
        depths = torch.tensor([trie.depths])
        leaves = depths[:, torch.tensor(trie.leaves)]
        with self._eager():
            masks = [call.get("attention_mask") for call in self._calls(torch.arange(trie.longest)[None])]
        square = (1, 1, trie.longest, trie.longest)
        rules = [mask[0, 0] for mask in masks if isinstance(mask, torch.Tensor) and mask.shape == square]
        if len(rules) < len(masks):
            raise UnsupportedModelError(
                Problem(self._where, f"{self.name} does not say what its layers may attend to", REMEDY)
            )
        return Layout(
            trie,
            self._calls(depths),
            self._calls(leaves),
            TrieAttention.of(((segment.tokens, segment.path) for segment in trie.segments), self.device),
            TrieAttention.of(
                (((number,), path) for number, path in enumerate(trie.paths_of(trie.leaves))), self.device
            ),
            rules,
        )

    def embed(self, layout: Layout, weights: Weights) -> torch.Tensor:
        """What the first layer gets, shape (1, tokens, width); the embedding's rows in `weights` are `rows_in_use`."""
        rows = {token: row for row, token in enumerate(rows_in_use(layout.trie.ids))}
        ids = torch.tensor([[rows[token] for token in layout.trie.ids]], device=self.device)
        states: list[torch.Tensor] = []

        def keep(hidden: torch.Tensor, _: dict[str, Any]) -> torch.Tensor:
            states.append(hidden)
            return hidden

        with self._acting({0: keep}):
            self._forward(weights, input_ids=ids, position_ids=torch.tensor([layout.trie.depths], device=self.device))
        return states[0]

    def run_layer(self, number: int, layout: Layout, weights: Weights, states: torch.Tensor) -> torch.Tensor:
        """A layer's output for `states`, both (states, tokens, width); the last layer's for the leaves only."""
        attention, rule = layout.attention, layout.rules[number]
        if number < len(self._layers) - 1:
            return self._run(number, weights, states, layout.calls[number], replace(attention, rule=rule))
        holder = replace(attention, rule=rule, keep=True)
        with suppress(Kept):
            self._run(number, weights, states, layout.calls[number], holder)
        leaves = states[:, torch.tensor(layout.trie.leaves, device=self.device)]
        looking = replace(layout.leaf_attention, rule=rule, kept=holder.kept)
        return self._run(number, weights, leaves, layout.leaf_calls[number], looking)

    def logits(self, states: torch.Tensor, weights: Weights) -> torch.Tensor:
        """Logits of what the last layer gave; `weights` may hold the head's rows for a part of the vocabulary.

        (states, leaves, width) → (states, leaves, rows), as the model gives them, caps and scales included.
        """
        weights = {self._head_name if name == self.head_name else name: tensor for name, tensor in weights.items()}
        anything = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with self._acting({len(self._layers) - 1: lambda *_: states}):
            return self._forward(weights, input_ids=anything)

    def ordinary(self, prompts: Sequence[Sequence[int]], weights: Callable[[int], Weights]) -> torch.Tensor:
        """The last layer's states at each prompt's end, shape (1, prompts, width), by the model's own forward.

        One padded batch, transformers' own masks and attention; `weights` gives each stage's when it is its turn.
        """
        longest = max(map(len, prompts))
        rows = {token: row for row, token in enumerate(rows_in_use(token for prompt in prompts for token in prompt))}
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, prompt in enumerate(prompts):
            ids[number, : len(prompt)] = torch.tensor([rows[token] for token in prompt])
            mask[number, : len(prompt)] = 1
        final: list[torch.Tensor] = []

        def run(number: int) -> LayerCall:
            def call(hidden: torch.Tensor, others: dict[str, Any]) -> torch.Tensor:
                output = self._call(number, weights(number + 1), hidden, others)
                final[:] = [output]
                return output

            return call

        with self._eager(), self._acting({number: run(number) for number in range(len(self._layers))}):
            self._forward(weights(0), input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        return final[0][torch.arange(len(prompts), device=self.device), ends][None]

    def _take_layers(self, checkpoint: Checkpoint) -> "tuple[list[torch.nn.Module], list[_StandIn], str]":
        stack = checkpoint.stack
        held = None
        if stack is not None:
            with suppress(AttributeError):
                held = self._model.get_submodule(stack.prefix)
        if stack is None or not isinstance(held, torch.nn.ModuleList) or len(held) != stack.count:
            what = f"its layers are not where {self.name} has them"
            raise UnsupportedModelError(Problem(self._where, what, REMEDY))
        layers = list(held)
        stand_ins = [_StandIn(layer) for layer in layers]
        for number, stand_in in enumerate(stand_ins):
            held[number] = stand_in
        return layers, stand_ins, stack.prefix

    def _name_stages(self) -> tuple[tuple[str, ...], ...]:
        outer = [name for name, _ in self._model.named_parameters(remove_duplicate=False)]
        head = [name for name in self.vocabulary_names if name in outer]
        shared = [name for name in outer if name not in (self.embedding_name, self._head_name, *head)]
        layers = (
            tuple(f"{self._prefix}.{number}.{inner}" for inner, _ in layer.named_parameters())
            for number, layer in enumerate(self._layers)
        )
        return ((self.embedding_name, *shared), *layers, (*head, *shared))

    def _calls(self, depths: torch.Tensor) -> list[dict[str, Any]]:
        """The arguments of every layer for tokens at these depths, shape (1, tokens)."""
        calls: list[dict[str, Any]] = []

        def note(hidden: torch.Tensor, others: dict[str, Any]) -> torch.Tensor:
            calls.append(others)
            return hidden

        ids = torch.zeros_like(depths, device=self.device)
        try:
            with self._acting(dict.fromkeys(range(len(self._layers)), note)):
                self._forward({}, input_ids=ids, position_ids=depths.to(self.device))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            what = f"{self.name} does not hand one tensor from layer to layer ({first_line(error)})"
            raise UnsupportedModelError(Problem(self._where, what, REMEDY)) from error
        return calls

    def _run(
        self, number: int, weights: Weights, states: torch.Tensor, call: dict[str, Any], trie: TrieAttention
    ) -> torch.Tensor:
        output = self._call(number, weights, states, {**call, "trie": trie})
        if trie.calls != 1 or not isinstance(output, torch.Tensor):
            what = f"layer {number} of {self.name} asks for attention {trie.calls} times, not once"
            raise UnsupportedModelError(Problem(self._where, what, REMEDY))
        return output

    def _call(self, number: int, weights: Weights, states: torch.Tensor, others: dict[str, Any]) -> torch.Tensor:
        start = len(f"{self._prefix}.{number}.")
        inner = {name[start:]: tensor for name, tensor in weights.items()}
        layer = self._layers[number]
        try:
            output: torch.Tensor = torch.func.functional_call(layer, inner, (states,), others, tie_weights=False)
        except TypeError as error:
            what = f"{type(layer).__name__} cannot be run by itself ({error})"
            raise UnsupportedModelError(Problem(self._where, what, REMEDY)) from error
        return output

    def _forward(self, weights: Weights, **inputs: torch.Tensor) -> torch.Tensor:
        """The model's own forward with `weights` in place; what has none, and is not asked for here, is zeros.

        Without rows the head and the embedding are one row, so that nothing is spent on logits nobody wants.
        """
        narrow = (self.embedding_name, self._head_name, *self.vocabulary_names)
        zeros = {
            name: torch.zeros(
                (1, *parameter.shape[1:]) if name in narrow else parameter.shape, dtype=self.dtype, device=self.device
            )
            for name, parameter in self._model.named_parameters(remove_duplicate=False)
            if name not in weights
        }
        given = {**inputs, "use_cache": False}
        output = torch.func.functional_call(self._model, {**zeros, **weights}, (), given, tie_weights=False)
        logits: torch.Tensor = output.logits
        return logits

    @contextmanager
    def _eager(self) -> Iterator[None]:
        """With transformers' own attention and the masks that belong to it."""
        self._model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self._model.set_attn_implementation(NAME)

    @contextmanager
    def _acting(self, acts: Mapping[int, LayerCall]) -> Iterator[None]:
        for number, act in acts.items():
            self._stand_ins[number].act = act
        try:
            yield
        finally:
            for number in acts:
                self._stand_ins[number].act = _hand_on


def rows_in_use(ids: Iterable[int]) -> list[int]:
    """The rows of the embedding that these tokens need, in order."""
    return sorted(set(ids))


def _hand_on(hidden: torch.Tensor, _: dict[str, Any]) -> torch.Tensor:
    return hidden


class _StandIn(torch.nn.Module):
    """Takes a layer's place in its model; has the layer's attributes, but not its parameters."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)
        self.act: LayerCall = _hand_on

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: torch.Tensor, *positional: Any, **others: Any) -> torch.Tensor:
        if positional:
            layer = type(self.__dict__["layer"]).__name__
            raise UnsupportedModelError(Problem(layer, "is called in a way that a sweep cannot follow", REMEDY))
        return self.act(hidden_states, others)
