"""A LoRA adapter on its base is a checkpoint: what peft computes, whatever ranges are read, or a refusal."""

import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slrmerge.checkpoint.adapter import AdapterCheckpoint
from slrmerge.checkpoint.opening import open_checkpoint, open_pair
from slrmerge.errors import CheckpointError
from tests.adapters import PREFIX, TORCH, Q, lora_tensors, merged, values, write_adapter
from tests.checkpoints import Tensor, llama_config, llama_tensors, random_tensor, write_checkpoint
from tests.problems import refused

BASE = llama_tensors("base")
ALL_Q = [f"model.layers.{layer}.{Q}" for layer in range(6)]
FACTORS = lora_tensors(BASE, ALL_Q)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base", BASE)


def opened(folder: Path) -> AdapterCheckpoint:
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, AdapterCheckpoint)
    return checkpoint


def read_all(checkpoint: AdapterCheckpoint, name: str, steps: range) -> Any:
    """Elements as the reader gives them, in fp64."""
    buffer = memoryview(bytearray(8 * max(steps.step, 1)))
    found = []
    with checkpoint.open() as reader:
        for dtype, count in reader.read_elements(name, steps, buffer):
            found.append(torch.frombuffer(buffer, dtype=TORCH[dtype], count=count).double().clone().numpy())
    return np.concatenate(found)


def on(tmp_path: Path, base_tensors: dict[str, Tensor], adapter: dict[str, Tensor], **config: Any) -> AdapterCheckpoint:
    write_checkpoint(tmp_path / "base", base_tensors, config.pop("base_config", None))
    folder = write_adapter(tmp_path / "lora", adapter, base_model_name_or_path=str(tmp_path / "base"), **config)
    return opened(folder)


# values


@settings(deadline=None, max_examples=60)
@given(
    rank=st.integers(1, 70),
    alpha=st.floats(0.25, 64),
    rslora=st.booleans(),
    dtype=st.sampled_from(["F32", "BF16", "F16"]),
    own_rank=st.booleans(),
    start=st.integers(0, 63),
    length=st.integers(1, 64),
    step=st.integers(1, 64),
)
def test_every_range_has_the_values_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    rank: int,
    alpha: float,
    rslora: bool,
    dtype: str,
    own_rank: bool,
    start: int,
    length: int,
    step: int,
) -> None:
    """By rank and alpha patterns, rslora, dtypes: W + scale·B·A to fp32's precision, the same bits in any range."""
    module, stop = ALL_Q[3], min(start + length, 64)
    factors = lora_tensors(BASE, [module], rank=rank, dtype=dtype)
    patterns: dict[str, Any] = {"r": rank, "lora_alpha": alpha}
    if own_rank:
        key = r"layers\.3\.self_attn.q_proj"
        patterns = {"r": 99, "lora_alpha": 98, "rank_pattern": {key: rank}, "alpha_pattern": {"q_proj": alpha}}
    checkpoint = on(tmp_path_factory.mktemp("a"), BASE, factors, use_rslora=rslora, **patterns)
    whole = read_all(checkpoint, f"{module}.weight", range(0, 64, 64))
    scale = alpha / (rank**0.5 if rslora else rank)
    expected = merged(BASE, factors, module, scale).reshape(-1)
    largest = (
        np.abs(values(factors[f"{PREFIX}{module}.lora_A.weight"])).max()
        * np.abs(values(factors[f"{PREFIX}{module}.lora_B.weight"])).max()
    )
    assert np.abs(whole - expected).max() <= rank * 2.0**-21 * scale * largest
    assert (read_all(checkpoint, f"{module}.weight", range(start, stop, step)) == whole[start:stop]).all()


def test_tensors_without_an_adapter_are_the_bases_bytes(tmp_path: Path) -> None:
    checkpoint = on(tmp_path, BASE, lora_tensors(BASE, ALL_Q[:2]))
    assert set(checkpoint.computed) == {f"{module}.weight" for module in ALL_Q[:2]}
    assert list(checkpoint) == list(BASE)
    with checkpoint.open() as reader:
        for name, tensor in BASE.items():
            if name not in checkpoint.computed:
                buffer = bytearray(len(tensor.data))
                reader.read_into(name, 0, memoryview(buffer))
                assert bytes(buffer) == tensor.data


