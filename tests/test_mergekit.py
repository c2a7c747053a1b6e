"""mergekit's configs: every way to say the merge of two checkpoints, every refusal, and no traceback."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slrmerge.checkpoint import LayerStack
from slrmerge.errors import RecipeError
from slrmerge.mergekit import is_config
from slrmerge.mergekit.read import read_config

STACK = LayerStack("model.layers", 5)  # so that a gradient's steps are quarters
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{k}.{inner}" for k in range(5) for inner in ("mlp.up.weight", "self_attn.q.weight")),
    "model.norm.weight",
    "lm_head.weight",
]
SEE = "see mergekit's documentation of the method"
BASE = {"base_model": "post"}


def source(model: object, *layer_range: int, **parameters: object) -> dict[str, Any]:
    """A source of a merge: a model, its layers where they are given, its own parameters."""
    layers = {"layer_range": list(layer_range)} if layer_range else {}
    return {"model": model, **layers, **({"parameters": parameters} if parameters else {})}


def part(*sources: Mapping[str, Any], **more: object) -> dict[str, Any]:
    return {"sources": list(sources), **more}


def both(*layer_range: int, **more: object) -> dict[str, Any]:
    """A slice of the same layers of both sides."""
    return part(source("post", *layer_range), source("pre", *layer_range), **more)


def linear(post: object, pre: object, **more: object) -> dict[str, Any]:
    models = [source("post", weight=post), source("pre", weight=pre)]
    return {"merge_method": "linear", "models": models, **more}


def unweighted(**more: object) -> dict[str, Any]:
    """A mean whose sources name no weight of their own."""
    return {"merge_method": "linear", "models": [source("post"), source("pre")], **more}


def slerp(t: object, **more: object) -> dict[str, Any]:
    models = {} if "slices" in more else {"models": [source("post"), source("pre")]}
    return {"merge_method": "slerp", **BASE, **models, "parameters": {"t": t}, **more}


def arithmetic(task: Mapping[str, Any], **parameters: object) -> dict[str, Any]:
    """A task arithmetic of one task on the post-trained side."""
    return {"merge_method": "task_arithmetic", **BASE, "models": [task], "parameters": parameters}


def passthrough(*slices: tuple[str, int, int], **more: object) -> dict[str, Any]:
    return {"merge_method": "passthrough", "slices": [part(source(*own)) for own in slices], **more}


def alphas_of(config: Mapping[str, Any]) -> dict[str, float]:
    _, rules = read_config(config, "c.yml")
    alphas, problems = rules.alphas(NAMES, STACK.locate, STACK.count)
    assert problems == []
    assert list(alphas) == NAMES
    return alphas


def view(alphas: Mapping[str, float]) -> list[float | tuple[float, float]]:
    """The alphas of embeddings, each layer, norm, head; where a layer's MLP and attention differ, both."""
    layers = [
        (alphas[f"model.layers.{k}.mlp.up.weight"], alphas[f"model.layers.{k}.self_attn.q.weight"]) for k in range(5)
    ]
    return [
        alphas["model.embed_tokens.weight"],
        *(mlp if mlp == attention else (mlp, attention) for mlp, attention in layers),
        alphas["model.norm.weight"],
        alphas["lm_head.weight"],
    ]


def everywhere(alpha: float) -> list[float]:
    return [alpha] * 8


# what a config says: the share of the pre-trained side in embeddings, five layers, norm, head


