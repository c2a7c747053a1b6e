"""Which alpha every tensor gets, and what a recipe says that no tensor answers to."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slrmerge.checkpoint import LayerStack
from slrmerge.plan.routes import route
from slrmerge.recipe import parse_recipe

STACK = LayerStack("model.layers", 32)
INNER = [
    "input_layernorm.weight",
    "mlp.down_proj.weight",
    "mlp.up_proj.weight",
    "self_attn.k_proj.bias",
    "self_attn.k_proj.weight",
    "self_attn.q_proj.weight",
]
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{k}.{inner}" for k in range(32) for inner in INNER),
    "model.norm.weight",
    "lm_head.weight",
]
NO_STACK = (
    "no stack of layers in these weights is as long as the config says, or more than one is; "
    "name the tensors themselves under `tensors`; `slrmerge inspect` lists them"
)


def alphas_of(**content: Any) -> dict[str, float]:
    alphas, problems = route(parse_recipe({"pretrained": "a", "posttrained": "b", **content}), NAMES, STACK)
    assert problems == []
    assert list(alphas) == NAMES
    return alphas


def problems_of(names: list[str] = NAMES, stack: LayerStack | None = STACK, **content: Any) -> list[str]:
    _, problems = route(parse_recipe({"pretrained": "a", "posttrained": "b", **content}), names, stack)
    return [str(problem) for problem in problems]


def test_the_last_of_alpha_restore_layers_tensors_decides() -> None:
    alphas = alphas_of(
        alpha=0.1,
        restore=[4, 6],
        layers=[{"range": [5, 6], "alpha": 0.2}],
        tensors=[{"match": "model.layers.6.self_attn.*", "alpha": 0.3}, {"match": "lm_head.*", "alpha": 0}],
    )
    assert alphas["model.embed_tokens.weight"] == 0.1
    assert alphas["model.layers.3.mlp.up_proj.weight"] == 0.1
    assert alphas["model.layers.4.mlp.up_proj.weight"] == 1
    assert alphas["model.layers.5.mlp.up_proj.weight"] == 0.2
    assert alphas["model.layers.6.mlp.up_proj.weight"] == 0.2
    assert alphas["model.layers.6.self_attn.k_proj.bias"] == 0.3
    assert alphas["lm_head.weight"] == 0


def test_later_entries_win_over_earlier_ones() -> None:
    alphas = alphas_of(
        layers=[
            {"range": [0, 9], "alpha": 0.1},
            {"range": [5, 9], "alpha": 0.2},
            {"range": [0, 7], "alpha": 0.3, "modules": ["mlp"]},
        ],
        tensors=[{"match": "*.k_proj.*", "alpha": 0.4}, {"match": "*.bias", "alpha": 0.5}],
    )
    assert alphas["model.layers.4.self_attn.q_proj.weight"] == 0.1
    assert alphas["model.layers.5.self_attn.q_proj.weight"] == 0.2
    assert alphas["model.layers.5.mlp.up_proj.weight"] == 0.3
    assert alphas["model.layers.8.mlp.up_proj.weight"] == 0.2
    assert alphas["model.layers.8.self_attn.k_proj.weight"] == 0.4
    assert alphas["model.layers.31.self_attn.k_proj.bias"] == 0.5


@given(st.lists(st.tuples(st.integers(0, 31), st.integers(0, 31)).map(sorted), min_size=1, max_size=3))
@settings(deadline=None, max_examples=50)
def test_restore_gives_exactly_the_layers_of_its_intervals_both_ends_included(intervals: list[list[int]]) -> None:
    wanted = {layer for first, last in intervals for layer in range(first, last + 1)}
    for name, alpha in alphas_of(restore=intervals).items():
        assert alpha == (name.startswith("model.layers.") and int(name.split(".")[2]) in wanted), name


@given(
    st.tuples(st.integers(0, 31), st.integers(0, 31)).map(sorted).filter(lambda ends: ends[0] < ends[1]),
    st.floats(0, 1),
    st.floats(0, 1),
)
@settings(deadline=None, max_examples=50)
def test_a_gradient_is_linear_meets_its_ends_exactly_and_stays_between_them(
    ends: list[int], start: float, end: float
) -> None:
    alphas = alphas_of(layers=[{"range": ends, "alpha": [start, end]}])
    first, last = ends
    found = [alphas[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(first, last + 1)]
    assert (found[0], found[-1]) == (start, end)
    assert all(min(start, end) <= alpha <= max(start, end) for alpha in found)
    steps = [after - before for before, after in pairwise(found)]
    assert steps == pytest.approx([(end - start) / (last - first)] * len(steps), abs=1e-15)
    assert all(alphas[name] == 0 for name in NAMES if not name.startswith("model.layers."))


@pytest.mark.parametrize(
    ("pattern", "inner"),
    [
        ("self_attn", {"self_attn.k_proj.bias", "self_attn.k_proj.weight", "self_attn.q_proj.weight"}),
        ("q_proj", {"self_attn.q_proj.weight"}),
        ("self_attn.k_proj", {"self_attn.k_proj.bias", "self_attn.k_proj.weight"}),
        ("bias", {"self_attn.k_proj.bias"}),
        ("k_proj.weight", {"self_attn.k_proj.weight"}),
        ("mlp.*_proj", {"mlp.down_proj.weight", "mlp.up_proj.weight"}),
        ("*norm*", {"input_layernorm.weight"}),
        ("[kq]_proj", {"self_attn.k_proj.bias", "self_attn.k_proj.weight", "self_attn.q_proj.weight"}),
        ("*", set(INNER)),
    ],
)
def test_modules_are_found_by_name_and_by_glob(pattern: str, inner: set[str]) -> None:
    alphas = alphas_of(layers=[{"range": [3, 4], "alpha": 0.5, "modules": [pattern]}])
    assert {name for name, alpha in alphas.items() if alpha} == {
        f"model.layers.{k}.{name}" for k in (3, 4) for name in inner
    }


def test_a_part_of_a_module_name_does_not_match() -> None:
    assert problems_of(layers=[{"range": [0, 31], "alpha": 1, "modules": ["attn"]}]) == [
        "$.layers[0].modules: attn matches no tensor; did you mean self_attn?"
    ]


def test_layers_past_the_last_are_refused_all_at_once() -> None:
    assert problems_of(restore=[12, 40]) == ["$.restore: 40 is past the last layer (31); use 0–31"]
    assert problems_of(restore=[[0, 31], [40, 41]], layers=[{"range": [0, 32], "alpha": 1}]) == [
        "$.restore[1]: 41 is past the last layer (31); use 0–31",
        "$.layers[0].range: 32 is past the last layer (31); use 0–31",
    ]


def test_patterns_that_match_nothing_are_refused_with_the_nearest_name() -> None:
    assert problems_of(
        restore=[1, 2],
        layers=[{"range": [0, 3], "alpha": 1, "modules": ["self_atn", "mlp", "zzz"]}],
        tensors=[{"match": "model.embed_token.weight", "alpha": 1}, {"match": "zzz", "alpha": 1}],
    ) == [
        "$.layers[0].modules: self_atn matches no tensor; did you mean self_attn?",
        "$.layers[0].modules: zzz matches no tensor; `slrmerge inspect` lists the names",
        "$.tensors[0].match: model.embed_token.weight matches no tensor; did you mean model.embed_tokens.weight?",
        "$.tensors[1].match: zzz matches no tensor; `slrmerge inspect` lists the names",
    ]


def test_where_few_names_are_known_they_are_listed() -> None:
    assert problems_of(["a.weight", "b.weight"], None, tensors=[{"match": "zzz", "alpha": 1}]) == [
        "$.tensors[0].match: zzz matches no tensor; known: a.weight, b.weight"
    ]


def test_layers_past_the_last_and_patterns_that_match_nothing_come_in_one_go() -> None:
    assert problems_of(restore=[0, 40], tensors=[{"match": "model.norm.wieght", "alpha": 1}]) == [
        "$.restore: 40 is past the last layer (31); use 0–31",
        "$.tensors[0].match: model.norm.wieght matches no tensor; did you mean model.norm.weight?",
    ]


def test_without_a_known_stack_layers_are_refused_and_tensors_still_work() -> None:
    assert problems_of(stack=None, restore=[0, 1]) == [f"$.restore: {NO_STACK}"]
    assert problems_of(stack=None, layers=[{"range": [0, 1], "alpha": 1}]) == [f"$.layers: {NO_STACK}"]
    assert problems_of(stack=None, alpha=0.5, tensors=[{"match": "*.norm.*", "alpha": 1}]) == []


def test_layers_past_the_stack_are_outside_it() -> None:
    recipe = parse_recipe({"pretrained": "a", "posttrained": "b", "restore": [0, 1]})
    names = [f"model.layers.{k}.mlp.weight" for k in range(3)] + ["vision_tower.encoder.layers.1.mlp.weight"]
    assert route(recipe, names, LayerStack("model.layers", 2)) == (dict(zip(names, [1, 1, 0, 0], strict=True)), [])


def test_a_glob_is_held_against_the_whole_name_and_minds_case() -> None:
    alphas = alphas_of(tensors=[{"match": "*norm.weight", "alpha": 1}])
    assert {name for name, alpha in alphas.items() if alpha} == {
        "model.norm.weight",
        *(f"model.layers.{k}.input_layernorm.weight" for k in range(32)),
    }
    assert problems_of(tensors=[{"match": "MODEL.NORM.WEIGHT", "alpha": 1}]) == [
        "$.tensors[0].match: MODEL.NORM.WEIGHT matches no tensor; `slrmerge inspect` lists the names"
    ]
