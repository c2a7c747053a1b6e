"""Which alpha every tensor gets, and the value that all sources of alphas resolve to."""

import pickle
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slrmerge.checkpoint.layers import LayerStack
from slrmerge.recipe.alphas import TensorAlphas, resolve_rules
from slrmerge.recipe.rules import Rules
from tests.conftest import Pair

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


def alphas_of(**content: Any) -> TensorAlphas:
    alphas, problems = resolve_rules(Rules(**content), NAMES, STACK)
    assert problems == []
    assert list(alphas) == NAMES
    return alphas


def problems_of(names: list[str] = NAMES, stack: LayerStack | None = STACK, **content: Any) -> list[tuple[str, str]]:
    """The code and the place of each problem."""
    _, problems = resolve_rules(Rules(**content), names, stack)
    return [(problem.code, problem.where) for problem in problems]


def test_alpha_restore_layers_and_tensors_apply_in_this_order() -> None:
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
def test_restore_takes_exactly_the_layers_of_its_intervals(intervals: list[list[int]]) -> None:
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
def test_modules_match_by_name_and_by_glob(pattern: str, inner: set[str]) -> None:
    alphas = alphas_of(layers=[{"range": [3, 4], "alpha": 0.5, "modules": [pattern]}])
    assert {name for name, alpha in alphas.items() if alpha} == {
        f"model.layers.{k}.{name}" for k in (3, 4) for name in inner
    }


def test_a_part_of_a_module_name_does_not_match() -> None:
    rule = {"range": [0, 31], "alpha": 1, "modules": ["attn"]}
    assert problems_of(layers=[rule]) == [("pattern-matches-nothing", "$.layers[0].modules")]


def test_all_layers_past_the_last_are_reported() -> None:
    assert problems_of(restore=[12, 40]) == [("layer-out-of-range", "$.restore")]
    assert problems_of(restore=[[0, 31], [40, 41]], layers=[{"range": [0, 32], "alpha": 1}]) == [
        ("layer-out-of-range", "$.restore[1]"),
        ("layer-out-of-range", "$.layers[0].range"),
    ]


def test_a_layer_rule_past_the_last_layer_is_one_problem() -> None:
    rule = {"range": [40, 41], "alpha": 1, "modules": ["mlp"]}
    assert problems_of(layers=[rule]) == [("layer-out-of-range", "$.layers[0].range")]


def test_an_enormous_interval_costs_nothing() -> None:
    assert problems_of(restore=[0, 10**9]) == [("layer-out-of-range", "$.restore")]


def test_all_patterns_that_match_nothing_are_reported() -> None:
    assert problems_of(
        restore=[1, 2],
        layers=[{"range": [0, 3], "alpha": 1, "modules": ["self_atn", "mlp", "zzz"]}],
        tensors=[{"match": "model.embed_token.weight", "alpha": 1}, {"match": "zzz", "alpha": 1}],
    ) == [
        ("pattern-matches-nothing", "$.layers[0].modules"),
        ("pattern-matches-nothing", "$.layers[0].modules"),
        ("pattern-matches-nothing", "$.tensors[0].match"),
        ("pattern-matches-nothing", "$.tensors[1].match"),
    ]


@pytest.mark.parametrize(
    ("pattern", "names", "remedy"),
    [
        ("model.embed_token.weight", NAMES, "did you mean model.embed_tokens.weight?"),
        ("zzz", NAMES, "`slrmerge inspect` lists the names"),
        ("zzz", ["a.weight", "b.weight"], "known: a.weight, b.weight"),
    ],
)
def test_the_remedy_names_the_nearest_tensor_or_all_where_they_are_few(
    pattern: str, names: list[str], remedy: str
) -> None:
    (problem,) = resolve_rules(Rules(tensors=[{"match": pattern, "alpha": 1}]), names, None).problems
    assert problem.remedy == remedy


def test_the_nearest_names_are_found_for_some_patterns_only() -> None:
    rules = Rules(tensors=[{"match": f"lm_hea{number}.weight", "alpha": 1} for number in range(500)])
    problems = resolve_rules(rules, ["lm_head.weight"], None).problems
    assert len(problems) == 500
    assert sum(bool(problem.remedy) for problem in problems) == 10


def test_layers_and_patterns_are_reported_together() -> None:
    assert problems_of(restore=[0, 40], tensors=[{"match": "model.norm.wieght", "alpha": 1}]) == [
        ("layer-out-of-range", "$.restore"),
        ("pattern-matches-nothing", "$.tensors[0].match"),
    ]


def test_places_are_named_by_the_recipe() -> None:
    _, problems = resolve_rules(Rules(restore=[0, 40]), NAMES, STACK, place=lambda path: f"r.yaml: {path}")
    assert [problem.where for problem in problems] == ["r.yaml: $.restore"]


def test_without_known_layers_only_tensors_can_be_named() -> None:
    assert problems_of(stack=None, restore=[0, 1]) == [("no-layers", "$.restore")]
    assert problems_of(stack=None, layers=[{"range": [0, 1], "alpha": 1}]) == [("no-layers", "$.layers")]
    assert problems_of(stack=None, alpha=0.5, tensors=[{"match": "*.norm.*", "alpha": 1}]) == []