PASSTHROUGHS = {
    "a restoration": (
        passthrough(("post", 0, 1), ("pre", 1, 3), ("post", 3, 5), **BASE),
        [0, 0, 1, 1, 0, 0, 0, 0],
    ),
    "the first slice gives the embeddings": (
        passthrough(("pre", 0, 2), ("post", 2, 5), **BASE),
        [1, 1, 1, 0, 0, 0, 0, 0],
    ),
    "the last slice gives norm and head": (
        passthrough(("post", 0, 2), ("pre", 2, 5), **BASE),
        [0, 0, 0, 1, 1, 1, 1, 1],
    ),
    "a slice of no layers keeps the embeddings": (
        passthrough(("post", 0, 0), ("pre", 0, 2), ("post", 2, 5), **BASE),
        [0, 1, 1, 0, 0, 0, 0, 0],
    ),
    "a slice of no layers keeps norm and head": (
        passthrough(("post", 0, 3), ("pre", 3, 5), ("post", 5, 5), **BASE),
        [0, 0, 0, 0, 1, 1, 0, 0],
    ),
    "only the ends": (
        passthrough(("pre", 0, 0), ("post", 0, 5), ("pre", 5, 5), **BASE),
        [1, 0, 0, 0, 0, 0, 1, 1],
    ),
    "slices of no layers in the middle": (
        passthrough(("post", 0, 2), ("pre", 2, 2), ("post", 2, 4), ("pre", 4, 5), **BASE),
        [0, 0, 0, 0, 0, 1, 1, 1],
    ),
    "all of the other side": (
        {"merge_method": "passthrough", **BASE, "models": [source("pre")]},
        everywhere(1),
    ),
}
LINEARS = {
    "a soup": (linear(0.25, 0.75), everywhere(0.75)),
    "a soup the other way round": (
        {"merge_method": "linear", **BASE, "models": [source("pre", weight=0.75), source("post", weight=0.25)]},
        everywhere(0.75),
    ),
    "weights are normalised": (linear(3, 1), everywhere(0.25)),
    "normalised because it is said": (linear(3, 1, parameters={"normalize": True}), everywhere(0.25)),
    "a mean that need not be normalised": (linear(0.75, 0.25, parameters={"normalize": False}), everywhere(0.25)),
    "negative weights are still a mean": (linear(-1, -3), everywhere(0.75)),
    "true and false are weights": (linear(False, True), everywhere(1)),
    "a gradient": (linear([1, 0], [0, 1]), [0, 0, 0.25, 0.5, 0.75, 1, 0, 0]),
    "a gradient of three": (linear([1, 0, 1], [0, 1, 0]), [0, 0, 0.5, 1, 0.5, 0, 0, 0]),
    "a gradient of one": (linear([0.5], [0.5]), everywhere(0.5)),
    "one side's gradient, normalised": (linear(1, [0, 1]), [0, 0, 0.2, 1 / 3, 0.75 / 1.75, 0.5, 0, 0]),
    "the config's weight is for both": (unweighted(parameters={"weight": 7}), everywhere(0.5)),
    "a slice of one model is that model": (
        {
            "merge_method": "linear",
            **BASE,
            "slices": [
                part(source("post", 0, 2, weight=1)),
                part(source("post", 2, 4, weight=1), source("pre", 2, 4, weight=1)),
                part(source("pre", 4, 5, weight=0.5)),
            ],
        },
        [0, 0, 0, 0.5, 0.5, 1, 1, 1],
    ),
    "a gradient runs over each slice, and one layer is its end": (
        {
            "merge_method": "linear",
            "slices": [
                part(source("post", 0, 1, weight=1), source("pre", 0, 1, weight=[0, 1])),
                part(source("post", 1, 3, weight=[3, 0]), source("pre", 1, 3, weight=[1, 1])),
                part(source("post", 3, 5, weight=1), source("pre", 3, 5, weight=[1, 0])),
            ],
        },
        [0, 0.5, 0.25, 1, 0.5, 0, 0.5, 0.5],
    ),
    "normalize by filter": (
        linear(1, 1, parameters={"normalize": [{"filter": "mlp", "value": True}, {"value": 1}]}),
        everywhere(0.5),
    ),
}  # fmt: skip
SLERPS = {
    "one t": (slerp(0.25), everywhere(0.25)),
    "the base is where it starts, however the models stand": (
        slerp(0.25, models=[source("pre"), source("post")]),
        everywhere(0.25),
    ),
    "the base need not stand among the models": (slerp(0.25, models=[source("pre")]), everywhere(0.25)),
    "five values for five layers": (slerp([0, 0.5, 0.3, 0.7, 1]), [0, 0, 0.5, 0.3, 0.7, 1, 0, 0]),
    "three values": (slerp([1, 0, 0.5]), [1, 1, 0.5, 0, 0.25, 0.5, 1, 1]),
    "nine values": (slerp([0, 9, 0.5, 9, 1, 9, 0.25, 9, 0.75]), [0, 0, 0.5, 1, 0.25, 0.75, 0, 0]),
    "gradients over slices of one and two layers": (
        slerp([0.25, 0.5, 1], slices=[both(0, 1), both(1, 3), both(3, 5)]),
        [0.25, 1, 0.25, 1, 0.25, 1, 0.25, 0.25],
    ),
    "filters, with a gradient in one": (
        slerp([{"filter": "self_attn", "value": 0.5}, {"filter": "mlp", "value": [0, 1]}, {"value": 0.125}]),
        [0.125, (0, 0.5), (0.25, 0.5), 0.5, (0.75, 0.5), (1, 0.5), 0.125, 0.125],
    ),
    "the first filter that fits": (
        slerp([{"filter": "up", "value": 1}, {"filter": "mlp", "value": 0}, {"filter": "*", "value": 0.5}]),
        [0.5, *[(1, 0.5)] * 5, 0.5, 0.5],
    ),
    "a filter is a part of the name": (
        slerp([{"filter": "layers.1", "value": 1}, {"filter": "lm_", "value": 0.75}, {"filter": None, "value": 0}]),
        [0, 0, 1, 0, 0, 0, 0, 0.75],
    ),
    "one filter, not in a list": (slerp({"value": 0.5}), everywhere(0.5)),
    "a filter that does not fit falls through to the config": (
        slerp(
            0.25,
            slices=[both(0, 2, parameters={"t": [{"filter": "mlp", "value": 1}]}), both(2, 5)],
        ),
        [0.25, (1, 0.25), (1, 0.25), 0.25, 0.25, 0.25, 0.25, 0.25],
    ),
    "a slice's t is for what stands around the layers too": (
        slerp(0, slices=[both(0, 1, parameters={"t": 0.5}), both(1, 4), both(4, 5, parameters={"t": [0.75, 1]})]),
        [0.5, 0.5, 0, 0, 0, 1, 0.75, 0.75],
    ),
}
ARITHMETICS = {
    "a weight": (arithmetic(source("pre", weight=0.25)), everywhere(0.25)),
    "lambda": (arithmetic(source("pre", weight=0.5), **{"lambda": 0.25}), everywhere(0.125)),
    "normalised, a single weight is 1": (arithmetic(source("pre", weight=0.25), normalize=True), everywhere(1)),
    "normalised and times lambda": (
        arithmetic(source("pre", weight=0.25), normalize=True, **{"lambda": 0.75}),
        everywhere(0.75),
    ),
    "normalised, a weight of 0 is 0": (
        arithmetic(source("pre", weight=[0, 1]), normalize=True),
        [0, 0, 1, 1, 1, 1, 0, 0],
    ),
    "lambda by filter": (
        arithmetic(source("pre", weight=1), **{"lambda": [{"filter": "mlp", "value": 0.5}]}),
        [1, *[(0.5, 1)] * 5, 1, 1],
    ),
    "the base's own weight says nothing": (
        {
            "merge_method": "task_arithmetic",
            **BASE,
            "models": [source("post", weight=9), source("pre", weight=0.5)],
        },
        everywhere(0.5),
    ),
    "a slice without the task is the base": (
        {
            "merge_method": "task_arithmetic",
            **BASE,
            "parameters": {"weight": 0.5},
            "slices": [part(source("post", 0, 2)), part(source("pre", 2, 4)), part(source("post", 4, 5))],
        },
        [0, 0, 0, 0.5, 0.5, 0, 0, 0],
    ),
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(*case, id=f"{method}: {words}")
        for method, cases in (
            ("passthrough", PASSTHROUGHS), ("linear", LINEARS), ("slerp", SLERPS), ("arithmetic", ARITHMETICS)
        )
        for words, case in cases.items()
    ],
)  # fmt: skip
def test_a_config_gives_every_tensor_its_share_of_the_other_side(config: dict[str, Any], expected: list[Any]) -> None:
    assert view(alphas_of(config)) == expected


