"""Which side is which, and configs that are not merges of two checkpoints."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from slrmerge.errors import OptionError, RecipeError
from slrmerge.merging.export import export_mergekit
from slrmerge.merging.plan.planner import plan_merge
from slrmerge.recipe.mergekit.recipe import MergekitRecipe
from tests.adapters import lora_tensors, write_adapter
from tests.checkpoints import llama_config, llama_tensors, random_tensor, write_checkpoint
from tests.conftest import Pair
from tests.problems import refused
from tests.recipe.mergekit import (
    BASE,
    alphas_of,
    arithmetic,
    both,
    everywhere,
    linear,
    part,
    passthrough,
    slerp,
    source,
    unweighted,
    view,
)

SIDES = {"pretrained": "pre", "posttrained": "post"}


def read(config: dict[str, Any]) -> MergekitRecipe:
    return MergekitRecipe.from_dict(config)


@pytest.mark.parametrize(
    ("config", "recipe"),
    [
        (linear(1, 1), SIDES),
        (linear(1, 1, base_model="pre"), {"pretrained": "post", "posttrained": "pre"}),
        (passthrough(("pre", 0, 2), ("post", 2, 5)), {"pretrained": "post", "posttrained": "pre"}),
        (passthrough(("pre", 0, 2), ("post", 2, 5), **BASE), SIDES),
        (slerp(0.5), {**SIDES, "blend": "slerp"}),
        (arithmetic(source("pre", weight=1)), SIDES),
        (linear(1, 1, dtype="bfloat16"), {**SIDES, "dtype": "bfloat16"}),
        (linear(1, 1, out_dtype="float16"), {**SIDES, "dtype": "float16"}),
        (linear(1, 1, dtype="float32", out_dtype="float16"), {**SIDES, "dtype": "float16"}),
        (linear(1, 1, tokenizer_source="base"), SIDES),
        (linear(1, 1, tokenizer_source="post"), SIDES),
        (linear(1, 1, tokenizer_source="pre"), {**SIDES, "tokenizer": "pretrained"}),
        (linear(1, 1, chat_template="auto"), SIDES),
        (
            unweighted(
                base_model={"path": "org/post", "revision": "v1"},
                models=[source("org/pre@main"), source("org/post@v1")],
            ),
            {"pretrained": "org/pre@main", "posttrained": "org/post@v1"},
        ),
        (
            unweighted(models=[source({"path": "org/post"}), source({"model": {"path": "org/pre", "revision": None}})]),
            {"pretrained": "org/pre", "posttrained": "org/post"},
        ),
    ],
)  # fmt: skip
def test_a_config_is_read_like_a_recipe(config: dict[str, Any], recipe: dict[str, Any]) -> None:
    found = read(config)
    defaults = {"dtype": None, "blend": "linear", "tokenizer": "posttrained"}
    assert {key: getattr(found, key) for key in SIDES | defaults} == defaults | recipe
    assert found.has_rules


def test_alpha_is_the_share_of_the_model_that_is_not_the_base() -> None:
    assert view(alphas_of(linear(0.25, 0.75, base_model="pre"))) == everywhere(0.25)
    assert view(alphas_of(passthrough(("pre", 0, 2), ("post", 2, 5)))) == [0, 0, 0, 1, 1, 1, 1, 1]


def test_folders_count_from_the_current_one_as_in_mergekit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "post").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = MergekitRecipe.from_dict(linear(1, 3), Path("elsewhere/c.yml"))
    assert (recipe.pretrained, recipe.posttrained) == ("pre", str(tmp_path / "post"))
    assert recipe.source("posttrained") == tmp_path / "post"
    assert recipe.place("$") == "elsewhere/c.yml: $"


@pytest.mark.parametrize("model", ["pre+lora", {"model": {"path": "pre"}, "lora": {"path": "lora"}}])
def test_a_model_with_a_lora_is_the_adapter_on_that_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: object
) -> None:
    base = llama_tensors("pre")
    write_checkpoint(tmp_path / "pre", base)
    write_adapter(tmp_path / "lora", lora_tensors(base, ["model.layers.2.self_attn.q_proj"]))
    monkeypatch.chdir(tmp_path)
    config = read(linear(1, 1, models=[{"model": model, "parameters": {"weight": 1}}, source("pre")]))
    pair = config.open_pair()
    assert pair.posttrained.computed == {"model.layers.2.self_attn.q_proj.weight"}
    assert read(config.as_run(pair, tmp_path)).open_pair().posttrained.identity == pair.posttrained.identity


def test_what_export_writes_for_a_merge_with_an_adapter_is_read_again(tmp_path: Path) -> None:
    base = llama_tensors("pre")
    write_checkpoint(tmp_path / "pre", base)
    write_adapter(tmp_path / "lora", lora_tensors(base, ["model.layers.2.self_attn.q_proj"]))
    posttrained = f"{tmp_path / 'pre'}+{tmp_path / 'lora'}"
    plan = plan_merge({"pretrained": str(tmp_path / "pre"), "posttrained": posttrained, "restore": [1, 2]})
    again = plan_merge(read(yaml.safe_load(export_mergekit(plan))))
    assert list(again.tensors()) == list(plan.tensors())


def test_a_folder_with_a_plus_in_its_name_is_not_a_lora(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    recipe = read(linear(1, 1, models=[source("post"), source(str(tmp_path / "a+b"))]))
    assert recipe.pretrained == str(tmp_path / "a+b")


# refusals


REFUSED: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "three models": (
        linear(1, 1, models=[source("post"), source("pre"), source("third")]),
        [("not-two-models", "recipe: $")],
    ),
    "three models with the base": (
        linear(1, 1, base_model="third"),
        [("not-two-models", "recipe: $")],
    ),
    "one model": (
        passthrough(("post", 0, 5), **BASE),
        [("not-two-models", "recipe: $")],
    ),
    "an unknown method": (
        linear(1, 1, merge_method="ties"),
        [("unsupported-method", "recipe: $.merge_method")],
    ),
    "a method that is not a string": (linear(1, 1, merge_method=3), [("wrong-type", "recipe: $.merge_method")]),
    "modules and a tokenizer, and what else is wrong": (
        linear(1, 1, modules={}, tokenizer={"source": "union"}, dtyp="x"),
        [
            ("unsupported-config", "recipe: $.modules"),
            ("unsupported-config", "recipe: $.tokenizer"),
            ("unknown-key", "recipe: $"),
        ],
    ),
    "modules alone": (
        {"merge_method": "linear", "modules": {"text_decoder": {"models": []}}},
        [
            ("unsupported-config", "recipe: $.modules"),
            ("models-or-slices", "recipe: $"),
        ],
    ),
    "a union of tokenizers": (
        linear(1, 1, tokenizer_source="union"),
        [
            ("unsupported-config", "recipe: $.tokenizer_source"),
        ],
    ),
    "another tokenizer": (
        linear(1, 1, tokenizer_source="third"),
        [("unsupported-config", "recipe: $.tokenizer_source")],
    ),
    "values that are not models": (
        linear(1, 1, base_model="", models=[source(3), source({"path": "a", "name": "b"}), source(None)]),
        [
            ("invalid-model", "recipe: $.base_model"),
            ("invalid-model", "recipe: $.models[0].model"),
            ("invalid-model", "recipe: $.models[1].model"),
            ("invalid-model", "recipe: $.models[2].model"),
        ],
    ),
    "a path that is not a string": (
        linear(1, 1, base_model={"path": 3}),
        [("invalid-model", "recipe: $.base_model")],
    ),
    "a path that is nothing": (
        linear(1, 1, base_model={"path": None, "revision": "main"}),
        [("invalid-model", "recipe: $.base_model")],
    ),
    "unknown keys at every level": (
        {
            "merge_method": "linear",
            "mergemethod": "linear",
            "zzz": 1,
            "slices": [part({"modle": "a", "model": "post"}, sorces=[])],
        },
        [
            ("unknown-key", "recipe: $.slices[0].sources[0]"),
            ("unknown-key", "recipe: $.slices[0]"),
            ("unknown-key", "recipe: $"),
            ("unknown-key", "recipe: $"),
        ],
    ),
    "unknown keys of models": (
        linear(1, 1, models=[source("post") | {"weight": 1}, source("pre")]),
        [("unknown-key", "recipe: $.models[0]")],
    ),
    "unknown parameters, each once, at every level": (
        unweighted(
            parameters={"wieght": 1, "density": 1}, models=[source("post", wieght=1), source("pre", normalise=1)]
        ),
        [
            ("unknown-key", "recipe: $.parameters"),
            ("unknown-key", "recipe: $.parameters"),
            ("unknown-key", "recipe: $.parameters"),
        ],
    ),
    "a slice's unknown parameter": (
        slerp(1, slices=[both(0, 5, parameters={"weight": 1})]),
        [("unknown-key", "recipe: $.parameters")],
    ),
    "parameters of a method without": (
        passthrough(("post", 0, 1), ("pre", 1, 5), parameters={"scale": 2}),
        [("unknown-key", "recipe: $.parameters")],
    ),
    "a parameter of another method": (
        arithmetic(source("pre", weight=1), t=1),
        [("unknown-key", "recipe: $.parameters")],
    ),
    "models and slices": (
        linear(1, 1, slices=[both(0, 5)]),
        [("models-or-slices", "recipe: $")],
    ),
    "neither models nor slices": (
        {"merge_method": "linear"},
        [("models-or-slices", "recipe: $")],
    ),
    "a slice without sources": (
        slerp(1, slices=[part()]),
        [("empty", "recipe: $.slices[0].sources")],
    ),
    "invalid layer ranges": (
        slerp(1, slices=[both(3, 2), both(0), both(-1, 2), part({"model": "post", "layer_range": "0-3"})]),
        [
            ("invalid-interval", f"recipe: $.slices[{number}].sources[{which}].layer_range")
            for number, which in (
                (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1),
                (3, 0),
            )
        ],
    ),
    "layers that are not whole numbers": (
        slerp(1, slices=[part(*({"model": "post", "layer_range": ends} for ends in ([0, 2.0], [False, 2])))]),
        [
            ("invalid-interval", "recipe: $.slices[0].sources[0].layer_range"),
            ("invalid-interval", "recipe: $.slices[0].sources[1].layer_range"),
        ],
    ),
    "dtypes": (
        linear(1, 1, dtype="int8", out_dtype="fp16"),
        [("invalid-choice", "recipe: $.dtype"), ("invalid-choice", "recipe: $.out_dtype")],
    ),
    "a chat template of its own": (
        linear(1, 1, chat_template="chatml"),
        [("invalid-choice", "recipe: $.chat_template")],
    ),
    "a slerp without a base model": (
        slerp(0.5, base_model=None),
        [("missing-key", "recipe: $.base_model")],
    ),
    "an arithmetic of one model, without a base model": (
        {"merge_method": "task_arithmetic", "models": [source("pre", weight=1)]},
        [
            ("not-two-models", "recipe: $"),
            ("missing-key", "recipe: $.base_model"),
        ],
    ),
    "a slice with a base of its own": (
        slerp(0.5, slices=[both(0, 2), both(2, 5, base_model="pre")]),
        [("unsupported-config", "recipe: $.slices")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_is_not_a_merge_of_two_checkpoints_is_refused(case: str) -> None:
    config, expected = REFUSED[case]
    with pytest.raises(RecipeError) as caught:
        read(config)
    assert [(problem.code, problem.where) for problem in caught.value.problems] == expected


@pytest.mark.parametrize("key", ["models", "slices"])
def test_a_config_without_models_is_refused(key: str) -> None:
    with refused(RecipeError, "empty"):
        read({"merge_method": "linear", key: []})


def test_a_slice_may_repeat_the_base_model() -> None:
    assert view(alphas_of(slerp(0.5, slices=[both(0, 5, **BASE)]))) == everywhere(0.5)


# overrides


def test_dtype_and_shard_size_can_be_overridden_one_by_one() -> None:
    recipe = read(linear(1, 1, dtype="float32", out_dtype="bfloat16"))
    changed = recipe.override(max_shard_size="2KiB").override(dtype="float16")
    assert (recipe.dtype, recipe.max_shard_size) == ("bfloat16", 5 * 10**9)
    assert (changed.dtype, changed.max_shard_size) == ("float16", 2048)
    assert changed.override() == changed


def test_overrides_are_checked() -> None:
    recipe = read(linear(1, 1))
    with refused(RecipeError, "invalid-choice", "invalid-size") as caught:
        recipe.override(dtype="int8", max_shard_size="big")
    assert [problem.where for problem in caught.value.problems] == ["recipe: $.dtype", "recipe: $.max_shard_size"]
    with refused(OptionError, "unknown-option"):
        recipe.override(alpha=0.5, blend="slerp")


# pairs


def config_of(pair: Pair, **more: Any) -> MergekitRecipe:
    post, pre = (str(pair.folder / name) for name in ("post", "pre"))
    return read(linear(1, 1, models=[source(post, weight=1), source(pre, weight=3)], **more))


def test_a_config_resolves_for_a_pair(pair: Pair) -> None:
    recipe = config_of(pair)
    opened = recipe.open_pair()
    assert (opened.pretrained.folder, opened.posttrained.folder) == (pair.folder / "pre", pair.folder / "post")
    alphas, problems = recipe.resolve(opened)
    assert (dict(alphas), problems) == (dict.fromkeys(pair.post, 0.75), [])


def test_without_known_layers_a_config_is_refused(tmp_path: Path) -> None:
    for side in ("pre", "post"):
        tensors = {f"{tower}.{k}.weight": random_tensor("F32", (2,), side) for tower in "ab" for k in range(2)}
        write_checkpoint(tmp_path / side, tensors, llama_config(layers=2))
    recipe = read(linear(1, 1, models=[source(str(tmp_path / side)) for side in ("post", "pre")]))
    alphas, problems = recipe.resolve(recipe.open_pair())
    assert len(alphas) == 0
    assert [(problem.code, problem.where) for problem in problems] == [("no-layers", "recipe")]


def test_notes_tell_which_model_supplies_config_and_tokenizer(pair: Pair) -> None:
    assert len(list(config_of(pair).notes(pair.open()))) == 1
    assert len(list(config_of(pair, tokenizer_source="base").notes(pair.open()))) == 2


def test_slices_after_which_mergekit_treats_norm_and_head_otherwise_are_noted(pair: Pair) -> None:
    post, pre = (str(pair.folder / name) for name in ("post", "pre"))

    def notes(*models: tuple[str, ...]) -> list[str]:
        parts = [
            part(*(source(name, 3 * number, 3 * number + 3, weight=1) for name in names))
            for number, names in enumerate(models)
        ]
        return list(read({"merge_method": "linear", "slices": parts}).notes(pair.open()))

    assert len(notes((post,), (post, pre))) == 2
    assert len(notes((post, pre), (post,))) == 1


def test_a_config_as_it_was_run_has_pinned_models_and_the_same_alphas(tmp_path: Path) -> None:
    config = slerp([0, 1], tokenizer_source="pre", slices=[both(0, 2), both(2, 5, base_model="post")])
    pair: Any = SimpleNamespace(
        pretrained=SimpleNamespace(reference="org/pre@12"), posttrained=SimpleNamespace(reference="/models/post")
    )
    written = read(config).override(dtype="float16").as_run(pair, tmp_path)
    again = read(written)
    assert (again.pretrained, again.posttrained) == ("org/pre@12", "/models/post")
    assert (again.tokenizer, again.dtype, again.blend) == ("pretrained", "float16", "slerp")
    assert alphas_of(written) == alphas_of(config)
    assert {model for piece in again.config.parts for model in [piece.base_model]} == {None, "/models/post"}


def test_parameters_are_not_renamed(tmp_path: Path) -> None:
    config = slerp([{"filter": "post", "value": 1}, {"value": 0.5}])
    pair: Any = SimpleNamespace(
        pretrained=SimpleNamespace(reference="org/pre@12"), posttrained=SimpleNamespace(reference="/models/post")
    )
    assert read(config).as_run(pair, tmp_path)["parameters"] == config["parameters"]
