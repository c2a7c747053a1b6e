"""Any config gives alphas, problems or a RecipeError: nothing else."""

from collections.abc import Mapping
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from slrmerge.errors import RecipeError
from slrmerge.recipe.mergekit.recipe import MergekitRecipe
from tests.recipe.mergekit import BASE, NAMES, resolve, source

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
    """A mapping with some of the keys, or rarely one more, or another value altogether."""
    valid = st.fixed_dictionaries({}, optional=dict(keys))
    return valid | valid | valid | st.tuples(valid, VALUES).map(lambda pair: {**pair[0], "other": pair[1]}) | VALUES


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
        1: VALUES,
        "other": VALUES,
    },
)


def resolves(config: dict[Any, Any]) -> bool:
    """Whether a config gives alphas; anything but alphas, problems and RecipeErrors is a failure."""
    try:
        recipe = MergekitRecipe.from_dict(config)
    except RecipeError:
        return False
    assert "\n" not in repr(recipe)
    alphas, problems = resolve(config)
    assert all(0 <= alpha <= 1 for alpha in alphas.values())
    assert problems or list(alphas) == NAMES
    if not problems:
        assert resolve(recipe.to_dict()) == (alphas, [])
    return not problems


@given(CONFIGS)
@settings(deadline=None, max_examples=200)
def test_any_config_gives_alphas_or_problems(config: dict[str, Any]) -> None:
    resolves(config)


@given(
    st.lists(SOURCES, min_size=1, max_size=3),
    PARAMETERS,
    st.sampled_from(["passthrough", "linear", "task_arithmetic", "slerp"]),
)
@settings(deadline=None, max_examples=200)
def test_any_parameters_give_alphas_or_problems(sources: list[Any], parameters: object, method: str) -> None:
    resolves({"merge_method": method, **BASE, "models": [source("pre"), *sources], "parameters": parameters})
