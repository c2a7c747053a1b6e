"""mergekit configs as explicit recipes, and recipes as mergekit configs: neither way changes an alpha."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import event, given, settings
from hypothesis import strategies as st

from slrmerge.checkpoint import LayerStack
from slrmerge.errors import RecipeError
from slrmerge.mergekit.read import read_config
from slrmerge.mergekit.write import write_config
from slrmerge.plan import route, spelled_out
from slrmerge.recipe import Recipe, load_recipe, parse_recipe
from tests.checkpoints import llama_tensors

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


def way(first: int, stop: int, t: object) -> dict[str, Any]:
    """A slice on slerp's way."""
    return {"sources": [source("post", first, stop), source("pre", first, stop)], "parameters": {"t": t}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


def config_recipe(folder: Path, config: Mapping[str, Any]) -> Recipe:
    path = folder / "mergekit_config.yml"
    path.write_text(yaml.safe_dump(dict(config)))
    return load_recipe(path)


def rules_of(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in recipe.to_dict().items() if key not in SIDES}


# a config, spelled out


SPELLED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a restoration": (
        {"merge_method": "passthrough", **BASE, "slices": [one("post", 0, 2), one("pre", 2, 4), one("post", 4, 6)]},
        {"restore": [[2, 3]]},
    ),
    "two of them": (
        {
            "merge_method": "passthrough",
            **BASE,
            "slices": [one("post", 0, 1), one("pre", 1, 2), one("post", 2, 4), one("pre", 4, 5), one("post", 5, 6)],
        },
        {"restore": [[1, 1], [4, 4]]},
    ),
    "a restoration that takes the embeddings along": (
        {"merge_method": "passthrough", **BASE, "slices": [one("pre", 0, 2), one("post", 2, 6)]},
        {"restore": [[0, 1]], "tensors": [{"match": "model.embed_tokens.weight", "alpha": 1.0}]},
    ),
    "a restoration that takes norm and head along": (
        {"merge_method": "passthrough", **BASE, "slices": [one("post", 0, 4), one("pre", 4, 6)]},
        {
            "restore": [[4, 5]],
            "tensors": [{"match": "model.norm.weight", "alpha": 1.0}, {"match": "lm_head.weight", "alpha": 1.0}],
        },
    ),
    "everything": (
        {"merge_method": "passthrough", **BASE, "models": [{"model": "pre"}]},
        {"alpha": 1.0},
    ),
    "nothing": (
        {
            "merge_method": "linear",
            "models": [{"model": name, "parameters": {"weight": name == "post"}} for name in ("post", "pre")],
        },
        {"alpha": 0.0},
    ),
    "only the embeddings": (
        {"merge_method": "passthrough", **BASE, "slices": [one("pre", 0, 0), one("post", 0, 6)]},
        {"tensors": [{"match": "model.embed_tokens.weight", "alpha": 1.0}]},
    ),
    "a slerp by module": (
        {
            "merge_method": "slerp",
            **BASE,
            "slices": [way(0, 4, [{"filter": "mlp", "value": 0.5}, {"value": 0}]), way(4, 6, 0.25), way(6, 6, 0)],
        },
        {
            "layers": [
                {"range": [0, 3], "alpha": 0.5, "modules": ["mlp"]},
                {"range": [4, 5], "alpha": 0.25},
            ],
            "blend": "slerp",
        },
    ),
    "a gradient": (
        {"merge_method": "slerp", **BASE, "slices": [way(0, 1, 0), way(1, 6, [0, 1])]},
        {
            "layers": [
                {"range": [layer, layer], "alpha": alpha} for layer, alpha in ((2, 0.25), (3, 0.5), (4, 0.75), (5, 1.0))
            ],
            "blend": "slerp",
        },
    ),
}


