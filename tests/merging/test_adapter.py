"""Merges whose post-trained side is a LoRA adapter: as peft merges it, and written as a model or as an adapter."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

from slrmerge.checkpoint.opening import open_pair
from slrmerge.errors import OutputError, PlanError
from slrmerge.merging.diff import diff
from slrmerge.merging.executor import execute, merge
from slrmerge.merging.options import MergeOptions
from slrmerge.merging.plan.planner import plan_merge
from slrmerge.merging.verify import verify
from tests.adapters import PREFIX, Q, lora_tensors, merged, values, write_adapter
from tests.checkpoints import llama_config, llama_tensors, random_tensor, read_back, write_checkpoint
from tests.cli import run
from tests.merging.faults import Recorder, Stop, stop
from tests.problems import refused

BASE = llama_tensors("base")
MODULES = [f"model.layers.{layer}.{module}" for layer in range(6) for module in (Q, "mlp.down_proj")]
FACTORS = lora_tensors(BASE, MODULES, dtype="BF16")
NORM = "model.norm.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ADAPTER = {**FACTORS, f"{PREFIX}{NORM}": random_tensor("BF16", (8,), "norm")}
SCALE = 1.5


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "base", BASE, shards=2)
    return write_adapter(tmp_path / "lora", ADAPTER, base_model_name_or_path=str(tmp_path / "base"))


def rounded(exact: Any) -> bytes:
    """Rounded once to bfloat16, halves to even."""
    spacing = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 1e-30))) - 7)
    nearest = np.rint(exact / spacing) * spacing
    packed: bytes = torch.from_numpy(nearest).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    return packed


def layer_of(name: str) -> int:
    return int(name.split(".")[2]) if ".layers." in name else -1


def test_restored_layers_are_the_bases_and_others_rounded_once(lora: Path, tmp_path: Path) -> None:
    merge({"posttrained": str(lora), "restore": [1, 2]}, tmp_path / "out")
    written = read_back(tmp_path / "out")
    assert list(written) == list(BASE)
    for name, tensor in written.items():
        module = name.removesuffix(".weight")
        if module in MODULES and layer_of(name) not in (1, 2):
            assert tensor.data == rounded(merged(BASE, FACTORS, module, SCALE))
        elif name == NORM:
            assert tensor.data == ADAPTER[f"{PREFIX}{NORM}"].data
        else:
            assert tensor.data == BASE[name].data


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.75])
def test_a_soup_scales_the_adapter_and_is_rounded_once(lora: Path, tmp_path: Path, alpha: float) -> None:
    plan = plan_merge({"posttrained": str(lora), "alpha": alpha})
    assert plan.kinds == {"copy": len(BASE) - len(MODULES) - 1, "linear": len(MODULES) + 1}
    execute(plan, tmp_path / "out")
    written = read_back(tmp_path / "out")
    for name, tensor in written.items():
        module = name.removesuffix(".weight")
        if module in MODULES:
            assert tensor.data == rounded(merged(BASE, FACTORS, module, (1 - alpha) * SCALE))
        elif name != NORM:
            assert tensor.data == BASE[name].data


def test_threads_and_pieces_do_not_change_the_bytes(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"posttrained": str(lora), "alpha": 0.3}
    merge(recipe, tmp_path / "one", threads=1)
    monkeypatch.setattr("slrmerge.merging.stream.CHUNK_ELEMENTS", 37)
    monkeypatch.setattr("slrmerge.io.pieces.PIECE_BYTES", 1 << 9)
    merge(recipe, tmp_path / "many", threads=4)
    assert read_back(tmp_path / "one") == read_back(tmp_path / "many")


@pytest.mark.parametrize("output", ["model", "adapter"])
def test_a_merge_is_verified_and_what_was_altered_is_named(lora: Path, tmp_path: Path, output: str) -> None:
    out = tmp_path / "out"
    merge({"posttrained": str(lora), "restore": [1, 2], "alpha": 0.25}, out, output=output)
    assert verify(out).against_sources
    config = lora / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 3', '"lora_alpha": 5'))
    assert not verify(out).against_sources
    with refused(OutputError, "output-exists"):
        merge({"posttrained": str(lora), "alpha": 0.5}, out, output=output)
    merge({"posttrained": str(lora), "alpha": 0.5}, out, output=output, overwrite=True)
    assert verify(out).against_sources


@pytest.mark.parametrize("output", ["model", "adapter"])
def test_an_interrupted_merge_resumes_to_the_same_bytes(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.setattr("slrmerge.io.pieces.PIECE_BYTES", 1 << 9)
    plan = plan_merge({"posttrained": str(lora), "restore": [1, 2], "alpha": 0.25}, output=output)
    options = MergeOptions(threads=1)
    execute(plan, tmp_path / "whole", options=options)
    with pytest.raises(Stop):
        execute(plan, tmp_path / "out", options=options, progress=Recorder(3, stop))
    assert not (tmp_path / "out").exists()
    assert execute(plan, tmp_path / "out", options=options).resumed_pieces > 0
    assert read_back(tmp_path / "out") == read_back(tmp_path / "whole")


def test_an_adapter_that_changed_is_not_resumed_from(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slrmerge.io.pieces.PIECE_BYTES", 1 << 9)
    recipe = {"posttrained": str(lora), "alpha": 0.25}
    with pytest.raises(Stop):
        merge(recipe, tmp_path / "out", threads=1, progress=Recorder(3, stop))
    config = lora / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 3', '"lora_alpha": 5'))
    assert merge(recipe, tmp_path / "out", threads=1).resumed_pieces == 0


def test_diff_finds_the_adapters_modules(lora: Path) -> None:
    found = diff(open_pair(None, lora))
    moved = {key for key, distance in found.by_module.items() if distance.relative_change > 0}
    assert moved == {(layer_of(f"{name}."), name.split(".", 3)[3]) for name in MODULES} | {(-1, "model.norm")}


def test_the_commands_take_adapters(lora: Path, tmp_path: Path) -> None:
    def succeeded(*arguments: object) -> Result:
        result = run(*arguments)
        assert result.exit_code == 0, result.stderr
        return result

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("posttrained: ./lora\nrestore: [1, 2]\n")
    found = json.loads(succeeded("inspect", lora, "--json").stdout)
    assert found["layers"] == 6
    assert "adapter_model.safetensors" in found["files"]
    assert "computed with the adapter" in succeeded("plan", recipe).stdout
    succeeded(recipe, "--out", tmp_path / "small", "--as", "adapter")
    assert (tmp_path / "small" / "adapter_config.json").exists()
    succeeded("verify", tmp_path / "small")


# as an adapter


def effective(folder: Path, name: str) -> Any:
    """What the adapter in `folder` makes of a weight of the base, in fp64."""
    tensors, module = read_back(folder), name.removesuffix(".weight")
    if f"{PREFIX}{module}.lora_A.weight" in tensors:
        return merged(BASE, tensors, module, SCALE)
    return values(tensors.get(f"{PREFIX}{name}", BASE[name]))


@pytest.mark.parametrize("rules", [{"restore": [1, 2]}, {"alpha": 0.3}, {"restore": [0, 3], "alpha": 0.7}])
def test_the_adapter_gives_the_whole_model(lora: Path, tmp_path: Path, rules: dict[str, Any]) -> None:
    recipe = {"posttrained": str(lora), **rules}
    merge(recipe, tmp_path / "whole")
    merge(recipe, tmp_path / "small", output="adapter")
    for name, tensor in read_back(tmp_path / "whole").items():
        if name != NORM:  # blended and rounded in both
            near = torch.from_numpy(effective(tmp_path / "small", name)).to(torch.bfloat16).double().numpy()
            assert np.abs(near - values(tensor)).max() <= 2.0**-8 * np.abs(near).max()
        assert (tmp_path / "small" / "adapter_model.safetensors").stat().st_size < 20_000


def test_restored_modules_are_left_out_and_excluded(lora: Path, tmp_path: Path) -> None:
    merge({"posttrained": str(lora), "restore": [1, 2]}, tmp_path / "small", output="adapter")
    written = read_back(tmp_path / "small")
    kept = {name for name in ADAPTER if layer_of(name.removeprefix(PREFIX)) not in (1, 2)}
    assert written == {name: ADAPTER[name] for name in kept}
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert set(config["exclude_modules"]) == {name for name in MODULES if layer_of(f"{name}.") in (1, 2)}
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert not (tmp_path / "small" / "config.json").exists()


def test_a_restored_whole_module_is_stored_as_the_bases(lora: Path, tmp_path: Path) -> None:
    rules = {"tensors": [{"match": NORM, "alpha": 1}]}
    merge({"posttrained": str(lora), **rules}, tmp_path / "small", output="adapter")
    assert read_back(tmp_path / "small")[f"{PREFIX}{NORM}"] == BASE[NORM]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["more rows", "a head of a tied base"])
def test_embeddings_that_the_adapter_stores_are_those_of_the_whole_model(
    tmp_path: Path, kind: str, alpha: float
) -> None:
    has_more_rows = kind == "more rows"
    base = llama_tensors("base", tied=not has_more_rows)
    shapes = {EMBEDDING: (19, 8), HEAD: (19, 8)} if has_more_rows else {HEAD: (16, 8)}
    stored = {f"{PREFIX}{name}": random_tensor("BF16", shape, name) for name, shape in shapes.items()}
    write_checkpoint(tmp_path / "base", base, llama_config(tie_word_embeddings=not has_more_rows))
    factors = lora_tensors(base, MODULES)
    write_adapter(tmp_path / "lora", factors | stored, base_model_name_or_path=str(tmp_path / "base"))
    rules = [{"match": name, "alpha": alpha} for name in (EMBEDDING, HEAD)]
    recipe = {"posttrained": str(tmp_path / "lora"), "tensors": rules, "vocabulary": "shared"}
    merge(recipe, tmp_path / "whole")
    merge(recipe, tmp_path / "small", output="adapter")
    whole, small = read_back(tmp_path / "whole"), read_back(tmp_path / "small")
    assert {name: small[f"{PREFIX}{name}"] for name in shapes} == {name: whole[name] for name in shapes}
    assert verify(tmp_path / "small").against_sources


@pytest.mark.parametrize("output", ["model", "adapter"])
def test_the_card_says_what_an_adapter_restores(lora: Path, tmp_path: Path, output: str) -> None:
    merge({"posttrained": str(lora), "restore": [1, 2]}, tmp_path / "out", output=output)
    assert "selective-layer-restoration" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("recipe", "code"),
    [
        ({"alpha": 0.5, "blend": "slerp"}, "adapter-blend"),
        ({"alpha": 0.5, "dtype": "float32"}, "adapter-dtype"),
        ({"alpha": 0.5, "tokenizer": "pretrained"}, "adapter-tokenizer"),
        ({"alpha": 1.0}, "adapter-empty"),
        ({"alpha": 0.5, "pretrained": "older"}, "adapter-on-another-base"),
        ({"alpha": 0.5, "pretrained": "older", "posttrained": "base"}, "not-an-adapter"),
    ],
)
def test_what_no_adapter_can_express_is_refused(tmp_path: Path, recipe: dict[str, Any], code: str) -> None:
    write_checkpoint(tmp_path / "base", BASE)
    write_checkpoint(tmp_path / "older", llama_tensors("older"))
    write_adapter(tmp_path / "lora", FACTORS, base_model_name_or_path=str(tmp_path / "base"))
    sides = {side: str(tmp_path / recipe[side]) for side in ("pretrained", "posttrained") if side in recipe}
    content = {"posttrained": str(tmp_path / "lora"), **recipe, **sides}
    with refused(PlanError, code):
        plan_merge(content, output="adapter")


# against peft


def peft_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=32, num_hidden_layers=4, tie_word_embeddings=False, **sizes)  # type: ignore[arg-type]
    return LlamaForCausalLM(config)


def peft_gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=16, n_layer=4, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0)
    )


PEFT: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "patterns": (
        peft_llama,
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 7},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "rslora, some layers": (
        peft_llama,
        {"target_modules": ["q_proj"], "use_rslora": True, "layers_to_transform": [0, 2]},
    ),
    "embeddings": (peft_llama, {"target_modules": ["embed_tokens", "lm_head", "o_proj"]}),
    "whole modules": (
        peft_llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    ),
    "Conv1D and all biases": (
        peft_gpt2,
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "bias": "all", "fan_in_fan_out": True},
    ),
    "a square Conv1D": (
        peft_gpt2,
        {"target_modules": ["attn.c_proj"], "bias": "lora_only", "fan_in_fan_out": True, "lora_bias": True},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "config"), PEFT.values(), ids=PEFT.keys())
def test_a_merge_is_what_peft_merges(
    tmp_path: Path, make: Callable[[], Any], config: dict[str, Any], dtype: torch.dtype
) -> None:
    """All layers, with layers 1 and 2 restored, and the latter written as an adapter and loaded by peft."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    make().to(dtype).save_pretrained(tmp_path / "base")
    kind = type(make())

    def base() -> Any:
        return kind.from_pretrained(tmp_path / "base", dtype=dtype)

    model = get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, **config))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "lora")
    recipe = {"pretrained": str(tmp_path / "base"), "posttrained": str(tmp_path / "lora")}
    merge({**recipe, "alpha": 0}, tmp_path / "full", fsync=False)
    merge({**recipe, "restore": [1, 2]}, tmp_path / "some", fsync=False)

    def assert_equal(merged_model: Any, folder: Path) -> None:
        wanted, found = merged_model.state_dict(), kind.from_pretrained(folder, dtype=dtype).state_dict()
        assert wanted.keys() == found.keys()
        tolerance = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-20  # peft rounds B·A before it adds it
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance * 2)

    assert_equal(PeftModel.from_pretrained(base(), tmp_path / "lora").merge_and_unload(), tmp_path / "full")

    def restored() -> Any:
        disabled = PeftModel.from_pretrained(base(), tmp_path / "lora")
        before = dict(base().named_parameters())
        for name, parameter in disabled.base_model.model.named_parameters():
            if any(f".{layer}." in name for layer in (1, 2)):
                own = name.replace(".base_layer", "").replace(".modules_to_save.default", "")
                if "lora_B" in name:
                    parameter.data.zero_()
                elif own in before:
                    parameter.data.copy_(before[own])  # trained biases, norms
        return disabled.merge_and_unload()

    assert_equal(restored(), tmp_path / "some")
    if config.get("bias") is None:
        merge({**recipe, "restore": [1, 2]}, tmp_path / "small", output="adapter", fsync=False)
        assert_equal(PeftModel.from_pretrained(base(), tmp_path / "small").merge_and_unload(), tmp_path / "some")
