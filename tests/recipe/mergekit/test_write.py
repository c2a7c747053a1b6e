"""Alphas as mergekit configs: neither way changes an alpha."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import yaml
from hypothesis import event, given, settings
from hypothesis import strategies as st

from slrmerge.checkpoint.layers import LayerStack
from slrmerge.errors import RecipeError
from slrmerge.recipe.alphas import TensorAlphas, resolve_rules
from slrmerge.recipe.mergekit.recipe import MergekitRecipe
from slrmerge.recipe.mergekit.weights import resolve_config
from slrmerge.recipe.mergekit.write import write_config
from slrmerge.recipe.rules import Rules
from tests.checkpoints import llama_tensors
from tests.problems import refused

STACK = LayerStack("model.layers", 6)
NAMES = list(llama_tensors(0))
SIDES = {"pretrained": "pre", "posttrained": "post"}
BASE = {"base_model": "post"}


def source(model: str, first: int, stop: int, **parameters: object) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, stop], **({"parameters": parameters} if parameters else {})}


def one(model: str, first: int, stop: int) -> dict[str, Any]:
    """A slice of one model."""
    return {"sources": [source(model, first, stop)]}


def mean(first: int, stop: int, post: object, pre: object) -> dict[str, Any]:
    """A slice of both, with their weights."""
    return {"sources": [source("post", first, stop, weight=post), source("pre", first, stop, weight=pre)]}


def slerp(first: int, stop: int, t: object) -> dict[str, Any]:
    """A slice of a slerp."""
    return {"sources": [source("post", first, stop), source("pre", first, stop)], "parameters": {"t": t}}


def alphas_of(blend: str = "linear", **rules: Any) -> TensorAlphas:
    alphas, problems = resolve_rules(Rules(**rules), NAMES, STACK, blend=blend)
    assert problems == []
    return alphas


def read(config: Mapping[str, Any], names: list[str] = NAMES, stack: LayerStack = STACK) -> TensorAlphas:
    """The alphas of a config that went through YAML."""
    recipe = MergekitRecipe.from_dict(yaml.safe_load(yaml.safe_dump(dict(config))))
    alphas, problems = resolve_config(recipe.config, "pre", names, stack, blend=recipe.blend, where="recipe")
    assert problems == []
    return alphas


def exported(blend: str = "linear", **rules: Any) -> dict[str, Any]:
    return write_config(alphas_of(blend, **rules), STACK, **SIDES)


WRITTEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a restoration": (
        {"restore": [2, 3]},
        {"merge_method": "passthrough", **BASE, "slices": [one("post", 0, 2), one("pre", 2, 4), one("post", 4, 6)]},
    ),
    "a restoration of the first layers leaves the embeddings": (
        {"restore": [0, 1]},
        {"merge_method": "passthrough", **BASE, "slices": [one("post", 0, 0), one("pre", 0, 2), one("post", 2, 6)]},
    ),
    "a restoration of the last layers leaves norm and head": (
        {"restore": [4, 5]},
        {"merge_method": "passthrough", **BASE, "slices": [one("post", 0, 4), one("pre", 4, 6), one("post", 6, 6)]},
    ),
    "embeddings alone": (
        {"tensors": [{"match": "model.embed_tokens.*", "alpha": 1}]},
        {"merge_method": "passthrough", **BASE, "slices": [one("pre", 0, 0), one("post", 0, 6)]},
    ),
    "everything": (
        {"alpha": 1},
        {"merge_method": "passthrough", **BASE, "slices": [one("pre", 0, 6)]},
    ),
    "a soup": (
        {"alpha": 0.75},
        {
            "merge_method": "linear",
            **BASE,
            "models": [
                {"model": "post", "parameters": {"weight": 0.25}},
                {"model": "pre", "parameters": {"weight": 0.75}},
            ],
        },
    ),
    "a slerp": (
        {"alpha": 0.75, "blend": "slerp"},
        {
            "merge_method": "slerp",
            **BASE,
            "models": [{"model": "post"}, {"model": "pre"}],
            "parameters": {"t": 0.75},
        },
    ),
    "a slerp of 0 and 1": (
        {"restore": [0, 5], "blend": "slerp"},
        {"merge_method": "passthrough", **BASE, "slices": [one("post", 0, 0), one("pre", 0, 6), one("post", 6, 6)]},
    ),
    "a gradient": (
        {"layers": [{"range": [0, 4], "alpha": [0, 1]}]},
        {
            "merge_method": "linear",
            **BASE,
            "slices": [
                *(mean(k, k + 1, 1 - alpha, alpha) for k, alpha in enumerate((0.0, 0.25, 0.5, 0.75, 1.0))),
                mean(5, 6, 1.0, 0.0),
            ],
        },
    ),
    "a mean of a module": (
        {"layers": [{"range": [0, 5], "alpha": 0.25, "modules": ["self_attn"]}]},
        {
            "merge_method": "linear",
            **BASE,
            "slices": [
                mean(0, 0, 1.0, 0.0),
                mean(
                    0,
                    6,
                    [{"filter": ".self_attn.", "value": 0.75}, {"value": 1.0}],
                    [{"filter": ".self_attn.", "value": 0.25}, {"value": 0.0}],
                ),
                mean(6, 6, 1.0, 0.0),
            ],
        },
    ),
    "a slerp of a module, outside as inside": (
        {"alpha": 0.5, "layers": [{"range": [0, 5], "alpha": 0.25, "modules": ["self_attn"]}], "blend": "slerp"},
        {
            "merge_method": "slerp",
            **BASE,
            "slices": [
                slerp(0, 0, 0.5),
                slerp(0, 6, [{"filter": ".self_attn.", "value": 0.25}, {"value": 0.5}]),
                slerp(6, 6, 0.5),
            ],
        },
    ),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_alphas_are_written_with_the_fewest_slices(case: str) -> None:
    rules, config = WRITTEN[case]
    assert exported(**rules) == config


@pytest.mark.parametrize("alpha", [1e-9, 0.1, 0.15, 0.7, 0.85, 0.999])
def test_an_alpha_of_a_few_digits_is_read_back_exactly(alpha: float) -> None:
    assert dict(read(exported(alpha=alpha))) == dict.fromkeys(NAMES, alpha)


def test_a_merge_that_mergekit_cannot_express_is_refused() -> None:
    inner = {"a.b.weight": 0.5, "x.a.b.weight": 0.25, "y.a.b.weight": 0.25}
    alphas = TensorAlphas({f"model.layers.0.{name}": alpha for name, alpha in inner.items()})
    with refused(RecipeError, "not-in-mergekit") as caught:
        write_config(alphas, LayerStack("model.layers", 1), **SIDES)
    assert "2 tensors would differ (model.layers.0.x.a.b.weight, " in str(caught.value)


@pytest.mark.parametrize(
    "tensors",
    [
        [{"match": "lm_head.*", "alpha": 0.5}],
        [{"match": "lm_head.*", "alpha": 0.25}, {"match": "*.up_proj.*", "alpha": 0.75}],
        [{"match": "*.3.mlp.up_proj.*", "alpha": 1}],
    ],
)
def test_tensors_are_selected_by_parts_of_their_names(tensors: list[dict[str, Any]]) -> None:
    rules: dict[str, Any] = {"alpha": 0.5, "tensors": tensors}
    assert read(exported(**rules)) == alphas_of(**rules)


def test_a_merge_that_changes_nothing_is_refused() -> None:
    with refused(RecipeError, "nothing-to-merge"):
        exported(alpha=0)


@pytest.mark.parametrize("modules", [["self_attn"], ["mlp", "input_layernorm"], ["q_proj"]])
def test_restored_modules_are_selected_by_parts_of_their_names(modules: list[str]) -> None:
    rules: dict[str, Any] = {"layers": [{"range": [0, 5], "alpha": 1, "modules": modules}]}
    assert read(exported(**rules)) == alphas_of(**rules)


NESTED = [
    *(
        f"model.layers.{k}.{inner}"
        for k in range(2)
        for inner in ("attention.output.dense.weight", "attention.q.weight", "output.dense.weight")
    ),
    "lm_head.weight",
]


@pytest.mark.parametrize(("attention", "output"), [(0, 0.5), (0.25, 0.5), (0.5, 0.25), (1, 0)])
def test_a_module_is_not_mistaken_for_one_of_the_same_name_inside_another(attention: float, output: float) -> None:
    """Filters are parts of names: `.output.` is part of `.attention.output.`, and the first filter that fits wins."""
    chosen = [{"filter": "attention", "value": attention}, {"filter": "output", "value": output}, {"value": 0.75}]
    stack = LayerStack("model.layers", 2)
    alphas = read({"merge_method": "slerp", **BASE, "slices": [slerp(0, 2, chosen)]}, NESTED, stack)
    assert dict(alphas) == {
        name: attention if "attention" in name else output if "output" in name else 0.75 for name in NESTED
    }
    try:
        config = write_config(alphas, stack, **SIDES)
    except RecipeError as error:
        assert [problem.code for problem in error.problems] == ["not-in-mergekit"]  # noqa: PT017 (either is right)
    else:
        assert read(config, NESTED, stack) == alphas


# round trips


SHARES = st.sampled_from([0, 0.25, 0.5, 0.85, 1, 1 / 3]) | st.floats(0, 1)
FILTERS = st.sampled_from(
    ["mlp", "self_attn", "q_proj", "down_proj", "layernorm", "norm", "embed", "lm_head", "layers.3.", "e", "*", "zzz"]
)


def setting(shares: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A number, a gradient, or filters that end in one of them."""
    plain = shares | st.lists(shares, min_size=1, max_size=4)
    filters = st.lists(st.fixed_dictionaries({"filter": FILTERS, "value": plain}), max_size=3)
    return plain | st.builds(lambda some, last: [*some, {"value": last}], filters, plain)