def test_an_adapter_is_a_value(tmp_path: Path) -> None:
    checkpoint = on(tmp_path, BASE, FACTORS)
    assert pickle.loads(pickle.dumps(checkpoint)) == checkpoint
    before = checkpoint.identity, checkpoint.fingerprint()
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 3', '"lora_alpha": 4'))
    changed = opened(tmp_path / "lora")
    assert changed.identity != before[0]
    assert changed.fingerprint() != before[1]


def test_a_value_that_is_not_finite_is_reported_when_it_is_read(tmp_path: Path) -> None:
    name = f"{PREFIX}{ALL_Q[0]}.lora_B.weight"
    broken = FACTORS[name]._replace(data=b"\x00\x00\xc0\x7f" + FACTORS[name].data[4:])
    checkpoint = on(tmp_path, BASE, {**FACTORS, name: broken})
    with refused(CheckpointError, "adapter-not-finite"):
        read_all(checkpoint, f"{ALL_Q[0]}.weight", range(0, 64, 64))


# names


@pytest.mark.parametrize(
    ("of_base", "of_adapter"),
    [
        ("model.layers.", "layers."),
        ("layers.", "model.layers."),
        ("language_model.model.layers.", "model.language_model.layers."),
        ("h.", "transformer.h."),
    ],
)
def test_names_may_differ_before_the_layers(tmp_path: Path, of_base: str, of_adapter: str) -> None:
    tensors = {name.replace("model.layers.", of_base): tensor for name, tensor in BASE.items()}
    factors = {name.replace("model.layers.", of_adapter): tensor for name, tensor in FACTORS.items()}
    checkpoint = on(tmp_path, tensors, factors)
    expected = merged(BASE, FACTORS, ALL_Q[2], 1.5).reshape(-1)
    found = read_all(checkpoint, f"{of_base}2.{Q}.weight", range(0, 64, 64))
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("of_base", "of_adapter"),
    [
        ("language_model.model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("vision_tower.vision_model.encoder.layers.0.q.weight", "model.vision_tower.encoder.layers.0.q.weight"),
    ],
)
def test_names_may_differ_outside_the_layers(tmp_path: Path, of_base: str, of_adapter: str) -> None:
    tensors = {name.replace("model.", "language_model.model."): tensor for name, tensor in BASE.items()}
    tensors[of_base] = BASE[EMBEDDING]
    trained = random_tensor("BF16", (16, 8), "trained")
    factors = {name.replace("model.layers", "model.language_model.layers"): FACTORS[name] for name in FACTORS}
    checkpoint = on(tmp_path, tensors, factors | {f"{PREFIX}{of_adapter}": trained})
    assert (read_all(checkpoint, of_base, range(0, 128, 128)) == values(trained).reshape(-1)).all()
    assert len(checkpoint.computed) >= len(ALL_Q) + 1


def test_names_may_contain_the_adapters_name(tmp_path: Path) -> None:
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in FACTORS.items()}
    assert on(tmp_path, BASE, named).computed == {f"{module}.weight" for module in ALL_Q}


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_whole_modules_take_the_place_of_the_bases(tmp_path: Path, dtype: str) -> None:
    head = random_tensor(dtype, BASE[HEAD].shape, "head")
    norm = random_tensor(dtype, BASE["model.norm.weight"].shape, "norm")
    adapter = {f"{PREFIX}{HEAD}": head, f"{PREFIX}model.norm.modules_to_save.default.weight": norm}
    checkpoint = on(tmp_path, BASE, adapter, modules_to_save=["lm_head", "norm"])
    rounded = torch.from_numpy(values(head)).to(torch.bfloat16).double().numpy()
    assert (read_all(checkpoint, HEAD, range(0, 128, 50)) == rounded.reshape(-1)).all()
    assert checkpoint[HEAD].dtype == "BF16"
    assert "model.norm.weight" in checkpoint.computed