@pytest.mark.parametrize("levels", range(8))
def test_the_source_decides_before_the_slice_and_the_slice_before_the_config(levels: int) -> None:
    """Which of the three say something are the bits of `levels`."""
    own, slices, whole = ({"weight": value} if levels >> bit & 1 else {} for bit, value in enumerate((3, 1, 0.5)))
    config = {
        "merge_method": "task_arithmetic",
        **BASE,
        "parameters": {"lambda": 0.25, **whole},
        "slices": [{"sources": [source("pre", 0, 5, **own)], "parameters": slices}],
    }
    if not levels:
        assert problems_of(config)[0] == f"c.yml: there is no weight of pre; {SEE}"
    else:
        expected = 0.75 if own else 0.25 if slices else 0.125
        assert view(alphas_of(config)) == everywhere(expected)


def test_a_filter_falls_through_source_and_slice_to_the_config() -> None:
    config = {
        "merge_method": "task_arithmetic",
        **BASE,
        "parameters": {"weight": 0.125},
        "slices": [
            {
                "sources": [source("pre", 0, 5, weight=[{"filter": "mlp", "value": [0, 1]}])],
                "parameters": {"weight": [{"filter": "self_attn", "value": 0.5}, {"filter": "mlp", "value": 9}]},
            }
        ],
    }
    layers = [(0, 0.5), (0.25, 0.5), 0.5, (0.75, 0.5), (1, 0.5)]
    assert view(alphas_of(config)) == [0.125, *layers, 0.125, 0.125]