WEIGHTS = st.sampled_from([1, 2, 0.15, 0.85, 7]) | st.floats(0.01, 10)
CUTS = st.lists(st.integers(0, 6), max_size=3).map(lambda cuts: [0, *sorted(cuts), 6])


@st.composite
def valid_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Configs of each method whose alphas are all within the two models."""
    method = draw(st.sampled_from(["passthrough", "linear", "task_arithmetic", "slerp"]))
    cuts = draw(CUTS)
    slices: list[dict[str, Any]] = []
    for first, stop in pairwise(cuts):
        if method == "passthrough":
            slices.append(one(draw(st.sampled_from(["pre", "post"])), first, stop))
        elif method == "linear":
            slices.append(mean(first, stop, draw(setting(WEIGHTS)), draw(setting(WEIGHTS | st.just(0)))))
        elif method == "slerp":
            slices.append(slerp(first, stop, draw(setting(SHARES))))
        else:
            slices.append({"sources": [source("pre", first, stop, weight=draw(setting(SHARES)))]})
    if method == "passthrough":
        slices.append(one("pre", 6, 6))  # so that there are two
    more = {"parameters": {"lambda": draw(setting(SHARES))}} if method == "task_arithmetic" else {}
    return {"merge_method": method, **BASE, "slices": slices, **more}


@given(config=valid_configs())
@settings(deadline=None, max_examples=120)
def test_a_config_survives_as_its_alphas(config: dict[str, Any]) -> None:
    """Config → alphas → config → alphas, where mergekit can express them in slices."""
    alphas = read(config)
    try:
        again = write_config(alphas, STACK, **SIDES)
    except RecipeError:
        event("refused")
        return
    event("written")
    found = read(again)
    assert dict(found) == pytest.approx(dict(alphas), rel=0, abs=1e-15)
    assert found.blend in (alphas.blend, "linear")


SPANS = st.tuples(st.integers(0, 5), st.integers(0, 5)).map(sorted)
ALPHAS = st.sampled_from([0, 0.25, 0.85, 1]) | st.floats(0, 1)
MODULES = st.lists(
    st.sampled_from(["self_attn", "mlp", "input_layernorm", "q_proj", "*_proj", "*"]), min_size=1, max_size=2
)
LAYER_RULES = st.builds(
    lambda span, alpha, slope, modules: {
        "range": span,
        "alpha": [alpha, slope] if slope is not None and span[0] < span[1] else alpha,
        **({"modules": modules} if modules else {}),
    },
    SPANS,
    ALPHAS,
    st.none() | ALPHAS,
    st.none() | MODULES,
)
TENSOR_RULES = st.fixed_dictionaries(
    {
        "match": st.sampled_from(["model.embed_tokens.*", "lm_head.*", "model.norm.*", "*norm*", "*.mlp.*", "*"]),
        "alpha": ALPHAS,
    }
)
RULES = st.fixed_dictionaries(
    {"alpha": ALPHAS},
    optional={
        "restore": st.lists(SPANS, min_size=1, max_size=2),
        "layers": st.lists(LAYER_RULES, min_size=1, max_size=2),
        "tensors": st.lists(TENSOR_RULES, min_size=1, max_size=2),
        "blend": st.sampled_from(["linear", "slerp"]),
    },
)


@given(RULES)
@settings(deadline=None, max_examples=150)
def test_a_recipe_is_either_refused_or_written_as_a_config_with_the_same_alphas(rules: dict[str, Any]) -> None:
    alphas = alphas_of(**rules)
    try:
        config = write_config(alphas, STACK, **SIDES)
    except RecipeError:
        event("refused")
        return
    event("written")
    recipe = MergekitRecipe.from_dict(config)
    between = any(0 < alpha < 1 for alpha in alphas.values())
    assert {side: getattr(recipe, side) for side in SIDES} == SIDES
    assert recipe.blend == (alphas.blend if between else "linear")
    assert dict(read(config)) == pytest.approx(dict(alphas), rel=0, abs=1e-15)