def test_a_resized_vocabulary_changes_the_config(tmp_path: Path) -> None:
    adapter = {f"{PREFIX}{name}": random_tensor("BF16", (18, 8), name) for name in (HEAD, EMBEDDING)} | lora_tensors(
        BASE, ALL_Q
    )
    checkpoint = on(tmp_path, BASE, adapter, base_config=llama_config(vocab_size=16))
    assert (checkpoint[HEAD].shape, checkpoint.config["vocab_size"]) == ((18, 8), 18)
    assert checkpoint.has_own_config


def test_a_resized_head_with_factors_is_not_taken_for_a_transposed_one(tmp_path: Path) -> None:
    head = random_tensor("F32", (18, 8), "head")
    whole = {f"{PREFIX}lm_head.base_layer.weight": head, f"{PREFIX}{EMBEDDING}": random_tensor("F32", (18, 8), "e")}
    factors = lora_tensors({HEAD: head}, ["lm_head"])
    base = {name: random_tensor("F32", tensor.shape, name) for name, tensor in BASE.items()}
    checkpoint = on(tmp_path, base, whole | factors)
    expected = merged({HEAD: head}, factors, "lm_head", 1.5).reshape(-1)
    assert np.abs(read_all(checkpoint, HEAD, range(0, 144, 144)) - expected).max() < 1e-5


def test_a_resized_embedding_without_the_rows_of_the_head_is_refused_as_peft_can_store_them_with_both_only(
    tmp_path: Path,
) -> None:
    adapter = {f"{PREFIX}{EMBEDDING}": random_tensor("BF16", (18, 8), "resized")} | FACTORS
    with refused(CheckpointError, "adapter-does-not-fit") as caught:
        on(tmp_path, BASE, adapter, base_config=llama_config(tie_word_embeddings=False))
    assert "both in `target_modules` or `modules_to_save`" in caught.value.problems[0].remedy


@pytest.mark.parametrize("plain", [True, False])
def test_the_weights_before_the_training_that_peft_saves_beside_a_whole_module_are_ignored(
    tmp_path: Path, plain: bool
) -> None:
    trained, before = (random_tensor("BF16", (18, 8), name) for name in ("trained", "before"))
    adapter = {
        f"{PREFIX}{module}.{part}weight": before if part == "original_module." else trained
        for module in ("lm_head", "model.embed_tokens")
        for part in ("modules_to_save.", "original_module.", *([""] if plain else []))
    }
    checkpoint = on(tmp_path, BASE, adapter, modules_to_save=["lm_head", "embed_tokens"])
    assert checkpoint.computed == {HEAD, EMBEDDING}
    assert (read_all(checkpoint, HEAD, range(0, 144, 144)) == values(trained).reshape(-1)).all()


@pytest.mark.parametrize("stored", [(HEAD, EMBEDDING), (EMBEDDING,), (HEAD,)])
def test_an_embedding_or_head_trained_by_itself_unties_them(tmp_path: Path, stored: tuple[str, ...]) -> None:
    tied = llama_tensors("base", tied=True)
    adapter = {f"{PREFIX}{name}": random_tensor("BF16", (16, 8), name) for name in stored}
    checkpoint = on(tmp_path, tied, adapter, base_config=llama_config(tie_word_embeddings=True))
    assert checkpoint.config["tie_word_embeddings"] is False
    assert checkpoint.notes
    for name in (HEAD, EMBEDDING):
        expected = adapter.get(f"{PREFIX}{name}", tied[EMBEDDING])
        assert (read_all(checkpoint, name, range(0, 128, 128)) == values(expected).reshape(-1)).all()