@pytest.mark.parametrize("case", SPELLED)
def test_a_config_is_spelled_out_with_the_fewest_rules(folder: Path, case: str) -> None:
    config, rules = SPELLED[case]
    recipe = config_recipe(folder, config)
    alphas, problems = route(recipe, NAMES, STACK)
    assert problems == []
    assert rules_of(spelled_out(recipe, alphas, STACK)) == rules


def test_a_recipe_is_its_own_spelling() -> None:
    recipe = parse_recipe({**SIDES, "layers": [{"range": [0, 5], "alpha": [0, 1]}]})
    assert spelled_out(recipe, route(recipe, NAMES, STACK)[0], STACK) is recipe


def test_without_a_known_stack_a_config_is_refused(folder: Path) -> None:
    recipe = config_recipe(folder, SPELLED["a restoration"][0])
    alphas, problems = route(recipe, NAMES, None)
    assert alphas == {}
    (problem,) = problems
    assert str(problem) == (
        f"{folder}/mergekit_config.yml: no stack of layers in these weights is as long as the config says, "
        "or more than one is; write a recipe that names the tensors"
    )


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
def sound_configs(draw: st.DrawFn) -> dict[str, Any]:
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
            slices.append(way(first, stop, draw(setting(SHARES))))
        else:
            slices.append({"sources": [source("pre", first, stop, weight=draw(setting(SHARES)))]})
    if method == "passthrough":
        slices.append(one("pre", 6, 6))  # so that there are two
    more = {"parameters": {"lambda": draw(setting(SHARES))}} if method == "task_arithmetic" else {}
    return {"merge_method": method, **BASE, "slices": slices, **more}


@given(config=sound_configs())
@settings(deadline=None, max_examples=120)
def test_a_config_and_its_spelling_give_every_tensor_the_same_alpha(folder: Path, config: dict[str, Any]) -> None:
    recipe = config_recipe(folder, config)
    alphas, problems = route(recipe, NAMES, STACK)
    assert problems == []
    explicit = spelled_out(recipe, alphas, STACK)
    assert explicit.mergekit is None
    assert route(explicit, NAMES, STACK) == (alphas, [])
    written = parse_recipe(yaml.safe_load(yaml.safe_dump(explicit.to_dict())))
    assert written.to_dict() == explicit.to_dict()
    assert spelled_out(explicit, alphas, STACK).to_dict() == explicit.to_dict()


NESTED = [
    *(
        f"model.layers.{k}.{inner}"
        for k in range(2)
        for inner in ("attention.output.dense.weight", "attention.q.weight", "output.dense.weight")
    ),
    "lm_head.weight",
]


@pytest.mark.parametrize(("attention", "output"), [(0, 0.5), (0.25, 0.5), (0.5, 0.25), (1, 0)])
def test_a_module_is_not_mistaken_for_one_of_the_same_name_inside_another(
    folder: Path, attention: float, output: float
) -> None:
    settings = [{"filter": "attention", "value": attention}, {"filter": "output", "value": output}, {"value": 0.75}]
    stack = LayerStack("model.layers", 2)
    recipe = config_recipe(folder, {"merge_method": "slerp", **BASE, "slices": [way(0, 2, settings)]})
    alphas, _ = route(recipe, NESTED, stack)
    assert alphas == {
        name: attention if "attention" in name else output if "output" in name else 0.75 for name in NESTED
    }
    assert route(spelled_out(recipe, alphas, stack), NESTED, stack) == (alphas, [])


# a recipe, as a config


def exported(blend: str = "linear", **rules: Any) -> dict[str, Any]:
    alphas, problems = route(parse_recipe({**SIDES, **rules}), NAMES, STACK)
    assert problems == []
    return write_config(alphas, STACK.locate, STACK.count, **SIDES, blend=blend)


def refused(**rules: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        exported(**rules)
    return str(caught.value)


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
                way(0, 0, 0.5),
                way(0, 6, [{"filter": ".self_attn.", "value": 0.25}, {"value": 0.5}]),
                way(6, 6, 0.5),
            ],
        },
    ),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_a_recipe_is_written_as_a_config_of_slices(case: str) -> None:
    rules, config = WRITTEN[case]
    assert exported(**rules) == config


