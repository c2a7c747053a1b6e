"""Models without weights, and those that are refused by their config."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slrmerge.checkpoint.opening import open_checkpoint
from slrmerge.errors import UnsupportedModelError
from slrmerge.searching.sweep.architecture import model_without_weights
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint
from tests.problems import refused
from tests.searching.sweep.families import small_config
from tests.searching.sweep.models import (
    ARCHITECTURES,
    LAYERS,
    config_of,
    edit_config,
    random_model,
)


def build(folder: Path) -> Any:
    return model_without_weights(open_checkpoint(folder), dtype=torch.float32)


def write_model(folder: Path, architecture: str, **more: Any) -> Path:
    random_model(config_of(architecture, **more), seed=0).save_pretrained(folder)
    return folder


def assert_refused(folder: Path, *codes: str) -> list[str]:
    """The model in `folder` is refused with problems of these codes; returns what they say."""
    with refused(UnsupportedModelError, *codes) as caught:
        build(folder)
    assert {problem.where for problem in caught.value.problems} == {str(folder)}
    return [problem.what for problem in caught.value.problems]


BY_CONFIG: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "shared keys and values": (
        "gemma3n_text",
        {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
        ["shared-keys-and-values"],
    ),
    "shared keys and values of single layers": (
        "mistral_large4",
        {"text_config": {"num_hidden_layers": LAYERS, "kv_source_layers": [0, 1, 0, 1]}},
        ["shared-keys-and-values"],
    ),
    "encoder and decoder": ("t5", {"num_layers": LAYERS}, ["encoder-decoder"]),
    "no text": ("vit", {}, ["no-language-model"]),
    "quantized": ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantized-model"]),
    "quantized under the older key": ("llama", {"compression_config": {"format": "int"}}, ["quantized-model"]),
    "two problems": (
        "gemma3n_text",
        {"num_kv_shared_layers": 2, "layer_types": ["full_attention"] * 4, "compression_config": {"format": "int"}},
        ["quantized-model", "shared-keys-and-values"],
    ),
}


def test_the_layers_that_share_keys_and_values_are_counted(tmp_path: Path) -> None:
    for architecture, more in (BY_CONFIG[name][:2] for name in BY_CONFIG if name.startswith("shared")):
        config = config_of(architecture, **more).to_dict()
        post = write_checkpoint(tmp_path / architecture, llama_tensors("post", layers=LAYERS), config)
        (what,) = assert_refused(post, "shared-keys-and-values")
        assert what.startswith("2 of its layers")


@pytest.mark.parametrize(("architecture", "more", "codes"), BY_CONFIG.values(), ids=BY_CONFIG)
def test_unsupported_configs_are_refused(
    tmp_path: Path, architecture: str, more: dict[str, Any], codes: list[str]
) -> None:
    config = config_of(architecture, **more).to_dict()
    write_checkpoint(tmp_path / "post", llama_tensors("post", layers=LAYERS), config)
    assert_refused(tmp_path / "post", *codes)


def test_a_config_with_a_word_for_a_number_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "post", "llama")
    edit_config(tmp_path / "post", rms_norm_eps="very small")
    assert_refused(tmp_path / "post", "config-not-readable")


def test_custom_code_is_refused_and_not_run(tmp_path: Path) -> None:
    code = "raise SystemExit('this was run')\n"
    config = {**llama_config(layers=LAYERS), "model_type": "house_made"}
    config |= {"auto_map": {"AutoConfig": "house.HouseConfig", "AutoModelForCausalLM": "house.HouseForCausalLM"}}
    post = write_checkpoint(
        tmp_path / "post", llama_tensors("post", layers=LAYERS), config, side_files={"house.py": code}
    )
    (what,) = assert_refused(post, "config-not-readable")
    assert "custom code" in what
    assert "\n" not in what


def test_a_model_type_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    config = {**llama_config(layers=LAYERS), "model_type": "house_made"}
    post = write_checkpoint(tmp_path / "post", llama_tensors("post", layers=LAYERS), config)
    (what,) = assert_refused(post, "config-not-readable")
    assert "model type" in what
    assert "\n" not in what


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_are_on_meta_and_buffers_have_their_values(tmp_path: Path, architecture: str) -> None:
    post = write_model(tmp_path / "post", architecture)
    built, loaded = build(post), random_model(config_of(architecture), seed=0)
    assert {parameter.device.type for parameter in built.parameters()} == {"meta"}
    assert not built.training
    buffers = dict(built.named_buffers())
    assert buffers.keys() == dict(loaded.named_buffers()).keys()
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffers[name], buffer)


def test_parameters_are_made_as_usual_after_building(tmp_path: Path) -> None:
    build(write_model(tmp_path / "post", "llama"))
    assert torch.nn.Linear(1, 1).weight.device.type == "cpu"
    edit_config(tmp_path / "post", hidden_act="no such thing")
    with refused(UnsupportedModelError, "model-not-buildable"):
        build(tmp_path / "post")
    assert torch.nn.Linear(1, 1).weight.device.type == "cpu"


@pytest.mark.parametrize(("architecture", "kind"), [("gemma3", "Gemma3ForConditionalGeneration"), ("llava", "Llava")])
def test_a_model_with_a_vision_tower_is_built_whole(tmp_path: Path, architecture: str, kind: str) -> None:
    small_config(architecture).save_pretrained(tmp_path)
    write_checkpoint(tmp_path / "post", llama_tensors("post"), json.loads((tmp_path / "config.json").read_text()))
    assert type(build(tmp_path / "post")).__name__.startswith(kind)