def test_a_mean_a_rounding_away_from_0_or_1_is_that_end() -> None:
    assert view(alphas_of(linear(1, -1e-12))) == everywhere(0)
    assert view(alphas_of(linear(-1e-12, 1))) == everywhere(1)


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


def refusal(config: Mapping[str, Any]) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read_config(config, "c.yml")
    return [str(problem) for problem in caught.value.problems]


def problems_of(config: Mapping[str, Any]) -> list[str]:
    _, rules = read_config(config, "c.yml")
    return [str(problem) for problem in rules.alphas(NAMES, STACK.locate, STACK.count)[1]]


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


STACKED = "mergekit would stack the layers in that order, as another model"
DEPTH = "mergekit would write a model of another depth"
MIXED = "takes different layers of its sources; mergekit would mix layers of different depth; give them one layer_range"

UNFIT: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a gap": (
        passthrough(("post", 0, 2), ("pre", 3, 5)),
        [f"c.yml: $.slices[1]: starts at layer 3 where 2 is next; {STACKED}"],
    ),
    "a gap at the start": (
        passthrough(("post", 1, 2), ("pre", 2, 5)),
        [f"c.yml: $.slices[0]: starts at layer 1 where 0 is next; {STACKED}"],
    ),
    "layers twice": (
        passthrough(("post", 0, 3), ("pre", 2, 5)),
        [f"c.yml: $.slices[1]: starts at layer 2 where 3 is next; {STACKED}"],
    ),
    "slices in another order": (
        passthrough(("post", 3, 5), ("pre", 0, 3)),
        [f"c.yml: $.slices[0]: starts at layer 3 where 0 is next; {STACKED}"],
    ),
    "too few layers": (
        passthrough(("post", 0, 2), ("pre", 2, 4)),
        [f"c.yml: $.slices: makes 4 layers of a model that has 5; {DEPTH}"],
    ),
    "too many layers": (
        passthrough(("post", 0, 2), ("pre", 2, 6)),
        [f"c.yml: $.slices: makes 6 layers of a model that has 5; {DEPTH}"],
    ),
    "different layers in one slice, and a gap": (
        slerp(0.5, slices=[part(source("post", 0, 2), source("pre", 1, 3)), both(3, 5)]),
        [f"c.yml: $.slices[0]: {MIXED}", f"c.yml: $.slices[1]: starts at layer 3 where 2 is next; {STACKED}"],
    ),
    "two sources to pass through": (
        passthrough(("post", 0, 2), ("pre", 2, 5)) | {"slices": [both(0, 5)]},
        [f"c.yml: passthrough takes one source a slice; {SEE}"],
    ),
    "three sources of a slerp": (
        slerp(0.5, models=[source("post"), source("pre"), source("pre")]),
        [f"c.yml: slerp goes from the base model to one other; {SEE}"],
    ),
    "a slice of the base alone in a slerp": (
        slerp(0.5, slices=[part(source("post", 0, 2)), both(2, 5)]),
        [f"c.yml: slerp goes from the base model to one other; {SEE}"],
    ),
    "a base without weight": (
        {"merge_method": "linear", **BASE, "models": [source("pre", weight=1)]},
        [f"c.yml: there is no weight of post; {SEE}"],
    ),
    "a gradient of nothing": (
        slerp([]),
        [f"c.yml: [] is not a number, a gradient or a list of filters; {SEE}"],
    ),
    "a weight that is a text": (
        slerp("half"),
        [f"c.yml: 'half' is not a number; {SEE}"],
    ),
    "a weight that is nothing": (
        slerp(None),
        [f"c.yml: None is not a number, a gradient or a list of filters; {SEE}"],
    ),
    "filters that are none": (
        slerp([{"filter": "mlp", "valu": 1}, 0.5]),
        [f"c.yml: {{'filter': 'mlp', 'valu': 1}} is not {{filter: …, value: …}}; {SEE}"],
    ),
    "a filter without a value": (
        slerp({"filter": "mlp"}),
        [f"c.yml: {{'filter': 'mlp'}} is not {{filter: …, value: …}}; {SEE}"],
    ),
    "a number among filters": (
        slerp([{"filter": "head", "value": 1}, 0.5]),
        [f"c.yml: 0.5 is not {{filter: …, value: …}}; {SEE}"],
    ),
    "a filter's value that is none": (
        slerp([{"filter": "lm_head", "value": "x"}, {"value": 1}]),
        [f"c.yml: 'x' is not a number; {SEE}"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_the_layers_or_the_method_is_a_problem(case: str) -> None:
    config, lines = UNFIT[case]
    assert problems_of(config) == lines


def norm(value: object) -> list[dict[str, Any]]:
    """A setting that says `value` of one tensor and 0.5 of the others, so that the messages are few."""
    return [{"filter": "model.norm", "value": value}, {"value": 0.5}]


ONE_TENSOR: dict[str, tuple[dict[str, Any], str]] = {
    "weights that sum to 0": (
        linear(norm(1), norm(-1)),
        f"the weights sum to 0; {SEE}",
    ),
    "weights of 0": (
        linear(norm(0), norm(0)),
        f"the weights sum to 0; {SEE}",
    ),
    "weights that are no mean": (
        linear(norm(0.75), norm(0.5), parameters={"normalize": False}),
        f"the weights sum to 1.25 and normalize is false, which is no mean; {SEE}",
    ),
    "past the base": (
        linear(norm(3), norm(-1)),
        f"-0.5 of pre is past one of the two models; {SEE}",
    ),
    "past the other": (
        linear(norm(-1), norm(3)),
        f"1.5 of pre is past one of the two models; {SEE}",
    ),
    "a slerp past the other": (
        slerp(norm(1.25)),
        f"1.25 of pre is past one of the two models; {SEE}",
    ),
    "an arithmetic past the other": (
        arithmetic(source("pre", weight=norm(0.75)), **{"lambda": 2}),
        f"1.5 of pre is past one of the two models; {SEE}",
    ),
    "no number": (
        slerp(norm(float("nan"))),
        f"nan of pre is past one of the two models; {SEE}",
    ),
    "infinity": (
        linear(0.5, norm(float("inf"))),
        f"nan of pre is past one of the two models; {SEE}",
    ),
    "no weight of a source": (
        linear(0.5, [{"filter": word, "value": 0.5} for word in ("layers", "embed", "lm_head")]),
        f"there is no weight of pre; {SEE}",
    ),
    "no t": (
        slerp([{"filter": word, "value": 0.5} for word in ("layers", "embed", "lm_head")]),
        f"there is no t; {SEE}",
    ),
}


@pytest.mark.parametrize("case", ONE_TENSOR)
def test_a_weight_that_is_no_share_of_two_is_a_problem(case: str) -> None:
    config, line = ONE_TENSOR[case]
    assert problems_of(config) == [f"c.yml: {line}"]


def test_a_t_of_a_source_says_nothing_as_in_mergekit() -> None:
    config = slerp(0.25, models=[source("post", t=1), source("pre", t=1)])
    assert view(alphas_of(config)) == everywhere(0.25)


def test_what_is_wrong_with_every_tensor_is_not_said_once_for_every_tensor() -> None:
    assert len(problems_of(unweighted())) < len(NAMES)


# no traceback


NUMBERS = (
    st.integers(-(2**63), 2**64 - 1) | st.floats() | st.sampled_from([0, 1, 0.5, 0.25, True, -1, 1e308, float("inf")])
)
SCALARS = (
    NUMBERS | st.none() | st.sampled_from(["", "x", "*", "mlp", "post", "pre", "pre@v1", "a+b", "1e-3", "\0", "~"])
)
WORDS = st.sampled_from(["filter", "value", "path", "revision", "model", "x", 1, None])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
SETTINGS = st.sampled_from([0, 0.5, 1, [0, 1]]) | VALUES
PARAMETERS = st.dictionaries(st.sampled_from(["weight", "t", "normalize", "lambda"]), SETTINGS, max_size=3) | VALUES
MODELS = st.sampled_from(["post", "pre", "post", "pre", {"path": "post"}, {"path": "post", "revision": "x"}]) | VALUES
RANGES = st.sampled_from([[0, 5], [0, 2], [2, 5], [0, 0], [5, 5]]) | VALUES


def loosely(keys: Mapping[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """A map with some of the keys, or rarely one more, or another value altogether."""
    sound = st.fixed_dictionaries({}, optional=dict(keys))
    return sound | sound | sound | st.tuples(sound, VALUES).map(lambda pair: {**pair[0], "other": pair[1]}) | VALUES


SOURCES = st.fixed_dictionaries({"model": MODELS}, optional={"layer_range": RANGES, "parameters": PARAMETERS})
SOURCES |= loosely({"model": MODELS, "parameters": PARAMETERS})
SLICES = loosely({"sources": st.lists(SOURCES, max_size=3) | VALUES, "base_model": MODELS, "parameters": PARAMETERS})
CONFIGS = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(["passthrough", "linear", "task_arithmetic", "slerp", "ties"]) | VALUES},
    optional={
        "base_model": MODELS,
        "models": st.lists(SOURCES, max_size=3) | VALUES,
        "slices": st.lists(SLICES, max_size=3) | VALUES,
        "parameters": PARAMETERS,
        "dtype": st.sampled_from(["bfloat16", "int8"]) | VALUES,
        "tokenizer_source": st.sampled_from(["union", "base", "pre"]) | VALUES,
        "modules": VALUES,
        "other": VALUES,
    },
)


def answered(config: dict[str, Any]) -> bool:
    """Whether a config is sound; anything but alphas, problems and RecipeErrors is a failure."""
    try:
        _, rules = read_config(config, "c.yml")
    except RecipeError:
        return False
    alphas, problems = rules.alphas(NAMES, STACK.locate, STACK.count)
    assert all(0 <= alpha <= 1 for alpha in alphas.values())
    assert problems or list(alphas) == NAMES
    return not problems


@given(CONFIGS)
@settings(deadline=None, max_examples=200)
def test_no_config_ends_in_anything_but_alphas_and_problems(config: dict[str, Any]) -> None:
    answered(config)


@given(
    st.lists(SOURCES, min_size=1, max_size=3),
    PARAMETERS,
    st.sampled_from(["passthrough", "linear", "task_arithmetic", "slerp"]),
)
@settings(deadline=None, max_examples=200)
def test_no_parameters_end_in_anything_but_alphas_and_problems(
    sources: list[Any], parameters: object, method: str
) -> None:
    answered({"merge_method": method, **BASE, "models": [source("pre"), *sources], "parameters": parameters})
