"""A model run stage by stage: embedding, each layer, head, each with weights that are passed in.

The model's own code computes everything (embedding scales, rotary positions, norms, caps). Slots in the place of its
layers record how a layer is called, return states that were computed elsewhere, or run the layer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.errors import Problem, UnsupportedModelError, first_line
from slrmerge.searching.sweep.architecture import REMEDY, head_name, is_tied, model_without_weights, weight_name
from slrmerge.searching.sweep.attention import (
    ATTENTION_NAME,
    AttentionPattern,
    CapturedKeyValues,
    KeyValueCapture,
    LayerAttention,
    LeafAttention,
    QueryRun,
    TrieAttention,
    trie_attention,
)
from slrmerge.searching.sweep.trie import TokenTrie

Weights = Mapping[str, torch.Tensor]
"""Tensors by their names in the checkpoint."""

LayerCall = Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]
"""What a slot does: the layer's input, shape (batch, tokens, width), and its other arguments → its output."""


@dataclass(frozen=True)
class Layout:
    """How a model processes a trie: the arguments of each layer for all tokens and for the leaves, and what attends.

    `masks` are additive, one per layer, shape (positions, positions).
    """

    trie: TokenTrie
    token_arguments: Sequence[dict[str, Any]]
    leaf_arguments: Sequence[dict[str, Any]]
    token_pattern: AttentionPattern
    leaf_pattern: AttentionPattern
    masks: Sequence[torch.Tensor]


