"""Quantized pairs: scored as transformers loads them where it makes dense weights, and otherwise refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from slrmerge.checkpoint.opening import open_checkpoint, open_pair
from slrmerge.errors import PlanError, UnsupportedModelError
from slrmerge.searching.candidates import leave_out_blends, make_candidates
from slrmerge.searching.sweep.architecture import model_without_weights
from tests.problems import refused
from tests.searching.sweep.families import log_probs_of, mixed_by_hand, write_family
from tests.searching.sweep.models import (
    POST,
    PRE,
    Recorder,
    alphas_of,
    contexts,
    edit_config,
    gaps,
    hybrid,
    local_scorer,
    request,
)

BLOCK = 16
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
FEW = contexts()[1:4]


def to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in float8 and the scale of each of its blocks."""
    rows, columns = (size // BLOCK for size in weight.shape)
    blocks = weight.float().view(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / 448
    return (blocks / scales[:, None, :, None]).view(weight.shape).to(torch.float8_e4m3fn), scales


def write_fp8(folder: Path, architecture: str = "llama") -> Path:
    """A pair whose layers are in float8, and whose other tensors are in bfloat16."""
    write_family(folder, architecture, dtype=torch.bfloat16)
    for side in (folder / "pre", folder / "post"):
        tensors = load_file(side / "model.safetensors")
        for name, tensor in list(tensors.items()):
            if name.endswith("_proj.weight"):
                tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(tensor)
        save(side, tensors, FP8)
    return folder


def write_mxfp4(folder: Path) -> Path:
    """A gpt-oss pair whose experts are random numbers of four bits."""
    write_family(folder, "gpt_oss", dtype=torch.bfloat16)
    for seed, side in enumerate((folder / "pre", folder / "post")):
        generator = torch.Generator().manual_seed(seed)
        tensors = load_file(side / "model.safetensors")
        for name, tensor in list(tensors.items()):
            if name.endswith("_proj") and tensor.dim() == 3:
                experts, inputs, outputs = tensors.pop(name).shape
                for part, low, high, shape in (("blocks", 0, 256, (16,)), ("scales", 123, 126, ())):
                    shape = (experts, outputs, inputs // 32, *shape)
                    tensors[f"{name}_{part}"] = torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)
        save(side, tensors, MXFP4)
    return folder


def save(side: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    save_file(tensors, side / "model.safetensors", {"format": "pt"})
    edit_config(side, quantization_config=settings)


@pytest.mark.parametrize("quantized", ["fp8", "fp8 experts", "mxfp4"])
@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_hybrids_of_a_quantized_pair_are_scored_as_transformers_loads_them(tmp_path: Path, quantized: str) -> None:
    if quantized == "mxfp4":
        write_mxfp4(tmp_path)
    else:
        write_fp8(tmp_path, "llama" if quantized == "fp8" else "qwen3_moe")
    with local_scorer(tmp_path) as scorer:
        wanted = request(scorer, [POST, PRE, hybrid(restore=[1, 2])], FEW)
        log_probs = scorer.score(wanted, None, Recorder())
        scorer.check(alphas_of(scorer.pair, POST), FEW)
        assert scorer.model(torch.float32).by_row == (("model.embed_tokens.weight",), ("lm_head.weight",))
    folders = [tmp_path / "post", tmp_path / "pre", mixed_by_hand(tmp_path, 1, 2, "model.layers")]
    expected = np.stack([log_probs_of(folder, FEW) for folder in folders])
    assert max(gaps(log_probs, expected)) < 1e-5
    assert np.nanmax(np.abs(np.exp(log_probs[1]) - np.exp(log_probs[2]))) > 1e-3


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_packed_weights_cost_as_much_as_the_dense_ones(tmp_path: Path) -> None:
    """Two numbers of four bits are one element of a packed tensor."""
    write_family(tmp_path / "dense", "gpt_oss")
    write_mxfp4(tmp_path / "packed")
    shapes = []
    for folder in (tmp_path / "dense", tmp_path / "packed"):
        with local_scorer(folder) as scorer:
            shapes.append(scorer.shape(request(scorer, [POST], FEW)))
    assert shapes[0] == shapes[1]


def compressed(form: str, *bits: int) -> dict[str, Any]:
    groups = {str(number): {"targets": ["Linear"], "weights": {"num_bits": each}} for number, each in enumerate(bits)}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


REFUSED = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "(gptq)"),
    "awq": ({"quant_method": "awq", "bits": 4}, "(awq)"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "(bitsandbytes)"),
    "another format": (compressed("marlin-24", 4), "(compressed-tensors, marlin-24)"),
    "two groups": (compressed("pack-quantized", 4, 8), "(compressed-tensors, mixed-precision)"),
    "no groups": (compressed("pack-quantized"), "(compressed-tensors, mixed-precision)"),
    "transforms": (compressed("pack-quantized", 4) | {"transform_config": {"a": 1}}, "with transforms"),
    "not in the config": (None, "its config.json does not say so"),
}


@pytest.mark.parametrize(("settings", "what"), REFUSED.values(), ids=REFUSED)
def test_a_model_of_which_no_dense_weights_are_made_is_refused(tmp_path: Path, settings: Any, what: str) -> None:
    write_fp8(tmp_path)
    edit_config(tmp_path / "post", quantization_config=settings)
    with refused(UnsupportedModelError, "quantized-model") as caught:
        model_without_weights(open_checkpoint(tmp_path / "post"), dtype=torch.float32)
    assert what in caught.value.problems[0].what


def test_a_package_that_makes_dense_weights_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fp8(tmp_path)
    edit_config(tmp_path / "post", quantization_config=compressed("float-quantized", 8))
    monkeypatch.setattr("slrmerge.searching.sweep.architecture.find_spec", lambda _: None)
    with refused(UnsupportedModelError, "missing-extra") as caught:
        model_without_weights(open_checkpoint(tmp_path / "post"), dtype=torch.float32)
    assert caught.value.problems[0].remedy == "pip install compressed-tensors"


def test_what_belongs_to_a_quantized_weight_must_be_read(tmp_path: Path) -> None:
    write_fp8(tmp_path)
    for side in (tmp_path / "pre", tmp_path / "post"):
        tensors = load_file(side / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.input_scale"] = torch.ones(1)  # of activations
        tensors["model.layers.0.mlp.up_proj.weight_g_idx"] = torch.zeros(4, dtype=torch.int32)
        save_file(tensors, side / "model.safetensors", {"format": "pt"})
    with local_scorer(tmp_path) as scorer, refused(UnsupportedModelError, "quantized-model") as caught:
        scorer.cost(request(scorer, [POST], FEW))
    assert "would not read model.layers.0.mlp.up_proj.weight_g_idx" in caught.value.problems[0].what


def test_soups_of_a_quantized_pair_are_left_out_with_a_note(tmp_path: Path) -> None:
    write_fp8(tmp_path)
    pair = open_pair(tmp_path / "pre", tmp_path / "post")
    made = make_candidates(pair, ["intervals", "soups"])
    kept, notes = leave_out_blends(pair, made)
    assert [each.info.space for each in made if each not in kept] == ["soup"] * 19
    assert len(notes) == 1
    assert leave_out_blends(pair, kept) == (kept, [])
    with local_scorer(tmp_path) as scorer, refused(PlanError, "quantized-blend"):
        scorer.cost(request(scorer, [hybrid(alpha=0.5)], FEW))