@pytest.mark.parametrize("stores_head", [True, False])
@pytest.mark.parametrize("changed", [(HEAD,), (EMBEDDING,), (HEAD, EMBEDDING)])
def test_factors_on_tied_embeddings_change_each_by_itself(
    tmp_path: Path, changed: tuple[str, ...], stores_head: bool
) -> None:
    tied = llama_tensors("base", tied=True)
    tied |= {HEAD: tied[EMBEDDING]} if stores_head else {}
    factors = lora_tensors(BASE, ["lm_head"]) if HEAD in changed else {}
    if EMBEDDING in changed:
        for part, shape in (("A", (2, 16)), ("B", (8, 2))):
            factors[f"{PREFIX}model.embed_tokens.lora_embedding_{part}"] = random_tensor("F32", shape, part)
    checkpoint = on(tmp_path, tied, factors, base_config=llama_config(tie_word_embeddings=True))
    assert checkpoint.config["tie_word_embeddings"] is False
    embedding = values(tied[EMBEDDING])
    expected = {HEAD: embedding, EMBEDDING: embedding}
    if HEAD in changed:
        expected[HEAD] = merged({"lm_head.weight": tied[EMBEDDING]}, factors, "lm_head", 1.5)
    if EMBEDDING in changed:
        left, right = (values(factors[f"{PREFIX}model.embed_tokens.lora_embedding_{part}"]) for part in "AB")
        expected[EMBEDDING] = embedding + 1.5 * (right @ left).T
    for name, value in expected.items():
        assert np.allclose(read_all(checkpoint, name, range(0, 128, 37)), value.reshape(-1), atol=1e-6)


