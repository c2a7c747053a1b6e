"""Weights by transformers' own conversion: what its loader gives, and the internal API that this depends on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, core_model_loading

from slrmerge.checkpoint.opening import open_checkpoint
from slrmerge.errors import UnsupportedModelError
from slrmerge.searching.sweep.architecture import model_without_weights
from slrmerge.searching.sweep.loading import WeightLoader
from tests.problems import refused
from tests.searching.sweep.families import small_config
from tests.searching.sweep.models import CPU, random_model


def written(folder: Path, architecture: str) -> Any:
    model = random_model(small_config(architecture), seed=0)
    model.save_pretrained(folder)
    return model


def loader(folder: Path, dtype: torch.dtype = torch.float32) -> WeightLoader:
    model = model_without_weights(open_checkpoint(folder), dtype=dtype)
    return WeightLoader(model, where=str(folder), dtype=dtype, device=CPU)


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "apertus", "gpt_oss", "qwen3_next"])
def test_weights_are_those_of_a_loaded_model(tmp_path: Path, architecture: str) -> None:
    """Among them experts that are stored one by one, renamed tensors, and buffers that are stored."""
    written(tmp_path, architecture)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    loaded = loader(tmp_path).load(load_file(tmp_path / "model.safetensors"))
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_loading_in_parts_gives_the_same_and_leaves_the_loader_as_it_was(tmp_path: Path) -> None:
    written(tmp_path, "mixtral")
    stored, made = load_file(tmp_path / "model.safetensors"), loader(tmp_path)
    whole, parts = made.load(stored), {}
    for number in range(4):
        parts |= made.load({name: tensor for name, tensor in stored.items() if f".layers.{number}." in name})
    assert parts.keys() == {name for name in whole if ".layers." in name}
    assert all(torch.equal(whole[name], tensor) for name, tensor in parts.items())
    assert made.load({}) == {}


def test_tensors_on_the_meta_device_give_weights_there(tmp_path: Path) -> None:
    written(tmp_path, "mixtral")
    stored = load_file(tmp_path / "model.safetensors")
    made = loader(tmp_path)
    on_meta = made.load({name: tensor.to("meta") for name, tensor in stored.items()})
    assert {tensor.device.type for tensor in on_meta.values()} == {"meta"}
    assert {name: tensor.shape for name, tensor in on_meta.items()} == {
        name: tensor.shape for name, tensor in made.load(stored).items()
    }


def test_placements_tell_conversions_from_plain_tensors(tmp_path: Path) -> None:
    written(tmp_path, "mixtral")
    placements = loader(tmp_path).placements(
        [*open_checkpoint(tmp_path), "model.layers.0.self_attn.rotary_emb.inv_freq"]
    )
    assert placements.keys() == {*open_checkpoint(tmp_path)}
    converted = {name for name, placement in placements.items() if placement.is_converted}
    assert converted == {name for name in placements if ".experts." in name}
    assert placements["lm_head.weight"].target == "lm_head.weight"


def test_another_internal_api_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "llama")
    loader(tmp_path)
    monkeypatch.setattr(core_model_loading, "convert_and_load_state_dict_in_model", lambda model, tensors: None)
    with refused(UnsupportedModelError, "unknown-transformers"):
        loader(tmp_path)
    monkeypatch.delattr(core_model_loading, "convert_and_load_state_dict_in_model")
    with refused(UnsupportedModelError, "unknown-transformers") as caught:
        loader(tmp_path)
    assert caught.value.problems[0].where == str(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "qwen3_next"])
def test_tensors_that_are_weights_unchanged_are_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, dtype: torch.dtype
) -> None:
    """transformers' conversion goes through the whole model for every call."""
    written(tmp_path, architecture)
    stored = load_file(tmp_path / "model.safetensors")
    made = loader(tmp_path, dtype)
    expected = made.load(stored)
    made.load({name: tensor.to("meta") for name, tensor in stored.items()})
    given: list[set[str]] = []
    convert = core_model_loading.convert_and_load_state_dict_in_model
    monkeypatch.setattr(
        core_model_loading,
        "convert_and_load_state_dict_in_model",
        lambda model, tensors, config: given.append({*tensors}) or convert(model, tensors, config),
    )
    loaded = made.load(stored)
    assert loaded.keys() == expected.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in expected.items()
    )
    converted = {name for name, placement in made.placements(stored).items() if placement.is_converted}
    assert given == ([converted] if converted else [])
