"""Which side is which, and everything that cannot be said as a merge of two checkpoints."""

from pathlib import Path
from typing import Any

import pytest

from slrmerge.errors import RecipeError
from slrmerge.mergekit import is_config
from slrmerge.mergekit.read import read_config
from tests.mergekit import (
    BASE,
    STACK,
    alphas_of,
    arithmetic,
    both,
    everywhere,
    linear,
    part,
    passthrough,
    refusal,
    slerp,
    source,
    unweighted,
    view,
)

# which side is which, and what else the recipe says


SIDES = {"pretrained": "pre", "posttrained": "post"}


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
def test_a_config_says_which_side_is_which_and_what_to_write(config: dict[str, Any], recipe: dict[str, Any]) -> None:
    assert read_config(config, "c.yml")[0] == recipe


def test_the_share_is_that_of_the_side_that_is_not_the_donor() -> None:
    assert view(alphas_of(linear(0.25, 0.75, base_model="pre"))) == everywhere(0.25)
    assert view(alphas_of(passthrough(("pre", 0, 2), ("post", 2, 5)))) == [0, 0, 0, 1, 1, 1, 1, 1]


def test_folders_count_from_the_working_directory_as_in_mergekit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "post").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe, rules = read_config(linear(1, 3), "elsewhere/c.yml")
    assert recipe == {"pretrained": "pre", "posttrained": str(tmp_path / "post")}
    assert rules.alphas(["x"], STACK.locate, 5) == ({"x": 0.75}, [])


def test_a_config_is_told_from_a_recipe_by_its_method() -> None:
    assert is_config({"merge_method": None})
    assert not is_config({"pretrained": "a", "models": []})


# refusals


METHODS = "known: passthrough, linear, task_arithmetic, slerp; for others use mergekit"
KEYS = (
    "merge_method, base_model, models, slices, parameters, dtype, out_dtype, tokenizer_source, chat_template"
)  # fmt: skip
DTYPES = "use 'float64', 'float32', 'float16' or 'bfloat16'"
RANGE = "is not a layer_range; write [first, one past the last]"
NO_MODEL = "is not a model that can be merged here; name a folder or a repository"

MODULES = (
    "c.yml: $.modules: cannot be said as a merge of two checkpoints; "
    "mergekit would merge each module by a config of its own"
)
UNION = (
    "c.yml: $.tokenizer_source: union is neither base nor one of the two models; mergekit would build a new tokenizer"
)

REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "three models": (
        linear(1, 1, models=[source("post"), source("pre"), source("third")]),
        ["c.yml: $: names 3 models: post, pre, third; a merge here is of two"],
    ),
    "three models with the base": (
        linear(1, 1, base_model="third"),
        ["c.yml: $: names 3 models: third, post, pre; a merge here is of two"],
    ),
    "one model": (
        passthrough(("post", 0, 5), **BASE),
        ["c.yml: $: names only one model; a merge here is of two"],
    ),
    "an unknown method": (
        linear(1, 1, merge_method="ties"),
        [f"c.yml: $.merge_method: ties is no merge that takes each tensor from two checkpoints alike; {METHODS}"],
    ),
    "a method that is no text": (linear(1, 1, merge_method=3), ["c.yml: $.merge_method: 3 is not valid; write a text"]),
    "modules and a tokenizer, and what else is wrong": (
        linear(1, 1, modules={}, tokenizer={"source": "union"}, dtyp="x"),
        [
            MODULES,
            "c.yml: $.tokenizer: cannot be said as a merge of two checkpoints; mergekit would build a new tokenizer",
            "c.yml: $: unknown key dtyp; did you mean dtype?",
        ],
    ),
    "modules alone": (
        {"merge_method": "linear", "modules": {"text_decoder": {"models": []}}},
        [
            MODULES,
            "c.yml: $: needs either models or slices; give one of them",
        ],
    ),
    "a union of tokenizers": (
        linear(1, 1, tokenizer_source="union"),
        [
            UNION,
        ],
    ),
    "another tokenizer": (
        linear(1, 1, tokenizer_source="third"),
        ["c.yml: $.tokenizer_source: third is neither base nor one of the two models; name one of them"],
    ),
    "a LoRA": (
        linear(1, 1, models=[source("post"), source("pre+lora")]),
        ["c.yml: $.models[1].model: pre+lora adds a LoRA; mergekit would merge it first; do so, and name the result"],
    ),
    "models that are none": (
        linear(1, 1, base_model="", models=[source(3), source({"path": "a", "name": "b"}), source(None)]),
        [
            f"c.yml: $.base_model: '' {NO_MODEL}",
            f"c.yml: $.models[0].model: 3 {NO_MODEL}",
            f"c.yml: $.models[1].model: {{'name': 'b', 'path': 'a'}} {NO_MODEL}",
            f"c.yml: $.models[2].model: None {NO_MODEL}",
        ],
    ),
    "a path that is no text": (
        linear(1, 1, base_model={"path": 3}),
        [f"c.yml: $.base_model: {{'path': 3}} {NO_MODEL}"],
    ),
    "a path that is nothing": (
        linear(1, 1, base_model={"path": None, "revision": "main"}),
        [f"c.yml: $.base_model: {{'path': None, 'revision': 'main'}} {NO_MODEL}"],
    ),
    "unknown keys at every level": (
        {
            "merge_method": "linear",
            "mergemethod": "linear",
            "zzz": 1,
            "slices": [part({"modle": "a", "model": "post"}, sorces=[])],
        },
        [
            "c.yml: $.slices[0].sources[0]: unknown key modle; did you mean model?",
            "c.yml: $.slices[0]: unknown key sorces; did you mean sources?",
            "c.yml: $: unknown key mergemethod; did you mean merge_method?",
            f"c.yml: $: unknown key zzz; known: {KEYS}",
        ],
    ),
    "unknown keys of models": (
        linear(1, 1, models=[source("post") | {"weight": 1}, source("pre")]),
        ["c.yml: $.models[0]: unknown key weight; known: model, layer_range, parameters"],
    ),
    "unknown parameters, each once, at every level": (
        unweighted(
            parameters={"wieght": 1, "density": 1}, models=[source("post", wieght=1), source("pre", normalise=1)]
        ),
        [
            "c.yml: $.parameters: linear has no wieght here; did you mean weight?",
            "c.yml: $.parameters: linear has no density here; known: weight, normalize, int8_mask",
            "c.yml: $.parameters: linear has no normalise here; did you mean normalize?",
        ],
    ),
    "a slice's unknown parameter": (
        slerp(1, slices=[both(0, 5, parameters={"weight": 1})]),
        ["c.yml: $.parameters: slerp has no weight here; known: t"],
    ),
    "parameters of a method without": (
        passthrough(("post", 0, 1), ("pre", 1, 5), parameters={"scale": 2}),
        ["c.yml: $.parameters: passthrough has no scale here; leave it out"],
    ),
    "a parameter of another method": (
        arithmetic(source("pre", weight=1), t=1),
        ["c.yml: $.parameters: task_arithmetic has no t here; known: weight, normalize, lambda, int8_mask, rescale"],
    ),
    "models and slices": (
        linear(1, 1, slices=[both(0, 5)]),
        ["c.yml: $: needs either models or slices; give one of them"],
    ),
    "neither models nor slices": (
        {"merge_method": "linear"},
        ["c.yml: $: needs either models or slices; give one of them"],
    ),
    "a slice of nothing": (
        slerp(1, slices=[part()]),
        ["c.yml: $.slices[0].sources: [] is not valid; give at least one"],
    ),
    "layer ranges that are none": (
        slerp(1, slices=[both(3, 2), both(0), both(-1, 2), part({"model": "post", "layer_range": "0-3"})]),
        [
            f"c.yml: $.slices[{number}].sources[{which}].layer_range: {value} {RANGE}"
            for number, which, value in (
                (0, 0, "[3, 2]"), (0, 1, "[3, 2]"), (1, 0, "[0]"), (1, 1, "[0]"), (2, 0, "[-1, 2]"), (2, 1, "[-1, 2]"),
                (3, 0, "'0-3'"),
            )
        ],
    ),
    "layers that are no whole numbers": (
        slerp(1, slices=[part(*({"model": "post", "layer_range": ends} for ends in ([0, 2.0], [False, 2])))]),
        [
            f"c.yml: $.slices[0].sources[0].layer_range: [0, 2.0] {RANGE}",
            f"c.yml: $.slices[0].sources[1].layer_range: [False, 2] {RANGE}",
        ],
    ),
    "dtypes": (
        linear(1, 1, dtype="int8", out_dtype="fp16"),
        [f"c.yml: $.dtype: 'int8' is not known; {DTYPES}", f"c.yml: $.out_dtype: 'fp16' is not known; {DTYPES}"],
    ),
    "a chat template of its own": (
        linear(1, 1, chat_template="chatml"),
        ["c.yml: $.chat_template: 'chatml' is not known; use 'auto'"],
    ),
    "a slerp without its start": (
        slerp(0.5, base_model=None),
        ["c.yml: $.base_model: is missing; slerp starts from it"],
    ),
    "an arithmetic without its start, of one model": (
        {"merge_method": "task_arithmetic", "models": [source("pre", weight=1)]},
        [
            "c.yml: $: names only one model; a merge here is of two",
            "c.yml: $.base_model: is missing; task_arithmetic starts from it",
        ],
    ),
    "a slice with a base of its own": (
        slerp(0.5, slices=[both(0, 2), both(2, 5, base_model="pre")]),
        ["c.yml: $.slices: a slice has pre as its base; mergekit would start some layers from another model"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_merge_of_two_checkpoints_is_refused_with_its_place_and_why(case: str) -> None:
    config, lines = REFUSED[case]
    assert refusal(config) == lines


@pytest.mark.parametrize("key", ["models", "slices"])
def test_a_merge_of_nothing_is_refused(key: str) -> None:
    with pytest.raises(RecipeError, match=r"^c\.yml: \$"):
        read_config({"merge_method": "linear", key: []}, "c.yml")


def test_a_slice_with_the_same_base_is_sound() -> None:
    assert view(alphas_of(slerp(0.5, slices=[both(0, 5, **BASE)]))) == everywhere(0.5)