@pytest.mark.parametrize(
    ("embedding", "bias", "is_refused"),
    [
        ("shared.weight", None, True),
        ("model.shared.weight", None, True),
        ("model.decoder.embed_tokens.weight", None, False),  # Whisper's
        ("embeddings.word_embeddings.weight", "cls.predictions.bias", True),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_head_is_not_untied_where_other_parts_depend_on_the_tie(
    tmp_path: Path, embedding: str, bias: str | None, is_refused: bool, whole: bool
) -> None:
    tied = {embedding if name == EMBEDDING else name: each for name, each in llama_tensors("base", tied=True).items()}
    tied |= {bias: random_tensor("BF16", (16,), bias)} if bias else {}
    config = llama_config(tie_word_embeddings=True, is_encoder_decoder=bias is None)
    adapter = {f"{PREFIX}{HEAD}": random_tensor("BF16", (16, 8), "whole")} if whole else lora_tensors(BASE, ["lm_head"])
    with refused(CheckpointError, "unsupported-adapter") if is_refused else nullcontext():
        assert on(tmp_path, tied, adapter, base_config=config).config["tie_word_embeddings"] is False


def test_a_head_of_another_name_is_the_head(tmp_path: Path) -> None:
    names = {EMBEDDING: "gpt_neox.embed_in.weight", HEAD: "embed_out.weight"}
    base = {names.get(name, name): tensor for name, tensor in llama_tensors("base").items()}
    config = llama_config(model_type="gpt_neox", tie_word_embeddings=False)
    embedding = names[EMBEDDING]
    whole = {f"{PREFIX}{embedding}": random_tensor("BF16", (16, 8), "whole")}
    checkpoint = on(tmp_path / "whole", base, whole, base_config=config)
    assert checkpoint.keys() == base.keys()
    assert not checkpoint.has_own_config
    checkpoint = on(tmp_path / "factors", base, lora_tensors(BASE, ["lm_head"]), base_config=config)
    assert checkpoint.computed == {names[HEAD]}  # transformers 5 calls it lm_head
    resized = {f"{PREFIX}{name}": random_tensor("BF16", (18, 8), name) for name in names.values()}
    checkpoint = on(tmp_path / "resized", base, resized, base_config=config | {"vocab_size": 16})
    assert {checkpoint[name].shape for name in names.values()} == {(18, 8)}
    assert checkpoint.config["vocab_size"] == 18


def test_an_adapter_in_a_cache_folder_has_the_repositorys_name_and_its_bases_leftovers(tmp_path: Path) -> None:
    cached = tmp_path / "models--org--lora" / "snapshots" / "abc123"
    write_checkpoint(tmp_path / "base", BASE, side_files={"notes.pdf": "more"})
    write_adapter(cached, lora_tensors(BASE, [f"model.layers.0.{Q}"]), base_model_name_or_path=str(tmp_path / "base"))
    checkpoint = open_checkpoint(tmp_path / "models--org--lora")
    assert checkpoint.model_name == "org/lora"
    assert checkpoint.left_out == ("notes.pdf",)


# Conv1D


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_a_square_weight_is_transposed_as_the_modules_beside_it(tmp_path: Path, fan_in_fan_out: bool) -> None:
    inner = {"attn.c_attn": (8, 24), "attn.c_proj": (8, 8)}  # (inputs, outputs)
    tensors = {
        f"h.{layer}.{module}.weight": random_tensor("F32", shape, f"{layer}{module}")
        for layer in range(2)
        for module, shape in inner.items()
    } | {f"h.{layer}.attn.c_attn.bias": random_tensor("F32", (24,), layer) for layer in range(2)}
    squares = ["h.0.attn.c_proj", "h.1.attn.c_proj"]
    factors = lora_tensors(tensors, squares)
    config = {"model_type": "gpt2", "n_layer": 2}
    checkpoint = on(tmp_path, tensors, factors, base_config=config, fan_in_fan_out=fan_in_fan_out)
    for square in squares:
        delta = merged(tensors, factors, square, 1.5) - values(tensors[f"{square}.weight"])
        found = read_all(checkpoint, f"{square}.weight", range(0, 64, 7)).reshape(8, 8)
        assert np.abs(found - values(tensors[f"{square}.weight"]) - delta.T).max() < 1e-5


# refusals

BAD_CONFIGS: dict[str, dict[str, Any]] = {
    "IA3": {"peft_type": "IA3"},
    "mlx-lm": {"peft_type": None, "fine_tune_type": "lora"},
    "LoHa": {"peft_type": "LOHA"},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa_niter_16"},
    "OLoRA": {"init_lora_weights": "olora"},
    "LoftQ": {"init_lora_weights": "loftq"},
    "trained tokens": {"trainable_token_indices": [1]},
    "parameters": {"target_parameters": ["experts.gate_up_proj"]},
    "repeated layers": {"layer_replication": [[0, 4], [2, 6]]},
    "an unknown key": {"use_something_new": True},
}


@pytest.mark.parametrize("value", [True, "gaussian", "eva", "orthogonal", "mica"])
def test_initializations_that_leave_the_base_as_it_is_make_a_plain_lora(tmp_path: Path, value: object) -> None:
    assert len(on(tmp_path, BASE, FACTORS, init_lora_weights=value).computed) == len(ALL_Q)


@pytest.mark.parametrize("config", BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_a_kind_that_is_not_supported_is_refused_by_name(base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    folder = write_adapter(tmp_path / "lora", FACTORS, base_model_name_or_path=str(base), **config)
    with refused(CheckpointError, "unsupported-adapter") as caught:
        open_checkpoint(folder)
    name = next(iter(config))
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("config", "mergeable"),
    [
        ({"peft_type": "LOHA"}, True),
        ({"use_dora": True}, True),
        ({"init_lora_weights": "olora"}, True),
        ({"peft_type": "PREFIX_TUNING"}, False),
        ({"peft_type": "XLORA"}, False),
        ({"peft_type": None, "fine_tune_type": "lora"}, False),
        ({"alora_invocation_tokens": [1]}, False),
        ({"layer_replication": [[0, 4], [2, 6]]}, False),
        ({"use_qalora": True}, False),
        ({"peft_type": "SHADOW"}, False),
    ],
)
def test_merging_with_peft_is_the_remedy_only_where_it_gives_a_model_of_the_bases_layers(
    base: Path, tmp_path: Path, config: dict[str, Any], mergeable: bool
) -> None:
    with refused(CheckpointError, "unsupported-adapter") as caught:
        open_checkpoint(write_adapter(tmp_path / "lora", FACTORS, base_model_name_or_path=str(base), **config))
    assert ("merge_and_unload" in caught.value.problems[0].remedy) == mergeable


@pytest.mark.parametrize(
    ("modules", "may_be_tied"),
    [
        ({"target_modules": ["q_proj"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, True),
        ({"target_modules": r".*\.(q_proj|embed_tokens)"}, True),
        ({"modules_to_save": ["wte"]}, True),
    ],
)
def test_merging_with_peft_is_no_remedy_where_it_would_change_tied_embeddings_twice(
    base: Path, tmp_path: Path, modules: dict[str, Any], may_be_tied: bool
) -> None:
    config = {"base_model_name_or_path": str(base), "use_dora": True, **modules}
    with refused(CheckpointError, "unsupported-adapter") as caught:
        open_checkpoint(write_adapter(tmp_path / "lora", FACTORS, **config))
    assert ("unless the base ties" in caught.value.problems[0].remedy) == may_be_tied


@pytest.mark.parametrize(
    "config", [{"r": 0}, {"r": "4"}, {"lora_alpha": "much"}, {"rank_pattern": {"q": 0}}, {"peft_type": ["LORA"]}]
)
def test_a_config_that_is_not_valid_is_refused(base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        open_checkpoint(write_adapter(tmp_path / "lora", FACTORS, base_model_name_or_path=str(base), **config))


@pytest.mark.parametrize(
    "pattern", ["(" * 5000 + ")" * 5000, "a{99999999999999}", "(?<=a)b", r"(a)\1", "[a[b]", "(a{1,1000}){1,1000}", "["]
)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_not_supported_is_refused(base: Path, tmp_path: Path, key: str, pattern: str) -> None:
    config: dict[str, Any] = {"base_model_name_or_path": str(base), key: {pattern: 3}}
    with refused(CheckpointError, "invalid-adapter"):
        open_checkpoint(write_adapter(tmp_path / "lora", FACTORS, **config))


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_take_linear_time(base: Path, tmp_path: Path, key: str) -> None:
    patterns = {r"(([\w.])+\.?)+!": 3, **{f"{k}.(q|v)_proj": 3 for k in range(2000)}}
    open_checkpoint(write_adapter(tmp_path / "lora", FACTORS, base_model_name_or_path=str(base), **{key: patterns}))


def test_more_patterns_than_modules_can_have_are_refused(base: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = {"alpha_pattern": {str(k): 1 for k in range(10_001)}}
    with refused(CheckpointError, "invalid-adapter"):
        open_checkpoint(write_adapter(tmp_path / "lora", FACTORS, base_model_name_or_path=str(base), **config))


def test_a_rank_of_many_digits_is_not_printed(base: Path, tmp_path: Path) -> None:
    with refused(CheckpointError, "adapter-rank") as caught:
        open_checkpoint(write_adapter(tmp_path / "lora", FACTORS, base_model_name_or_path=str(base), r=10**400))
    assert len(str(caught.value)) < 1000 * len(caught.value.problems)


A = f"{PREFIX}{ALL_Q[0]}.lora_A.weight"
BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "another rank": (lambda t: t.update(lora_tensors(BASE, ALL_Q[:1], rank=3)), "adapter-rank"),
    "half a pair": (lambda t: t.pop(A), "invalid-adapter"),
    "another width": (lambda t: t.update({A: random_tensor("F32", (2, 9), 0)}), "adapter-does-not-fit"),
    "a layer too many": (
        lambda t: t.update({name.replace("layers.0", "layers.9"): tensor for name, tensor in FACTORS.items()}),
        "adapter-does-not-fit",
    ),
    "a new head": (lambda t: t.update({f"{PREFIX}score.weight": BASE[HEAD]}), "adapter-does-not-fit"),
    "two adapters": (
        lambda t: t.update(
            {
                f"{PREFIX}{module}.lora_{part}.{name}.weight": FACTORS[f"{PREFIX}{module}.lora_{part}.weight"]
                for module, name in zip(ALL_Q, "abcdef", strict=True)
                for part in "AB"
            }
        ),
        "unsupported-adapter",
    ),
    "nothing": (lambda t: t.clear(), "invalid-adapter"),
    "a DoRA magnitude": (
        lambda t: t.update({f"{PREFIX}{ALL_Q[0]}.lora_magnitude_vector": random_tensor("F32", (8,), 0)}),
        "unsupported-adapter",
    ),
    "a gathered part": (lambda t: t.update({A: Tensor("F32", (0,), b"")}), "invalid-adapter"),
    "a bias without a place": (
        lambda t: t.update({f"{PREFIX}{ALL_Q[0]}.lora_B.bias": random_tensor("F32", (8,), 0)}),
        "adapter-does-not-fit",
    ),
}


@pytest.mark.parametrize(("change", "code"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_tensors_that_do_not_fit_are_refused(
    base: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], code: str
) -> None:
    tensors = dict(FACTORS)
    change(tensors)
    folder = write_adapter(tmp_path / "lora", tensors, base_model_name_or_path=str(base))
    with refused(CheckpointError, code):
        open_checkpoint(folder)


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    packed = {**BASE, f"{ALL_Q[0]}.weight": random_tensor("U8", (8, 8), 0)}
    with refused(CheckpointError, "adapter-on-quantized") as caught:
        on(tmp_path, packed, FACTORS)
    assert "BASE+ADAPTER" in caught.value.problems[0].remedy  # whatever base its config names


def test_the_head_of_a_classifier_is_refused_and_peft_merges_it(base: Path, tmp_path: Path) -> None:
    factors = FACTORS | {f"{PREFIX}score.weight": random_tensor("F32", (2, 16), 0)}
    with refused(CheckpointError, "adapter-does-not-fit") as caught:
        open_checkpoint(write_adapter(tmp_path / "lora", factors, base_model_name_or_path=str(base)))
    assert "merge_and_unload" in caught.value.problems[0].remedy


def test_a_pickle_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", FACTORS, base_model_name_or_path=str(base))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with refused(CheckpointError, "adapter-weights-missing") as caught:
        open_checkpoint(folder)
    assert "adapter_model.bin" in str(caught.value)


# the base


def test_the_base_is_a_folder_from_here_or_beside_the_adapter(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path / "lora", FACTORS, base_model_name_or_path="base")
    for here in (tmp_path, tmp_path / "lora"):
        monkeypatch.chdir(here)
        assert opened(folder).base.reference == str(base)


def test_a_base_that_is_missing_is_reported_with_the_way_to_name_it(base: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", FACTORS, base_model_name_or_path="/gone/llama")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert caught.value.problems[0].code == "adapter-base"
    assert open_checkpoint(f"{base}+{folder}").computed


def test_a_pair_may_leave_out_the_base(base: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", FACTORS, base_model_name_or_path=str(base))
    pair = open_pair(None, folder)
    assert pair.pretrained.reference == str(base)
    assert pair.posttrained.inherits(HEAD, pair.pretrained)
    with refused(CheckpointError, "no-pretrained"):
        open_pair(None, base)


def test_a_base_with_the_name_of_one_elsewhere_is_taken_for_it(base: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", FACTORS, base_model_name_or_path="org/Base")
    pair = open_pair(base, folder)
    assert pair.posttrained.inherits(HEAD, pair.pretrained)
    assert any("org/Base" in note for note in pair.posttrained.notes)


def test_another_pretrained_side_leaves_the_adapter_on_its_base(base: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "older", llama_tensors("older"))
    folder = write_adapter(tmp_path / "lora", FACTORS, base_model_name_or_path=str(base))
    pair = open_pair(tmp_path / "older", folder)
    assert isinstance(pair.posttrained, AdapterCheckpoint)
    assert pair.posttrained.base.reference == str(base)
    assert not pair.posttrained.inherits(HEAD, pair.pretrained)
    assert len(pair.posttrained.notes) == 1


def test_an_adapter_is_not_a_pretrained_side(base: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", FACTORS, base_model_name_or_path=str(base))
    with refused(CheckpointError, "adapter-pretrained"):
        open_pair(folder, base)


@pytest.mark.parametrize("sides", ["{base}+{base}", "{lora}+{lora}"])
def test_base_plus_adapter_must_be_both(base: Path, tmp_path: Path, sides: str) -> None:
    folder = write_adapter(tmp_path / "lora", FACTORS, base_model_name_or_path=str(base))
    with refused(CheckpointError, "not-an-adapter"):
        open_checkpoint(sides.format(base=base, lora=folder))


def test_an_adapter_on_itself_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "lora", FACTORS, base_model_name_or_path=str(tmp_path / "lora"))
    with refused(CheckpointError, "unsupported-adapter"):
        open_checkpoint(folder)


def test_the_adapters_tokenizer_wins(base: Path, tmp_path: Path) -> None:
    own = {"tokenizer_config.json": "{}", "chat_template.jinja": "{{ 1 }}"}
    folder = write_adapter(tmp_path / "lora", FACTORS, side_files=own, base_model_name_or_path=str(base))
    checkpoint = opened(folder)
    assert sorted(checkpoint.side_files) == ["chat_template.jinja", "config.json", "tokenizer_config.json"]
    assert checkpoint.tokenizer_folder == folder
