"""Tries and rows: which models have which, and the devices on which their tensors are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama import modeling_llama

from slrmerge.checkpoint.opening import open_checkpoint
from slrmerge.searching.sweep.embedding_rows import EmbeddingRows, rows_in_use
from slrmerge.searching.sweep.layouts import Layout, lay_out, token_count
from slrmerge.searching.sweep.rows import RowLayout
from slrmerge.searching.sweep.slots import _Slot
from slrmerge.searching.sweep.trie_layout import TrieLayout
from tests.searching.sweep.families import write_family
from tests.searching.sweep.models import CPU, contexts, staged

CONTEXTS = contexts()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose prompts are a trie, and one whose prompts are rows."""
    folder = tmp_path_factory.mktemp("layouts")
    for architecture in ("llama", "lfm2"):
        write_family(folder / architecture, architecture)
    return folder


@pytest.mark.parametrize(("architecture", "kind"), [("llama", TrieLayout), ("lfm2", RowLayout)])
def test_a_state_has_as_many_tokens_as_are_counted(pairs: Path, architecture: str, kind: type) -> None:
    model = staged(pairs / architecture / "post")
    layout = lay_out(model, CONTEXTS, chunk_tokens=100)
    assert isinstance(layout, kind)
    assert token_count(model, CONTEXTS) == layout.tokens == len(layout.token_ids)


def scaled_mask(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Attention that changes its mask by what it sees, as Doge's does."""

    def changed(self: Any, hidden_states: torch.Tensor, *args: Any, attention_mask: Any, **kwargs: Any) -> Any:
        mask = torch.zeros(1, 1, 1, 1) if attention_mask is None else attention_mask * 1
        return forward(self, hidden_states, *args, attention_mask=mask, **kwargs)

    return changed


def shifted(forward: Callable[..., Any]) -> Callable[..., Any]:
    """An MLP that sees the token before, as a recurrence does."""
    return lambda self, hidden: forward(self, hidden) + hidden.roll(1, dims=1)


def twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Attention that is computed once more."""
    return lambda *args, **kwargs: forward(*args, **kwargs) and forward(*args, **kwargs)


def overflowing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """An MLP whose output is no number, whatever the tokens are."""
    return lambda self, hidden: forward(self, hidden) * torch.inf


MIXING = {
    "mask": (modeling_llama.LlamaAttention, scaled_mask, "mask of its own"),
    "tokens": (modeling_llama.LlamaMLP, shifted, "mixes tokens"),
    "twice": (modeling_llama.LlamaAttention, twice, "calls attention 2 times"),
    "numbers": (modeling_llama.LlamaMLP, overflowing, "cannot be tried"),
}


@pytest.mark.parametrize(("kind", "change", "why"), MIXING.values(), ids=MIXING)
def test_a_layer_that_does_more_than_attend_leads_to_rows(
    pairs: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, change: Callable[..., Any], why: str
) -> None:
    assert staged(pairs / "llama" / "post").why_rows is None
    monkeypatch.setattr(kind, "forward", change(kind.forward))
    assert why in (staged(pairs / "llama" / "post").why_rows or "")


def without_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = modeling_llama.LlamaForCausalLM.forward
    monkeypatch.setattr(
        modeling_llama.LlamaForCausalLM,
        "forward",
        lambda self, input_ids, **others: forward(self, input_ids, **others),
    )


def without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **_: None)


def failing_where_a_position_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = modeling_llama.LlamaRotaryEmbedding.forward

    def strict(self: Any, hidden: torch.Tensor, position_ids: torch.Tensor) -> Any:
        if len(position_ids.unique()) < position_ids.numel():
            raise IndexError("a position comes twice")
        return forward(self, hidden, position_ids)

    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", strict)


def with_places_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model passes its layers one more argument by position, the layers ignore it."""
    call, forward = modeling_llama.LlamaDecoderLayer.__call__, modeling_llama.LlamaDecoderLayer.forward
    monkeypatch.setattr(_Slot, "__call__", lambda self, hidden, **named: call(self, hidden, None, **named))
    monkeypatch.setattr(
        modeling_llama.LlamaDecoderLayer,
        "forward",
        lambda self, hidden, _=None, **named: forward(self, hidden, **named),
    )


UNFIT = {
    "takes no positions": without_positions,
    "cannot be read": without_masks,
    "own code fails on a trie": failing_where_a_position_comes_twice,
    "called by position": with_places_by_position,
}


@pytest.mark.parametrize(("why", "change"), UNFIT.items(), ids=UNFIT)
def test_a_model_that_does_not_fit_a_trie_leads_to_rows(
    pairs: Path, monkeypatch: pytest.MonkeyPatch, why: str, change: Callable[[pytest.MonkeyPatch], None]
) -> None:
    change(monkeypatch)
    model = staged(pairs / "llama" / "post")
    assert why in (model.why_rows or "")
    assert isinstance(lay_out(model, CONTEXTS, chunk_tokens=100), RowLayout)


@pytest.mark.parametrize("architecture", ["llama", "lfm2"])
def test_every_tensor_is_made_on_the_device_of_the_model(pairs: Path, architecture: str) -> None:
    """With another default device, a tensor that is made without one meets the others and fails."""
    model = staged(pairs / architecture / "post")
    stored = {name: torch.randn(info.shape) for name, info in open_checkpoint(pairs / architecture / "post").items()}
    layers = [model.weights({name: stored[name] for name in stage}) for stage in model.stages[1:-1]]
    by_row = {name: stored[name] for name in (*model.by_row[0], *model.by_row[1])}
    norms = model.weights({name: stored[name] for name in model.stages[-1] if name not in by_row})

    def run() -> torch.Tensor:
        layout: Layout = lay_out(model, CONTEXTS, chunk_tokens=200)
        rows = rows_in_use(layout.token_ids)
        states = layout.embed(0, model.row_weights({name: by_row[name][rows] for name in model.by_row[0]}))[None]
        for number, weights in enumerate(layers):
            states = layout.run_layer(number, weights, states, 0)
        return model.logits(states, norms | model.row_weights({name: by_row[name] for name in model.by_row[1]}))

    expected = run()
    with torch.device("meta"):
        found = run()
    assert found.device == CPU
    torch.testing.assert_close(found, expected)


def test_an_embedding_of_some_rows_is_looked_up_by_token() -> None:
    whole = torch.nn.Embedding(9, 4, padding_idx=2)
    ids, used = torch.tensor([[7, 2, 2, 5]]), rows_in_use([7, 2, 2, 5])
    rows = whole.weight.detach()[used].clone()
    some = torch.nn.Embedding(9, 4, padding_idx=2)
    with EmbeddingRows(rows, used):
        found = torch.func.functional_call(some, {"weight": rows}, (ids,))
        other = whole(ids)
    assert used == [2, 5, 7]
    assert torch.equal(found, whole(ids))
    assert torch.equal(other, whole(ids))
