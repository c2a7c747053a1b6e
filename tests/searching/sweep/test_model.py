"""A model run stage by stage, and the models that cannot be: every guard with a model that needs it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama import modeling_llama

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.layers import LayerStack
from slrmerge.checkpoint.opening import open_checkpoint
from slrmerge.errors import UnsupportedModelError
from slrmerge.searching.sweep.layouts import lay_out
from tests.problems import refused
from tests.searching.sweep.families import small_config
from tests.searching.sweep.models import (
    ARCHITECTURES,
    LAYERS,
    VOCABULARY,
    WIDTH,
    WINDOW,
    config_of,
    contexts,
    random_model,
    staged,
)


def written(folder: Path, architecture: str, **more: Any) -> Any:
    """A model, saved in `folder`."""
    model = random_model(config_of(architecture, **more), seed=0)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, to be read only."""
    folder = tmp_path_factory.mktemp("llama")
    written(folder, "llama")
    return folder


# stages


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_stage_names_the_tensors_that_it_uses(tmp_path: Path, architecture: str, tied: bool) -> None:
    written(tmp_path, architecture, tie_word_embeddings=tied)
    checkpoint, model = open_checkpoint(tmp_path), staged(tmp_path)
    first, *layers, last = model.stages
    assert {name for stage in model.stages for name in stage} == set(checkpoint.weight_map)
    assert [set(stage) for stage in layers] == [
        {name for name in checkpoint.weight_map if f".layers.{number}." in name} for number in range(LAYERS)
    ]
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert (first, set(last)) == (("model.embed_tokens.weight",), {head, "model.norm.weight"})
    assert model.by_row == (first, (head,))
    assert (model.width, model.vocabulary, model.why_rows) == (WIDTH, VOCABULARY, None)


def test_a_stage_leaves_out_what_text_does_not_use(tmp_path: Path) -> None:
    """Neither a vision tower nor its projector is read for text."""
    random_model(small_config("gemma3"), seed=0).save_pretrained(tmp_path)
    model = staged(tmp_path)
    used = {name for stage in model.stages for name in stage}
    assert any("vision_tower" in name for name in open_checkpoint(tmp_path))
    assert [name for name in used if "vision" in name or "projector" in name] == []


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_logits_of_some_rows_are_some_of_the_logits(tmp_path: Path, architecture: str) -> None:
    written(tmp_path, architecture)
    model, stored = staged(tmp_path), load_file(tmp_path / "model.safetensors")
    states = torch.randn(2, 3, WIDTH)
    by_row = model.by_row[1]
    others = model.weights({name: stored[name] for name in model.stages[-1] if name not in by_row})
    whole = model.logits(states, others | model.row_weights({name: stored[name] for name in by_row}))
    some = model.logits(states, others | model.row_weights({name: stored[name][10:20] for name in by_row}))
    assert whole.shape == (2, 3, VOCABULARY)
    torch.testing.assert_close(some, whole[:, :, 10:20])


def test_sliding_layers_have_the_mask_of_their_window(tmp_path: Path) -> None:
    written(tmp_path, "gemma3_text")
    layout: Any = lay_out(staged(tmp_path), contexts(), chunk_tokens=1000)
    longest = layout.trie.max_length
    assert longest > WINDOW
    places = torch.arange(longest)
    gap = places[:, None] - places[None]
    for number, mask in enumerate(layout.masks):
        allowed = (gap >= 0) & (gap < WINDOW) if number % 2 == 0 else gap >= 0
        assert torch.equal(mask == 0, allowed)
        assert (mask[~allowed] < -1e30).all()


# what a checkpoint must have


def test_layers_elsewhere_in_the_checkpoint_are_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stack in (None, LayerStack("model.blocks", LAYERS), LayerStack("model.layers", LAYERS - 1)):
        monkeypatch.setattr(Checkpoint, "stack", stack)
        with refused(UnsupportedModelError, "layers-elsewhere"):
            staged(llama)


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_tensors_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    written(tmp_path, "llama")
    change(tmp_path, lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 4)}))
    with refused(UnsupportedModelError, "parameter-mismatch") as caught:
        staged(tmp_path)
    assert "model.layers.1.mlp.up_proj.weight of shape [64, 32], the checkpoint has [3, 4]" in str(caught.value)


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_refused_by_name(tmp_path: Path, name: str) -> None:
    """transformers would initialise it at random."""
    written(tmp_path, "llama")
    change(tmp_path, lambda tensors: tensors.pop(name))
    with refused(UnsupportedModelError, "parameter-mismatch") as caught:
        staged(tmp_path)
    assert name in str(caught.value)


# what a model must do: each guard with a Llama that is changed so


Forward = Callable[..., Any]


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, Callable[[Forward], Forward]], None]:
    """Change the forward of a class of transformers."""

    def patch(kind: type, change: Callable[[Forward], Forward]) -> None:
        monkeypatch.setattr(kind, "forward", change(kind.forward))  # type: ignore[attr-defined]

    return patch


def layers_share_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = modeling_llama.LlamaModel.__init__

    def sharing(self: Any, config: Any) -> None:
        init(self, config)
        self.layers[2].mlp = self.layers[0].mlp

    monkeypatch.setattr(modeling_llama.LlamaModel, "__init__", sharing)


