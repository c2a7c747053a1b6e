"""Where every output tensor comes from, whatever the architecture, or why it cannot."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slrmerge.errors import PlanError
from slrmerge.merging.plan.model import MergePlan, PlannedTensor
from tests.checkpoints import Tensor, llama_config, llama_tensors, random_tensor
from tests.merging.plan import plan_of, write_pair
from tests.problems import refused
from tests.streams import tensor_bytes

Q = "model.layers.{k}.self_attn.q_proj"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensors(seed: str, *names: str, dtype: str = "BF16", shape: tuple[int, ...] = (2, 3)) -> dict[str, Tensor]:
    return {name: random_tensor(dtype, shape, f"{seed}/{name}") for name in names}


def stack(prefix: str, count: int, *inner: str) -> list[str]:
    return [f"{prefix}.{k}.{name}" for k in range(count) for name in inner]


def moe(seed: str) -> dict[str, Tensor]:
    experts = [f"mlp.experts.{e}.w{n}.weight" for e in range(3) for n in (1, 2, 3)]
    return tensors(seed, *stack("model.layers", 4, "mlp.gate.weight", *experts), "lm_head.weight")


def vision(seed: str) -> dict[str, Tensor]:
    return tensors(
        seed,
        *stack("vision_tower.encoder.layers", 4, "attn.weight"),
        "multi_modal_projector.linear.bias",
        *stack("model.language_model.layers", 4, "self_attn.q_proj.weight", "mlp.up_proj.weight"),
        "model.language_model.embed_tokens.weight",
    )


def prediction(seed: str) -> dict[str, Tensor]:
    names = stack("model.layers", 5, "mlp.gate.e_score_correction_bias", "mlp.up_proj.weight")
    return tensors(seed, *names, "model.layers.4.eh_proj.weight", "model.layers.4.shared_head.norm.weight")


def gpt2(seed: str) -> dict[str, Tensor]:
    masks = tensors(seed, *stack("transformer.h", 4, "attn.bias"), dtype="BOOL")
    return masks | tensors(seed, *stack("transformer.h", 4, "ln_1.weight", "mlp.c_fc.bias"), "wte.weight", "wpe.weight")


def fp8(seed: str) -> dict[str, Tensor]:
    weights = tensors(seed, *stack("model.layers", 4, "mlp.up_proj.weight"), dtype="F8_E4M3")
    scales = tensors(seed, *stack("model.layers", 4, "mlp.up_proj.weight_scale_inv"), dtype="F32", shape=(1,))
    return weights | scales | tensors(seed, *stack("model.layers", 4, "norm.weight"), "lm_head.weight")


def gptq(seed: str) -> dict[str, Tensor]:
    packed = [f"self_attn.q_proj.{last}" for last in ("qweight", "qzeros", "g_idx")]
    scales = tensors(seed, *stack("model.layers", 4, "self_attn.q_proj.scales", "norm.weight"), dtype="F16")
    return scales | tensors(seed, *stack("model.layers", 4, *packed), dtype="I32") | tensors(seed, "lm_head.weight")


def mxfp4(seed: str) -> dict[str, Tensor]:
    packed = ("mlp.experts.gate_up_proj_blocks", "mlp.experts.gate_up_proj_scales")
    rest = tensors(seed, *stack("model.layers", 4, "mlp.experts.gate_up_proj_bias", "norm.weight"))
    return tensors(seed, *stack("model.layers", 4, *packed), dtype="U8") | rest


FOUR = {"num_hidden_layers": 4}
ARCHITECTURES: dict[str, tuple[Callable[[str], dict[str, Tensor]], dict[str, Any], str]] = {
    "llama": (lambda seed: llama_tensors(seed, layers=4), FOUR, "model.layers"),
    "mixture of experts": (moe, FOUR, "model.layers"),
    "vision tower": (vision, {"text_config": FOUR}, "model.language_model.layers"),
    "extra prediction layer": (prediction, FOUR, "model.layers"),
    "gpt2": (gpt2, {"n_layer": 4}, "transformer.h"),
    "gpt-neox": (lambda seed: tensors(seed, *stack("gpt_neox.layers", 4, "mlp.bias")), FOUR, "gpt_neox.layers"),
    "bert": (lambda seed: tensors(seed, *stack("encoder.layer", 4, "out.bias"), "pooler.bias"), FOUR, "encoder.layer"),
    "fp8": (fp8, {**FOUR, "quantization_config": {"quant_method": "fp8"}}, "model.layers"),
    "gptq": (gptq, {**FOUR, "quantization_config": {"quant_method": "gptq", "bits": 4}}, "model.layers"),
    "mxfp4": (mxfp4, {**FOUR, "quantization_config": {"quant_method": "mxfp4"}}, "model.layers"),
}


def by_name(plan: MergePlan) -> dict[str, PlannedTensor]:
    return {tensor.name: tensor for tensor in plan.tensors()}


def refusals(folder: Path, *codes: str, **content: Any) -> list[str]:
    """The places of the problems, which have exactly these codes."""
    with refused(PlanError, *codes) as caught:
        plan_of(folder, **content)
    return [problem.where for problem in caught.value.problems]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_restoration_has_exactly_the_post_trained_names_and_the_bytes_of_both_sides(
    tmp_path: Path, name: str
) -> None:
    make, config, prefix = ARCHITECTURES[name]
    pre, post = make("pre"), make("post")
    write_pair(tmp_path, pre, post, pre_config=config, post_config=config)
    plan = plan_of(tmp_path, restore=[1, 2])
    assert not plan.needs_arithmetic
    assert tensor_bytes(plan) == {
        name: (pre if name.startswith((f"{prefix}.1.", f"{prefix}.2.")) else post)[name].data for name in post
    }
    assert all((tensor.info.dtype, tensor.info.shape) == post[tensor.name][:2] for tensor in plan.tensors())


@pytest.mark.parametrize("name", ["llama", "mixture of experts", "vision tower", "extra prediction layer", "gpt2"])
def test_a_soup_blends_every_floating_tensor_and_copies_the_others(tmp_path: Path, name: str) -> None:
    make, config, _ = ARCHITECTURES[name]
    post = make("post")
    write_pair(tmp_path, make("pre"), post, pre_config=config, post_config=config)
    for tensor in plan_of(tmp_path, alpha=0.5).tensors():
        if post[tensor.name].dtype == "BOOL":
            assert tensor[2:6] == (0.0, "copy", None, tensor.name)
        else:
            assert tensor[2:6] == (0.5, "linear", tensor.name, tensor.name)


def test_whole_alphas_are_copies_of_one_side(tmp_path: Path) -> None:
    write_pair(tmp_path, llama_tensors("pre"), llama_tensors("post"))
    for alpha, sides in ((0, (False, True)), (1, (True, False))):
        plan = plan_of(tmp_path, alpha=alpha)
        assert {(tensor.kind, bool(tensor.pretrained), bool(tensor.posttrained)) for tensor in plan.tensors()} == {
            ("copy", *sides)
        }


def test_tensors_that_the_pre_trained_side_lacks_are_refused_in_families(tmp_path: Path) -> None:
    post = llama_tensors("post") | tensors("post", *(Q.format(k=k) + ".bias" for k in range(6)))
    write_pair(
        tmp_path,
        llama_tensors("pre", tied=True),
        post,
        pre_config=llama_config(tie_word_embeddings=False),
    )
    assert sorted(refusals(tmp_path, "not-in-pretrained", alpha=0.5)) == [
        "lm_head.weight",
        "model.layers.*.self_attn.q_proj.bias (6 tensors)",
    ]
    kept = [{"match": name, "alpha": 0} for name in ("lm_head.*", "*.bias")]
    assert {tensor.kind for tensor in plan_of(tmp_path, alpha=0.5, tensors=kept).tensors()} == {"copy", "linear"}
    assert by_name(plan_of(tmp_path, tensors=[{"match": "model.norm.weight", "alpha": 1}]))["lm_head.weight"].alpha == 0


def test_shapes_that_differ_are_refused_where_both_sides_would_meet(tmp_path: Path) -> None:
    pre, post = llama_tensors("pre"), llama_tensors("post")
    pre["lm_head.weight"] = random_tensor("BF16", (18, 8), "pre")
    pre["model.embed_tokens.weight"] = random_tensor("BF16", (18, 8), "pre")
    write_pair(tmp_path, pre, post)
    assert refusals(tmp_path, "different-vocabularies", alpha=1) == ["model.embed_tokens.weight", "lm_head.weight"]
    assert len(by_name(plan_of(tmp_path, restore=[0, 5]))) == len(post)


def test_a_float32_side_is_cast_to_the_post_trained_dtype_with_a_note(tmp_path: Path) -> None:
    """gemma-2-9b is float32 and gemma-2-9b-it bfloat16."""
    write_pair(tmp_path, llama_tensors("pre", dtype="F32"), llama_tensors("post"))
    plan = plan_of(tmp_path, restore=[1, 2])
    restored = {name: tensor for name, tensor in by_name(plan).items() if re.match(r"model\.layers\.[12]\.", name)}
    assert {tensor.posttrained for tensor in restored.values()} == {None}
    read = {name: (plan.pair.pretrained[tensor.pretrained or ""].dtype,) for name, tensor in restored.items()}
    assert {(tensor.kind, tensor.info.dtype, read[name]) for name, tensor in restored.items()} == {
        ("cast", "BF16", ("F32",))
    }
    assert {tensor.info.dtype for tensor in plan.tensors()} == {"BF16"}
    (note,) = plan.notes
    assert "F32" in note
    assert "BF16" in note
    assert "10 tensors" in note


def test_the_dtype_of_a_recipe_applies_to_every_floating_tensor_and_no_other(tmp_path: Path) -> None:
    pre = llama_tensors("pre") | tensors("pre", "steps", dtype="I64")
    post = llama_tensors("post") | tensors("post", "steps", dtype="I64")
    write_pair(tmp_path, pre, post)
    plan = plan_of(tmp_path, restore=[1, 2], dtype="float32")
    assert {name for name, tensor in by_name(plan).items() if tensor[1].dtype != "F32"} == {"steps"}
    assert {tensor.kind for tensor in plan.tensors() if tensor.name != "steps"} == {"cast"}
    assert by_name(plan)["model.norm.weight"].info.nbytes == 8 * 4


@pytest.mark.parametrize(("dtype", "short"), [("float64", "F64"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_every_recipe_dtype_has_its_safetensors_name(tmp_path: Path, dtype: str, short: str) -> None:
    write_pair(tmp_path, llama_tensors("pre"), llama_tensors("post"))
    assert {tensor.info.dtype for tensor in plan_of(tmp_path, restore=[1, 2], dtype=dtype).tensors()} == {short}


def test_tensors_that_are_not_floating_are_copied_whole_never_blended(tmp_path: Path) -> None:
    pre, post = (llama_tensors(side) | tensors(side, "ids", dtype="I64") for side in ("pre", "post"))
    write_pair(tmp_path, pre, post)
    blended = plan_of(tmp_path, alpha=0.5)
    assert by_name(blended)["ids"][2:6] == (0.0, "copy", None, "ids")
    assert [note.rpartition(": ")[2] for note in blended.notes] == ["ids"]
    assert by_name(plan_of(tmp_path, alpha=1))["ids"][2:6] == (1.0, "copy", "ids", None)


def test_a_tensor_that_is_floating_on_one_side_only_cannot_be_restored(tmp_path: Path) -> None:
    pre = llama_tensors("pre") | tensors("pre", "ids", dtype="I32")
    write_pair(tmp_path, pre, llama_tensors("post") | tensors("post", "ids", dtype="F32"))
    assert refusals(tmp_path, "different-dtypes", alpha=1) == ["ids"]


def test_an_untied_head_is_read_from_the_embeddings_of_a_tied_pre_trained_model(tmp_path: Path) -> None:
    pre, post = llama_tensors("pre", tied=True), llama_tensors("post")
    write_pair(tmp_path, pre, post, pre_config=llama_config(tie_word_embeddings=True))
    plan = plan_of(tmp_path, tensors=[{"match": "lm_head.weight", "alpha": 1}])
    assert by_name(plan)["lm_head.weight"][2:6] == (1.0, "copy", "model.embed_tokens.weight", None)
    assert tensor_bytes(plan)["lm_head.weight"] == pre["model.embed_tokens.weight"].data
    assert [note.rpartition(": ")[2] for note in plan.notes] == ["lm_head.weight"]
    assert "model.embed_tokens.weight" in plan.notes[0]
    blend = by_name(plan_of(tmp_path, alpha=0.5))["lm_head.weight"]
    assert blend[2:6] == (0.5, "linear", "model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("is_stored", [True, False])
def test_an_embedding_that_is_the_head_on_the_post_trained_side_only_is_not_taken_from_an_untied_model(
    tmp_path: Path, is_stored: bool
) -> None:
    post = llama_tensors("post", tied=True)
    post |= {HEAD: post[EMBEDDING]} if is_stored else {}
    write_pair(tmp_path, llama_tensors("pre"), post, post_config=llama_config(tie_word_embeddings=True))
    for rules in ({"alpha": 0.5}, {"alpha": 1}, {"tensors": [{"match": EMBEDDING, "alpha": 1}]}):
        assert refusals(tmp_path, "tied-differently", **rules) == [EMBEDDING]
    assert by_name(plan_of(tmp_path, restore=[1, 2]))[EMBEDDING][2] == 0
    kept = by_name(plan_of(tmp_path, alpha=0.5, tensors=[{"match": EMBEDDING, "alpha": 0}]))
    assert {name for name, tensor in kept.items() if tensor[2] == 0} == {EMBEDDING, HEAD} & post.keys()


def test_heads_that_are_tied_alike_are_blended_each_by_itself(tmp_path: Path) -> None:
    tied = llama_config(tie_word_embeddings=True)
    write_pair(tmp_path, llama_tensors("pre"), llama_tensors("post"), pre_config=tied, post_config=tied)
    assert by_name(plan_of(tmp_path, alpha=1))[HEAD][4] == HEAD


@pytest.mark.parametrize(
    ("is_stored", "rules", "noted"),
    [(True, {"alpha": 1}, (1, 0)), (True, {"restore": [1, 2]}, (0, 0)), (False, {"alpha": 1}, (0, 1))],
)
def test_a_head_that_the_pre_trained_config_ties_to_the_embedding_is_not_silently_left_out(
    tmp_path: Path, is_stored: bool, rules: dict[str, Any], noted: tuple[int, int]
) -> None:
    tied = llama_config(tie_word_embeddings=True)
    pre, post = llama_tensors("pre", tied=not is_stored), llama_tensors("post", tied=True)
    write_pair(tmp_path, pre, post, pre_config=tied, post_config=tied)
    notes = plan_of(tmp_path, **rules).notes
    assert tuple(sum(part in note for note in notes) for part in (f"ties it to {EMBEDDING}", "everything")) == noted


ROTARY = [f"model.layers.{k}.self_attn.rotary_emb.inv_freq" for k in range(6)]


def test_derived_constants_come_from_whichever_side_has_them(tmp_path: Path) -> None:
    post = llama_tensors("post") | tensors("post", *ROTARY, dtype="F32", shape=(4,))
    write_pair(tmp_path, llama_tensors("pre"), post)
    planned = by_name(plan_of(tmp_path, restore=[0, 5]))
    assert all(planned[name][2:6] == (0.0, "copy", None, name) for name in ROTARY)


def test_derived_constants_of_the_pre_trained_side_alone_are_left_out(tmp_path: Path) -> None:
    write_pair(tmp_path, llama_tensors("pre") | tensors("pre", *ROTARY, dtype="F32", shape=(4,)), llama_tensors("post"))
    plan = plan_of(tmp_path, restore=[0, 5])
    assert by_name(plan).keys() == llama_tensors("post").keys()
    assert [note.rpartition(": ")[2] for note in plan.notes] == [f"{ROTARY[0].replace('.0.', '.*.')} (6 tensors)"]


def test_a_restored_layer_may_not_lose_tensors_that_only_the_pre_trained_side_has(tmp_path: Path) -> None:
    pre = llama_tensors("pre") | tensors("pre", *(Q.format(k=k) + ".bias" for k in range(6)))
    write_pair(tmp_path, pre, llama_tensors("post"))
    where = "model.layers.*.self_attn.q_proj.bias (3 tensors)"
    assert refusals(tmp_path, "different-architectures", restore=[1, 3]) == [where]
    outside = plan_of(tmp_path, tensors=[{"match": "model.norm.weight", "alpha": 1}])
    assert by_name(outside).keys() == llama_tensors("post").keys()


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("fp8", "model.layers.*.mlp.up_proj.weight (4 tensors)"),
        ("gptq", "model.layers.*.self_attn.q_proj.qweight (4 tensors)"),
        ("mxfp4", "model.layers.*.mlp.experts.gate_up_proj_blocks (4 tensors)"),
    ],
)
def test_quantized_tensors_are_never_blended(tmp_path: Path, name: str, tensor: str) -> None:
    make, config, _ = ARCHITECTURES[name]
    write_pair(tmp_path, make("pre"), make("post"), pre_config=config, post_config=config)
    assert tensor in refusals(tmp_path, "quantized-blend", alpha=0.5)


@pytest.mark.parametrize("name", ["fp8", "gptq", "mxfp4"])
def test_quantization_that_differs_refuses_a_restoration(tmp_path: Path, name: str) -> None:
    make, config, _ = ARCHITECTURES[name]
    other = {**config, "quantization_config": {"quant_method": "other"}}
    write_pair(tmp_path, make("pre"), make("post"), pre_config=other, post_config=config)
    assert refusals(tmp_path, "different-quantization", restore=[1, 2]) == [str(tmp_path / "pre")]


@pytest.mark.parametrize(("pre", "post"), [("fp8", "plain"), ("plain", "fp8")])
def test_a_quantized_and_a_plain_side_do_not_meet(tmp_path: Path, pre: str, post: str) -> None:
    plain = {name: random_tensor("BF16", tensor.shape, name) for name, tensor in fp8("plain").items()}
    plain = {name: tensor for name, tensor in plain.items() if not name.endswith("_inv")}
    sides = {"fp8": (fp8("fp8"), ARCHITECTURES["fp8"][1]), "plain": (plain, FOUR)}
    write_pair(tmp_path, sides[pre][0], sides[post][0], pre_config=sides[pre][1], post_config=sides[post][1])
    side = "pre" if pre == "fp8" else "post"
    assert refusals(tmp_path, "quantized-one-side", restore=[1, 2]) == [str(tmp_path / side)]
    kept = plan_of(tmp_path, tensors=[{"match": "lm_head.weight", "alpha": 1}])
    assert by_name(kept)["lm_head.weight"].alpha == 1


def test_a_quantized_module_is_not_split_between_the_sides(tmp_path: Path) -> None:
    make, config, _ = ARCHITECTURES["fp8"]
    write_pair(tmp_path, make("pre"), make("post"), pre_config=config, post_config=config)
    rules = {"restore": [1, 2], "tensors": [{"match": "*.weight_scale_inv", "alpha": 0}]}
    assert refusals(tmp_path, "quantized-module-split", **rules) == ["model.layers.*.mlp.up_proj (2 tensors)"]


def test_a_quantized_checkpoint_gets_no_other_dtype(tmp_path: Path) -> None:
    make, config, _ = ARCHITECTURES["fp8"]
    write_pair(tmp_path, make("pre"), make("post"), pre_config=config, post_config=config)
    where = "model.layers.0.mlp.up_proj.weight"
    assert refusals(tmp_path, "quantized-cast", restore=[1, 2], dtype="float16") == [where]


def test_the_unquantized_tensors_of_a_quantized_model_can_be_blended(tmp_path: Path) -> None:
    make, config, _ = ARCHITECTURES["fp8"]
    write_pair(tmp_path, make("pre"), make("post"), pre_config=config, post_config=config)
    plan = plan_of(tmp_path, tensors=[{"match": "*norm.weight", "alpha": 0.5}])
    assert {name for name, tensor in by_name(plan).items() if tensor.kind == "linear"} == set(
        stack("model.layers", 4, "norm.weight")
    )


def test_everything_that_does_not_fit_is_reported_together(tmp_path: Path) -> None:
    pre, post = llama_tensors("pre"), llama_tensors("post")
    pre["model.norm.weight"] = random_tensor("BF16", (9,), "pre")
    del pre["lm_head.weight"]
    write_pair(tmp_path, pre, post, pre_config=llama_config(tie_word_embeddings=False))
    codes = ["pattern-matches-nothing", "different-shapes", "not-in-pretrained"]
    assert refusals(tmp_path, *codes, alpha=0.5, tensors=[{"match": "zzz.*", "alpha": 1}]) == [
        "recipe: $.tensors[0].match",
        "model.norm.weight",
        "lm_head.weight",
    ]