def test_layers_past_the_stack_are_outside_it() -> None:
    names = [f"model.layers.{k}.mlp.weight" for k in range(3)] + ["vision_tower.encoder.layers.1.mlp.weight"]
    alphas, problems = resolve_rules(Rules(restore=[0, 1]), names, LayerStack("model.layers", 2))
    assert (dict(alphas), problems) == (dict(zip(names, [1, 1, 0, 0], strict=True)), [])


def test_a_glob_matches_the_whole_name_and_is_case_sensitive() -> None:
    alphas = alphas_of(tensors=[{"match": "*norm.weight", "alpha": 1}])
    assert {name for name, alpha in alphas.items() if alpha} == {
        "model.norm.weight",
        *(f"model.layers.{k}.input_layernorm.weight" for k in range(32)),
    }
    assert problems_of(tensors=[{"match": "MODEL.NORM.WEIGHT", "alpha": 1}]) == [
        ("pattern-matches-nothing", "$.tensors[0].match")
    ]


# a recipe for a pair


def test_a_recipe_resolves_for_the_post_trained_side_of_a_pair(pair: Pair) -> None:
    resolution = pair.recipe(restore=[2, 3], blend="slerp").resolve(pair.open())
    assert list(resolution.alphas) == list(pair.open().posttrained)
    assert {name for name, alpha in resolution.alphas.items() if alpha == 1} == {
        name for name in pair.post if name.startswith(("model.layers.2.", "model.layers.3."))
    }
    assert (resolution.alphas.blend, resolution.problems) == ("slerp", [])


def test_problems_of_a_recipe_for_a_pair_name_its_file(pair: Pair) -> None:
    file = pair.recipe_file(restore=[2, 9], tensors=[{"match": "x", "alpha": 1}])
    problems = pair.recipe(restore=[2, 9], tensors=[{"match": "x", "alpha": 1}]).resolve(pair.open()).problems
    assert [(problem.code, problem.where) for problem in problems] == [
        ("layer-out-of-range", f"{file}: $.restore"),
        ("pattern-matches-nothing", f"{file}: $.tensors[0].match"),
    ]


# the value


ABC = {"a": 0.0, "model.layers.0.b": 0.5, "model.layers.1.c": 1.0}


def test_alphas_are_a_mapping_in_the_order_given() -> None:
    alphas = TensorAlphas(ABC)
    assert list(alphas) == list(ABC)
    assert list(alphas.values()) == [0.0, 0.5, 1.0]
    assert dict(alphas) == ABC
    assert len(alphas) == 3
    assert "a" in alphas
    assert "b" not in alphas
    assert alphas.get("b", -1) == -1
    with pytest.raises(KeyError):
        alphas["b"]


def test_alphas_do_not_change_with_what_they_were_made_from() -> None:
    source = dict(ABC)
    alphas = TensorAlphas(source)
    source["a"] = 1.0
    del source["model.layers.1.c"]
    assert dict(alphas) == ABC


def test_alphas_are_equal_with_equal_names_alphas_and_blend() -> None:
    alphas = TensorAlphas(ABC)
    assert alphas == TensorAlphas(ABC)
    assert hash(alphas) == hash(TensorAlphas(ABC))
    assert alphas != TensorAlphas(ABC, blend="slerp")
    assert alphas != TensorAlphas(ABC | {"a": 1.0})
    assert alphas != TensorAlphas(dict(reversed(ABC.items())))
    assert alphas != TensorAlphas(dict(zip("xyz", ABC.values(), strict=True)))
    assert alphas != ABC
    assert len({alphas, TensorAlphas(ABC), TensorAlphas(ABC, blend="slerp")}) == 2


def test_other_alphas_of_the_same_tensors_share_the_names() -> None:
    alphas = TensorAlphas(ABC, blend="slerp")
    others = alphas.with_alphas([1, 1, 0])
    assert dict(others) == dict(zip(ABC, [1, 1, 0], strict=True))
    assert others.blend == "slerp"
    assert others._places is alphas._places
    assert TensorAlphas(alphas)._places is alphas._places
    assert others.with_alphas(ABC.values()) == alphas
    assert dict(alphas) == ABC


def test_alphas_survive_pickling() -> None:
    alphas = TensorAlphas(ABC, blend="slerp")
    assert pickle.loads(pickle.dumps(alphas)) == alphas


def test_repr_counts_the_tensors_on_one_line() -> None:
    assert repr(TensorAlphas(ABC)) == "<TensorAlphas: 1 restored, 1 blended, 1 kept>"
    assert len(repr(alphas_of(alpha=0.5)).splitlines()) == 1


def test_restored_layers_are_those_with_a_wholly_pretrained_tensor() -> None:
    assert TensorAlphas(ABC).restored_layers(STACK) == 1
    assert alphas_of(restore=[[1, 3], [3, 4]]).restored_layers(STACK) == 4
    assert alphas_of(alpha=0.5).restored_layers(STACK) == 0
    assert alphas_of(tensors=[{"match": "lm_head.*", "alpha": 1}]).restored_layers(STACK) == 0
    assert alphas_of(alpha=1).restored_layers(None) == 0
