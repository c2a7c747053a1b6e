"""A model in stages, against the same model whole."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slrmerge.checkpoint import Checkpoint, LayerStack
from slrmerge.errors import UnsupportedModelError
from slrmerge.hub import open_checkpoint
from slrmerge.sweep.architecture import REMEDY
from slrmerge.sweep.model import StagedModel, rows_in_use
from slrmerge.sweep.trie import pack
from tests.sweep.models import (
    ARCHITECTURES,
    LAYERS,
    VOCABULARY,
    WIDTH,
    WINDOW,
    config_of,
    prompts,
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
def test_the_stages_name_every_tensor_of_the_checkpoint_and_no_other(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
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
def test_stage_by_stage_states_are_those_of_the_whole_model(tmp_path: Path, architecture: str) -> None:
    whole, model = written(tmp_path, architecture), staged(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    ids = [prompt.ids for prompt in prompts()]
    layout = model.lay_out(pack(ids))
    rows = {stage: {name: stored[name] for name in names} for stage, names in enumerate(model.stages)}
    rows[0][model.embedding_name] = rows[0][model.embedding_name][rows_in_use(layout.trie.ids)]
    states = [model.embed(layout, rows[0])]
    for number in range(LAYERS):
        with torch.inference_mode():
            states.append(model.run_layer(number, layout, rows[number + 1], states[-1]))
    paths = layout.trie.paths_of(layout.trie.leaves)
    for prompt, (tokens, path) in enumerate(zip(ids, paths, strict=True)):
        inside, logits = watched(whole, tokens)
        for expected, found in zip(inside[:-1], states[:-1], strict=True):
            torch.testing.assert_close(found[0, list(path)], expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(states[-1][0, prompt], inside[-1][0, -1], rtol=1e-4, atol=1e-5)
        with torch.inference_mode():
            found = model.logits(states[-1], rows[LAYERS + 1])[0, prompt]
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
def test_the_ordinary_way_gives_the_states_of_each_prompts_own_end(tmp_path: Path, architecture: str) -> None:
    """All prompts go in one padded batch; padding must not show."""
    whole, model = written(tmp_path, architecture), staged(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    ids = [prompt.ids for prompt in prompts()]
    asked: list[int] = []

    def weights(stage: int) -> dict[str, torch.Tensor]:
        asked.append(stage)
        given = {name: stored[name] for name in model.stages[stage]}
        if stage == 0:
            given[model.embedding_name] = given[model.embedding_name][rows_in_use(t for p in ids for t in p)]
        return given

    with torch.inference_mode():
        states = model.ordinary(ids, weights)
        logits = model.logits(states, {name: stored[name] for name in model.stages[-1]})
        assert asked == list(range(LAYERS + 1))
        for number, tokens in enumerate(ids):
            expected = whole(input_ids=torch.tensor([tokens])).logits[0, -1]
            torch.testing.assert_close(logits[0, number], expected, rtol=1e-4, atol=1e-5)


def test_sliding_layers_have_the_rule_of_their_window_and_others_see_all_before(tmp_path: Path) -> None:
    written(tmp_path, "gemma3_text")
    layout = staged(tmp_path).lay_out(pack([prompt.ids for prompt in prompts()]))
    longest = layout.trie.longest
    assert longest > WINDOW
    places = torch.arange(longest)
    gap = places[:, None] - places[None]
    for number, rule in enumerate(layout.rules):
        allowed = (gap >= 0) & (gap < WINDOW) if number % 2 == 0 else gap >= 0
        assert torch.equal(rule == 0, allowed)
        assert (rule[~allowed] < -1e30).all()


def test_layers_that_are_elsewhere_in_the_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "llama")
    expected = f"{tmp_path}: its layers are not where LlamaForCausalLM has them; {REMEDY}"
    for stack in (None, LayerStack("model.blocks", LAYERS), LayerStack("model.layers", LAYERS - 1)):
        monkeypatch.setattr(Checkpoint, "stack", stack)
        with pytest.raises(UnsupportedModelError) as caught:
            staged(tmp_path)
        assert str(caught.value) == expected