class StagedModel:
    """The causal language model of a checkpoint, without weights.

    `stages` names the tensors of the checkpoint that each stage uses. Those of `vocabulary_names`, in the last stage,
    have a row for each token. Raises UnsupportedModelError for a model that cannot be run this way.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION_NAME, trie_attention)
        self.dtype, self.device = dtype, device
        self._where = str(checkpoint)
        self._model = model_without_weights(checkpoint, dtype=dtype, attention=ATTENTION_NAME)
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        embedding = self._model.get_input_embeddings()
        embedding.padding_idx = None  # an index into all rows, and only the rows in use are loaded
        self.embedding_name = weight_name(self._model, embedding)
        self._head_name = head_name(self._model)
        self.head_name = self.embedding_name if is_tied(checkpoint, self._model) else self._head_name
        self.vocabulary, self.width = checkpoint[self.head_name].shape
        self._layers, self._slots, self._prefix = self._replace_layers(checkpoint)
        self.vocabulary_names = (self.head_name, self._head_name.removesuffix("weight") + "bias")
        self.stages = self._name_stages()

    @property
    def name(self) -> str:
        return type(self._model).__name__

    def lay_out(self, trie: TokenTrie) -> Layout:
        """How the model processes `trie`. Raises UnsupportedModelError where a layer's mask cannot be read."""
        length = trie.max_length
        depths = torch.tensor([trie.depths])  # (1, tokens)
        leaf_depths = depths[:, torch.tensor(trie.leaves)]  # (1, leaves)
        with self._eager_attention():
            arguments = self._layer_arguments(torch.arange(length)[None])
        masks = [each.get("attention_mask") for each in arguments]
        known = [
            mask[0, 0] for mask in masks if isinstance(mask, torch.Tensor) and mask.shape == (1, 1, length, length)
        ]
        if len(known) < len(masks):
            raise self._unsupported("unknown-mask", f"the attention masks of {self.name} cannot be read")
        leaf_runs = [QueryRun((leaf,), path) for leaf, path in enumerate(trie.paths_to(trie.leaves))]
        return Layout(
            trie,
            token_arguments=self._layer_arguments(depths),
            leaf_arguments=self._layer_arguments(leaf_depths),
            token_pattern=AttentionPattern.of((QueryRun(*segment) for segment in trie.segments), self.device),
            leaf_pattern=AttentionPattern.of(leaf_runs, self.device),
            masks=known,
        )

    def embed(self, layout: Layout, weights: Weights) -> torch.Tensor:
        """The input of the first layer, shape (1, tokens, width).

        Of the embedding, `weights` has only the `embedding_rows` of the trie's ids.
        """
        rows = {token_id: row for row, token_id in enumerate(embedding_rows(layout.trie.ids))}
        ids = torch.tensor([[rows[token_id] for token_id in layout.trie.ids]], device=self.device)
        inputs: list[torch.Tensor] = []

        def record(hidden: torch.Tensor, _: dict[str, Any]) -> torch.Tensor:
            inputs.append(hidden)
            return hidden

        with self._layers_replaced({0: record}):
            self._forward(weights, input_ids=ids, position_ids=torch.tensor([layout.trie.depths], device=self.device))
        return inputs[0]

    def run_layer(self, number: int, layout: Layout, weights: Weights, states: torch.Tensor) -> torch.Tensor:
        """A layer's output for states of shape (states, tokens, width), in the same shape; of the last, (…, leaves, …).

        The last layer needs the keys and values of all tokens, but everything else only for the leaves.
        """
        mask = layout.masks[number]
        if number < len(self._layers) - 1:
            attention = TrieAttention(layout.token_pattern, mask)
            return self._run_layer(number, weights, states, layout.token_arguments[number], attention)
        key, value = self._capture_keys_values(number, weights, states, layout.token_arguments[number])
        leaves = states[:, torch.tensor(layout.trie.leaves, device=self.device)]
        attention = LeafAttention(layout.leaf_pattern, mask, key=key, value=value)
        return self._run_layer(number, weights, leaves, layout.leaf_arguments[number], attention)

    def logits(self, states: torch.Tensor, weights: Weights) -> torch.Tensor:
        """Logits, caps and scales included, from the last layer's states.

        (states, leaves, width) → (states, leaves, rows), the rows of the head that `weights` has.
        """
        weights = {self._head_name if name == self.head_name else name: tensor for name, tensor in weights.items()}
        unused_ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with self._layers_replaced({len(self._layers) - 1: lambda *_: states}):
            return self._forward(weights, input_ids=unused_ids)

    def reference_states(
        self, contexts: Sequence[Sequence[int]], stage_weights: Callable[[int], Weights]
    ) -> torch.Tensor:
        """The last layer's states at the end of each context, by the model's own forward: (1, contexts, width).

        One padded batch, with transformers' own masks and attention. `stage_weights` is called for one stage after the
        other; of the embedding it returns only the `embedding_rows` of the contexts.
        """
        longest = max(map(len, contexts))
        rows = {token_id: row for row, token_id in enumerate(embedding_rows(t for ids in contexts for t in ids))}
        ids = torch.zeros(len(contexts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, context in enumerate(contexts):
            ids[number, : len(context)] = torch.tensor([rows[token_id] for token_id in context])
            mask[number, : len(context)] = 1
        outputs: list[torch.Tensor] = []  # of the latest layer only

        def running(number: int) -> LayerCall:
            def run(hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
                outputs[:] = [self._call_layer(number, stage_weights(number + 1), hidden, arguments)]
                return outputs[0]

            return run

        with self._eager_attention(), self._layers_replaced({k: running(k) for k in range(len(self._layers))}):
            self._forward(stage_weights(0), input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        ends = torch.tensor([len(context) - 1 for context in contexts], device=self.device)
        # (contexts, longest, width) -> (1, contexts, width)
        return outputs[0][torch.arange(len(contexts), device=self.device), ends][None]

    def _replace_layers(self, checkpoint: Checkpoint) -> "tuple[list[torch.nn.Module], list[_LayerSlot], str]":
        """Put slots in the place of the layers; returns the layers, the slots, and the prefix of the layers' names."""
        stack, found = checkpoint.stack, None
        if stack is not None:
            with suppress(AttributeError):
                found = self._model.get_submodule(stack.prefix)
        if stack is None or not isinstance(found, torch.nn.ModuleList) or len(found) != stack.count:
            what = f"its layers are not where {self.name} has them"
            raise self._unsupported("layers-elsewhere", what)
        layers = list(found)
        slots = [_LayerSlot(layer) for layer in layers]
        for number, slot in enumerate(slots):
            found[number] = slot
        return layers, slots, stack.prefix

    def _name_stages(self) -> tuple[tuple[str, ...], ...]:
        outer = [name for name, _ in self._model.named_parameters(remove_duplicate=False)]
        head = [name for name in self.vocabulary_names if name in outer]
        shared = [name for name in outer if name not in (self.embedding_name, self._head_name, *head)]
        layers = (
            tuple(f"{self._prefix}.{number}.{inner}" for inner, _ in layer.named_parameters())
            for number, layer in enumerate(self._layers)
        )
        return ((self.embedding_name, *shared), *layers, (*head, *shared))

    def _layer_arguments(self, positions: torch.Tensor) -> list[dict[str, Any]]:
        """The keyword arguments of every layer for tokens at these positions, shape (1, tokens)."""
        arguments: list[dict[str, Any]] = []

        def record(hidden: torch.Tensor, layer_arguments: dict[str, Any]) -> torch.Tensor:
            arguments.append(layer_arguments)
            return hidden

        ids = torch.zeros_like(positions, device=self.device)
        with self._layers_replaced(dict.fromkeys(range(len(self._layers)), record)):
            try:
                self._forward({}, input_ids=ids, position_ids=positions.to(self.device))
            except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:  # the model's own code
                what = f"{self.name} does not pass one tensor from layer to layer ({first_line(error)})"
                raise self._unsupported("unsupported-layer-call", what) from error
        return arguments

    def _capture_keys_values(
        self, number: int, weights: Weights, states: torch.Tensor, arguments: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and the values of a layer for all tokens, shape (states, groups, tokens, width) each."""
        capture: LayerAttention = KeyValueCapture()
        try:
            self._call_layer(number, weights, states, {**arguments, "trie": capture})
        except CapturedKeyValues as captured:
            return captured.key, captured.value
        raise self._unsupported("attention-not-called-once", f"layer {number} of {self.name} calls no attention")

    def _run_layer(
        self, number: int, weights: Weights, states: torch.Tensor, arguments: dict[str, Any], attention: TrieAttention
    ) -> torch.Tensor:
        output = self._call_layer(number, weights, states, {**arguments, "trie": attention})
        if attention.calls != 1 or not isinstance(output, torch.Tensor):
            what = f"layer {number} of {self.name} calls attention {attention.calls} times, not once"
            raise self._unsupported("attention-not-called-once", what)
        return output

    def _call_layer(
        self, number: int, weights: Weights, states: torch.Tensor, arguments: dict[str, Any]
    ) -> torch.Tensor:
        prefix_length = len(f"{self._prefix}.{number}.")
        inner = {name[prefix_length:]: tensor for name, tensor in weights.items()}
        layer = self._layers[number]
        try:
            output: torch.Tensor = torch.func.functional_call(layer, inner, (states,), arguments, tie_weights=False)
        except TypeError as error:  # an argument that the layer, or something in it, does not take
            what = f"{type(layer).__name__} cannot be run by itself ({error})"
            raise self._unsupported("unsupported-layer-call", what) from error
        return output

    def _forward(self, weights: Weights, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits by the model's own forward with these weights; parameters that are not given are zeros.

        Of an embedding and a head that are not given there is one row, so that their logits cost nothing.
        """
        one_row = (self.embedding_name, self._head_name, *self.vocabulary_names)
        zeros = {
            name: torch.zeros(
                (1, *parameter.shape[1:]) if name in one_row else parameter.shape, dtype=self.dtype, device=self.device
            )
            for name, parameter in self._model.named_parameters(remove_duplicate=False)
            if name not in weights
        }
        arguments = {**inputs, "use_cache": False}
        output = torch.func.functional_call(self._model, {**zeros, **weights}, (), arguments, tie_weights=False)
        logits: torch.Tensor = output.logits
        return logits

    @contextmanager
    def _eager_attention(self) -> Iterator[None]:
        """Use transformers' own attention, and the masks that belong to it."""
        self._model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self._model.set_attn_implementation(ATTENTION_NAME)

    @contextmanager
    def _layers_replaced(self, calls: Mapping[int, LayerCall]) -> Iterator[None]:
        """Calls of these layers go to `calls`; the other layers return their input."""
        for number, call in calls.items():
            self._slots[number].call = call
        try:
            yield
        finally:
            for number in calls:
                self._slots[number].call = _return_input

    def _unsupported(self, code: str, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(Problem(code, self._where, what, REMEDY))


def embedding_rows(token_ids: Iterable[int]) -> list[int]:
    """The rows of the embedding that these tokens need, in order."""
    return sorted(set(token_ids))


def _return_input(hidden: torch.Tensor, _: dict[str, Any]) -> torch.Tensor:
    return hidden


class _LayerSlot(torch.nn.Module):
    """Takes the place of a layer in its model; has the attributes of the layer, but not its parameters."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # not a submodule, whose parameters would count
        self.call: LayerCall = _return_input

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: torch.Tensor, *positional: Any, **arguments: Any) -> torch.Tensor:
        if positional:
            what = "is called with positional arguments, which are not supported"
            kind = type(self.__dict__["layer"]).__name__
            raise UnsupportedModelError(Problem("unsupported-layer-call", kind, what, REMEDY))
        return self.call(hidden_states, arguments)
