"""A merge of quantized checkpoints, read by the library that wrote them, is the model with exchanged layers."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import slrmerge
from slrmerge.errors import SlrmergeError
from tests.searching.sweep.models import POST, Recorder, contexts, hybrid, local_scorer, request

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("quantized"),  # one process makes the checkpoints
    pytest.mark.filterwarnings("default"),  # those of other libraries
]

IDS = torch.arange(40)[None]
RESTORED = [1, 2]
CONTEXTS = contexts()[1:4]


def bitsandbytes(**settings: object) -> Callable[[LlamaForCausalLM, Path], None]:
    def save(model: LlamaForCausalLM, folder: Path) -> None:
        model.save_pretrained(folder / "dense")
        config = BitsAndBytesConfig(**settings)
        quantized = AutoModelForCausalLM.from_pretrained(
            folder / "dense", quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
        quantized.save_pretrained(folder)

    return save


def compressed_tensors(form: str, bits: int, kind: str, group: int | None) -> Callable[[LlamaForCausalLM, Path], None]:
    def save(model: LlamaForCausalLM, folder: Path) -> None:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            apply_quantization_config,
        )

        weights = QuantizationArgs(
            num_bits=bits, type=kind, strategy="group" if group else "channel", group_size=group, symmetric=True
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        config = QuantizationConfig(
            config_groups={"all": scheme}, ignore=["lm_head"], format=form, quantization_status="frozen"
        )
        apply_quantization_config(model, config)
        largest = torch.finfo(torch.float8_e4m3fn).max if kind == "float" else 2 ** (bits - 1) - 1
        for module in model.modules():
            if hasattr(module, "weight_scale"):
                groups = module.weight.data.unflatten(1, (-1, group or module.weight.shape[1]))
                module.weight_scale.data = (groups.abs().amax(-1) / largest).reshape(module.weight_scale.shape)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)

    return save


FORMATS = {
    "nf4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "int8": bitsandbytes(load_in_8bit=True),
    "packed": compressed_tensors("pack-quantized", 4, "int", 32),
    "float": compressed_tensors("float-quantized", 8, "float", None),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Path]]:
    """Makes a pair: the pre-trained side in one format, the post-trained one in another."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256,
    )  # fmt: skip
    models = {"pre": LlamaForCausalLM(config), "post": LlamaForCausalLM(config)}
    root = tmp_path_factory.mktemp("quantized")

    def saved(side: str, form: str) -> Path:
        folder = root / f"{side}-{form}"
        if not folder.exists():
            FORMATS[form](deepcopy(models[side]), folder)
        return folder

    return lambda pre, post: (saved("pre", pre), saved("post", post))


def model(folder: Path) -> LlamaForCausalLM:
    loaded: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    return loaded.eval()


@torch.no_grad()
def logits(model: LlamaForCausalLM) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("form", FORMATS)
def test_a_merge_is_the_model_with_exchanged_layers(
    form: str, pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    pre, post = pair(form, form)
    slrmerge.merge({"pretrained": str(pre), "posttrained": str(post), "restore": RESTORED}, tmp_path / "hybrid")
    assert slrmerge.verify(tmp_path / "hybrid").against_sources
    expected, parent = model(post), logits(model(post))
    for layer in range(RESTORED[0], RESTORED[1] + 1):
        expected.model.layers[layer] = model(pre).model.layers[layer]
    merged = logits(model(tmp_path / "hybrid"))
    assert torch.equal(merged, logits(expected))
    assert not torch.allclose(merged, parent, atol=0.01)


@pytest.mark.parametrize(("pre", "post"), [("nf4", "int8"), ("packed", "float"), ("int8", "packed")])
def test_sides_in_other_formats_are_refused(
    pre: str, post: str, pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    sides = dict(zip(("pretrained", "posttrained"), map(str, pair(pre, post)), strict=True))
    with pytest.raises(SlrmergeError) as caught:
        slrmerge.merge({**sides, "restore": RESTORED}, tmp_path / "hybrid")
    assert {problem.code for problem in caught.value.problems} == {"different-quantization"}
    assert not (tmp_path / "hybrid").exists()


@pytest.mark.parametrize("form", ["packed", "float"])
def test_a_sweep_scores_what_the_library_runs(
    form: str, pair: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    for side, folder in zip(("pre", "post"), pair(form, form), strict=True):
        (tmp_path / side).symlink_to(folder)
    with local_scorer(tmp_path) as scorer:
        wanted = request(scorer, [POST, hybrid(restore=RESTORED)], CONTEXTS)
        scored = scorer.score(wanted, None, Recorder())
    sides = {"pretrained": str(tmp_path / "pre"), "posttrained": str(tmp_path / "post")}
    slrmerge.merge({**sides, "restore": RESTORED}, tmp_path / "hybrid")
    for folder, rows in zip((tmp_path / "post", tmp_path / "hybrid"), scored, strict=True):
        runs = model(folder)
        for context, row in zip(CONTEXTS, rows, strict=True):
            with torch.no_grad():
                expected = runs(torch.tensor([context.ids])).logits[0, -1].double().log_softmax(-1)
            assert row[: len(context.targets)] == pytest.approx(expected[list(context.targets)].tolist(), abs=1e-5)