def weights_of_layers_are_tied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = modeling_llama.LlamaForCausalLM.__init__

    def tying(self: Any, config: Any) -> None:
        init(self, config)
        self.all_tied_weights_keys = {f"model.layers.{n}.mlp.up_proj.weight": "lm_head.weight" for n in (1, 2)}

    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "__init__", tying)


def states_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_loop(monkeypatch, lambda number, hidden, first, extra: hidden * 0.5 if number == 2 else hidden)


def layers_see_earlier_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_loop(monkeypatch, lambda number, hidden, first, extra: extra.update(seen=hidden) or hidden)


def layers_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = modeling_llama.LlamaModel.forward

    def twice(self: Any, *args: Any, **kwargs: Any) -> Any:
        forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", twice)


def layers_return_a_wider_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = modeling_llama.LlamaDecoderLayer.forward
    monkeypatch.setattr(
        modeling_llama.LlamaDecoderLayer, "forward", lambda *args, **kwargs: forward(*args, **kwargs)[..., None]
    )


def layers_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_loop(monkeypatch, lambda number, hidden, first, extra: hidden, count=LAYERS - 1)


def layers_get_several_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_loop(monkeypatch, lambda number, hidden, first, extra: hidden[:, :, None] if number == 1 else hidden)


def layers_cannot_be_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_loop(monkeypatch, lambda number, hidden, first, extra: hidden.no_such_attribute)


def a_tensor_is_located(monkeypatch: pytest.MonkeyPatch, tensor: str, place: tuple[int, str] | None) -> None:
    locate = LayerStack.locate
    monkeypatch.setattr(LayerStack, "locate", lambda self, name: place if name == tensor else locate(self, name))


def a_tensor_outside_the_layers_is_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_tensor_is_located(monkeypatch, "model.layers.3.mlp.up_proj.weight", None)


def a_tensor_of_a_layer_is_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_tensor_is_located(monkeypatch, "model.norm.weight", (0, "norm.weight"))


def replace_loop(monkeypatch: pytest.MonkeyPatch, between: Callable[..., torch.Tensor], *, count: int = LAYERS) -> None:
    """Run the layers with something between them, and with one more argument."""

    def forward(self: Any, input_ids: torch.Tensor, position_ids: Any = None, **kwargs: Any) -> Any:
        hidden = first = self.embed_tokens(input_ids)
        positions = torch.arange(hidden.shape[1])[None] if position_ids is None else position_ids
        rotary = self.rotary_emb(hidden, position_ids=positions)
        mask = modeling_llama.create_causal_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=positions
        )
        extra: dict[str, Any] = {}
        for number, layer in enumerate(self.layers[:count]):
            hidden = between(number, hidden, first, extra)
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, **extra)
        return modeling_llama.BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)


GUARDS = {
    "shared-weights": layers_share_a_weight,
    "shared-weights: tied": weights_of_layers_are_tied,
    "states-change-between-layers": states_change,
    "layers-depend-on-layers": layers_see_earlier_outputs,
    "layers-not-in-order": layers_run_twice,
    "layers-not-in-order: skipped": layers_are_skipped,
    "unknown-layer-output": layers_return_a_wider_state,
    "unknown-layer-input": layers_get_several_states,
    "unsupported-layer-call": layers_cannot_be_called,
    "layers-not-separate: inner": a_tensor_outside_the_layers_is_in_one,
    "layers-not-separate: outer": a_tensor_of_a_layer_is_outside,
}
"""By the code of the refusal, and what tells guards of one code apart."""


@pytest.mark.parametrize(("code", "edit"), GUARDS.items(), ids=GUARDS)
def test_a_model_that_cannot_be_run_stage_by_stage_is_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, edit: Callable[..., None]
) -> None:
    staged(llama)
    edit(tmp_path, monkeypatch)
    with refused(UnsupportedModelError, code.partition(":")[0]) as caught:
        staged(llama)
    assert caught.value.problems[0].where == str(llama)


def shifted_by_place(number: int, hidden: torch.Tensor, first: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
    return hidden + torch.arange(hidden.shape[1])[:, None] if number == 0 else hidden


def with_places(number: int, hidden: torch.Tensor, first: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
    extra["places"] = torch.arange(hidden.shape[1])
    return hidden


ODD_LOOPS = {
    "does not follow the positions": shifted_by_place,
    "more than positions": with_places,
}


@pytest.mark.parametrize(("why", "between"), ODD_LOOPS.items(), ids=ODD_LOOPS)
def test_a_loop_that_a_trie_does_not_fit_leads_to_rows(
    llama: Path, monkeypatch: pytest.MonkeyPatch, why: str, between: Callable[..., torch.Tensor]
) -> None:
    replace_loop(monkeypatch, between)
    assert why in (staged(llama).why_rows or "")


def test_an_argument_that_depends_on_the_embedding_leads_to_rows(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_loop(monkeypatch, lambda number, hidden, first, extra: extra.update(first=first) or hidden)
    why = staged(llama).why_rows
    assert why is not None
    assert "embedding" in why