@pytest.mark.parametrize("alpha", [1e-9, 0.1, 0.15, 0.7, 0.85, 0.999])
def test_an_alpha_of_a_few_digits_is_read_back_to_the_last_bit(alpha: float) -> None:
    _, rules = read_config(exported(alpha=alpha), "c.yml")
    assert rules.alphas(NAMES, STACK.locate, 6) == (dict.fromkeys(NAMES, alpha), [])


def test_what_mergekit_has_no_words_for_is_refused() -> None:
    inner = {"a.b.weight": 0.5, "x.a.b.weight": 0.25, "y.a.b.weight": 0.25}
    names = {f"model.layers.0.{name}": alpha for name, alpha in inner.items()}
    stack = LayerStack("model.layers", 1)
    with pytest.raises(RecipeError) as caught:
        write_config(names, stack.locate, 1, pretrained="pre", posttrained="post", blend="linear")
    assert str(caught.value) == (
        "the recipe: mergekit has no words for this: 2 tensors would come out otherwise "
        "(model.layers.0.x.a.b.weight, model.layers.0.y.a.b.weight); "
        "it knows layers, and names by what they contain"
    )


@pytest.mark.parametrize(
    "tensors",
    [
        [{"match": "lm_head.*", "alpha": 0.5}],
        [{"match": "lm_head.*", "alpha": 0.25}, {"match": "*.up_proj.*", "alpha": 0.75}],
        [{"match": "*.3.mlp.up_proj.*", "alpha": 1}],
    ],
)
def test_tensors_are_named_by_what_their_names_contain(tensors: list[dict[str, Any]]) -> None:
    _, rules = read_config(exported(alpha=0.5, tensors=tensors), "c.yml")
    alphas, problems = rules.alphas(NAMES, STACK.locate, 6)
    expected, _ = route(parse_recipe(SIDES | {"alpha": 0.5, "tensors": tensors}), NAMES, STACK)
    assert (alphas, problems) == (expected, [])


def test_a_merge_that_leaves_all_as_it_was_is_no_merge_of_two() -> None:
    assert refused(alpha=0) == "the config: $: names only one model; a merge here is of two"


@pytest.mark.parametrize("modules", [["self_attn"], ["mlp", "input_layernorm"], ["q_proj"]])
def test_modules_can_be_restored_by_a_config(modules: list[str]) -> None:
    """mergekit's filters are parts of names: `.self_attn.` and `.q_proj.` are both among them."""
    alphas, _ = route(
        parse_recipe({**SIDES, "layers": [{"range": [0, 5], "alpha": 1, "modules": modules}]}), NAMES, STACK
    )
    config = write_config(alphas, STACK.locate, STACK.count, **SIDES, blend="linear")
    assert read_config(config, "c.yml")[1].alphas(NAMES, STACK.locate, 6) == (alphas, [])


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
def test_a_recipe_is_either_refused_or_written_as_a_config_that_gives_the_same_alphas(rules: dict[str, Any]) -> None:
    alphas, _ = route(parse_recipe({**SIDES, **rules}), NAMES, STACK)
    try:
        config = write_config(alphas, STACK.locate, STACK.count, **SIDES, blend=rules.get("blend", "linear"))
    except RecipeError:
        event("refused")
        return
    event("written")
    recipe, again = read_config(yaml.safe_load(yaml.safe_dump(config)), "c.yml")
    between = any(0 < alpha < 1 for alpha in alphas.values())
    assert recipe == {**SIDES, **({"blend": "slerp"} if between and rules.get("blend") == "slerp" else {})}
    found, problems = again.alphas(NAMES, STACK.locate, STACK.count)
    assert problems == []
    assert found == pytest.approx(alphas, rel=0, abs=1e-15)
