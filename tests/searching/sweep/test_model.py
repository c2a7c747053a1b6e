"""A model run stage by stage, compared with the same model whole."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slrmerge.checkpoint.base import Checkpoint
from slrmerge.checkpoint.layers import LayerStack
from slrmerge.checkpoint.pair import open_checkpoint
from slrmerge.errors import UnsupportedModelError
from slrmerge.searching.sweep.model import StagedModel, embedding_rows
from slrmerge.searching.sweep.trie import pack
from tests.problems import refused
from tests.searching.sweep.models import (
    ARCHITECTURES,
    LAYERS,
    VOCABULARY,
    WIDTH,
    WINDOW,
    config_of,
    contexts,
    random_model,
)

CPU = torch.device("cpu")


def staged(folder: Path, dtype: torch.dtype = torch.float32) -> StagedModel:
    return StagedModel(open_checkpoint(folder), dtype=dtype, device=CPU)


def written(folder: Path, architecture: str, **more: Any) -> Any:
    """A model, saved in `folder`."""
    model = random_model(config_of(architecture, **more), seed=0)
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def watched(whole: Any, tokens: Sequence[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What goes into the first layer and comes out of each, and the logits at the end."""
    inside: list[torch.Tensor] = []
    first, *_ = layers = whole.model.layers
    hooks = [first.register_forward_pre_hook(lambda _, given: inside.append(given[0]))]
    hooks += [layer.register_forward_hook(lambda *seen: inside.append(seen[-1])) for layer in layers]
    logits = whole(input_ids=torch.tensor([tokens])).logits[0, -1]
    for hook in hooks:
        hook.remove()
    return inside, logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_stages_name_exactly_the_tensors_of_the_checkpoint(tmp_path: Path, architecture: str, tied: bool) -> None:
    written(tmp_path, architecture, tie_word_embeddings=tied)
    checkpoint, model = open_checkpoint(tmp_path), staged(tmp_path)
    first, *layers, last = model.stages
    assert {name for stage in model.stages for name in stage} == set(checkpoint.weight_map)
    assert len(layers) == LAYERS
    for number, stage in enumerate(layers):
        assert len(set(stage)) == len(stage)
        assert set(stage) == {name for name in checkpoint.weight_map if f".layers.{number}." in name}
    assert first == ("model.embed_tokens.weight", "model.norm.weight")
    assert last == ("model.embed_tokens.weight" if tied else "lm_head.weight", "model.norm.weight")
    assert (model.width, model.vocabulary) == (WIDTH, VOCABULARY)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_after_each_stage_are_those_of_the_whole_model(tmp_path: Path, architecture: str) -> None:
    whole, model = written(tmp_path, architecture), staged(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    ids = [context.ids for context in contexts()]
    layout = model.lay_out(pack(ids))
    rows = {stage: {name: stored[name] for name in names} for stage, names in enumerate(model.stages)}
    rows[0][model.embedding_name] = rows[0][model.embedding_name][embedding_rows(layout.trie.ids)]
    states = [model.embed(layout, rows[0])]
    for number in range(LAYERS):
        with torch.inference_mode():
            states.append(model.run_layer(number, layout, rows[number + 1], states[-1]))
    paths = layout.trie.paths_to(layout.trie.leaves)
    for context, (tokens, path) in enumerate(zip(ids, paths, strict=True)):
        inside, logits = watched(whole, tokens)
        for expected, found in zip(inside[:-1], states[:-1], strict=True):
            torch.testing.assert_close(found[0, list(path)], expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states[-1][0, context], inside[-1][0, -1], rtol=1e-4, atol=1e-5)
        with torch.inference_mode():
            found = model.logits(states[-1], rows[LAYERS + 1])[0, context]
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_logits_of_some_rows_are_some_of_the_logits(tmp_path: Path, architecture: str) -> None:
    written(tmp_path, architecture)
    model, stored = staged(tmp_path), load_file(tmp_path / "model.safetensors")
    states = torch.randn(2, 3, WIDTH)
    weights = {name: stored[name] for name in model.stages[-1]}
    with torch.inference_mode():
        whole = model.logits(states, weights)
        some = model.logits(states, weights | {model.head_name: weights[model.head_name][10:20]})
    assert whole.shape == (2, 3, VOCABULARY)
    torch.testing.assert_close(some, whole[:, :, 10:20])


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "mistral"])
def test_the_reference_forward_gives_the_states_at_the_end_of_each_context(tmp_path: Path, architecture: str) -> None:
    """All contexts are one padded batch; padding changes nothing."""
    whole, model = written(tmp_path, architecture), staged(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    ids = [context.ids for context in contexts()]
    stages: list[int] = []

    def weights(stage: int) -> dict[str, torch.Tensor]:
        stages.append(stage)
        given = {name: stored[name] for name in model.stages[stage]}
        if stage == 0:
            given[model.embedding_name] = given[model.embedding_name][embedding_rows(t for p in ids for t in p)]
        return given

    with torch.inference_mode():
        states = model.reference_states(ids, weights)
        logits = model.logits(states, {name: stored[name] for name in model.stages[-1]})
        assert stages == list(range(LAYERS + 1))
        for number, tokens in enumerate(ids):
            expected = whole(input_ids=torch.tensor([tokens])).logits[0, -1]
            torch.testing.assert_close(logits[0, number], expected, rtol=1e-4, atol=1e-5)


def test_sliding_layers_have_the_mask_of_their_window(tmp_path: Path) -> None:
    written(tmp_path, "gemma3_text")
    layout = staged(tmp_path).lay_out(pack([context.ids for context in contexts()]))
    longest = layout.trie.max_length
    assert longest > WINDOW
    places = torch.arange(longest)
    gap = places[:, None] - places[None]
    for number, mask in enumerate(layout.masks):
        allowed = (gap >= 0) & (gap < WINDOW) if number % 2 == 0 else gap >= 0
        assert torch.equal(mask == 0, allowed)
        assert (mask[~allowed] < -1e30).all()


def test_layers_elsewhere_in_the_checkpoint_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "llama")
    for stack in (None, LayerStack("model.blocks", LAYERS), LayerStack("model.layers", LAYERS - 1)):
        monkeypatch.setattr(Checkpoint, "stack", stack)
        with refused(UnsupportedModelError, "layers-elsewhere"):
            staged(tmp_path)
