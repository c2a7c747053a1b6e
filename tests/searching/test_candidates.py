"""Candidates: every space is complete, and the alphas are those that a recipe with the same rules has."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest

from slrmerge.checkpoint.opening import open_pair
from slrmerge.checkpoint.pair import ModelPair
from slrmerge.errors import PlanError
from slrmerge.io.options import options_of
from slrmerge.recipe.load import load_recipe
from slrmerge.recipe.model import Recipe
from slrmerge.recipe.rules import Rules
from slrmerge.searching.candidates import MAKERS, Candidate, CandidateInfo, intervals, make_candidates, parents
from slrmerge.searching.options import SearchOptions
from slrmerge.searching.spaces import SPACES
from tests.checkpoints import random_tensor, write_checkpoint
from tests.problems import refused
from tests.searching.pairs import LAYERS, SmallPair

SPANS = list(combinations_with_replacement(range(LAYERS), 2))


@pytest.fixture(scope="module")
def pair(made_pair: Path) -> ModelPair:
    return SmallPair(made_pair).open()


def odd_pair(folder: Path, *inner: str, layers: int = 2) -> ModelPair:
    """A pair whose layers have tensors of these names."""
    names = [f"model.layers.{k}.{name}" for k in range(layers) for name in inner]
    return named_pair(folder, names, layers=layers)


def named_pair(folder: Path, names: list[str], *, layers: int) -> ModelPair:
    for side in ("pre", "post"):
        tensors = {name: random_tensor("F32", (2, 2), f"{side} {name}") for name in names}
        write_checkpoint(folder / side, tensors, {"num_hidden_layers": layers})
    return open_pair(folder / "pre", folder / "post")


def recipe(**rules: Any) -> Recipe:
    return Recipe(pretrained="a", posttrained="b", **rules)


def by_label(candidates: list[Candidate]) -> dict[str, Candidate]:
    return {candidate.info.label: candidate for candidate in candidates}


def layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else None


def inside(info: CandidateInfo, name: str) -> bool:
    layer = layer_of(name)
    assert info.start is not None
    assert info.end is not None
    return layer is not None and info.start <= layer <= info.end


# spaces


EXPECTED: dict[str, Callable[[CandidateInfo, str], float]] = {
    "intervals": lambda info, name: float(inside(info, name)),
    "soups": lambda info, name: info.alpha or 0.0,
    "attention": lambda info, name: float(inside(info, name) and ".self_attn." in name),
    "mlp": lambda info, name: float(inside(info, name) and ".mlp." in name),
}


def test_every_space_is_a_choice_of_the_option() -> None:
    assert set(options_of(SearchOptions)["spaces"].choices) == set(SPACES) == set(MAKERS) == set(EXPECTED)


@pytest.mark.parametrize("space", MAKERS)
def test_alphas_of_a_space(pair: ModelPair, space: str) -> None:
    candidates = make_candidates(pair, [space])[2:]
    assert candidates
    for candidate in candidates:
        info = candidate.info
        assert info.space == SPACES[space]
        assert list(candidate.alphas) == list(pair.posttrained)
        assert dict(candidate.alphas) == {name: EXPECTED[space](info, name) for name in candidate.alphas}, info.label
        restored = {layer_of(name) for name, alpha in candidate.alphas.items() if alpha == 1} - {None}
        assert info.layers_restored == len(restored)


@pytest.mark.parametrize("space", MAKERS)
def test_candidates_of_a_space_are_distinct_and_their_recipes_have_the_same_alphas(pair: ModelPair, space: str) -> None:
    infos = list(MAKERS[space](pair))
    candidates = make_candidates(pair, [space])[2:]
    assert [candidate.info for candidate in candidates] == infos
    assert len({info.label for info in infos}) == len(infos)
    for candidate in candidates:
        alphas, problems = recipe(**candidate.info.rules.rules()).resolve(pair)
        assert (alphas, problems) == (candidate.alphas, [])


@pytest.mark.parametrize("space", MAKERS)
def test_a_space_requires_decoder_layers(tmp_path: Path, space: str) -> None:
    for side in ("pre", "post"):
        write_checkpoint(tmp_path / side, {"w": random_tensor("F32", (2, 2), side)}, {"model_type": "llama"})
    with refused(PlanError, "no-layers"):
        make_candidates(open_pair(tmp_path / "pre", tmp_path / "post"), [space])


@pytest.mark.parametrize("layers", [1, 2, 5, 28])
def test_intervals_are_all_pairs_of_ends(tmp_path: Path, layers: int) -> None:
    spans = [(info.start, info.end) for info in intervals(odd_pair(tmp_path, "w", layers=layers))]
    assert len(spans) == layers * (layers + 1) // 2
    assert spans == list(combinations_with_replacement(range(layers), 2))


def test_an_interval_includes_both_ends(pair: ModelPair) -> None:
    found = by_label(make_candidates(pair, ["intervals"]))
    assert found["layers 1–2"].info.layers_restored == 2
    assert found["layer 3"].info.layers_restored == 1
    alphas = found["layers 1–2"].alphas
    assert {layer_of(name) for name, alpha in alphas.items() if alpha == 1} == {1, 2}
    assert {layer_of(name) for name, alpha in alphas.items() if alpha == 0} == {None, 0, 3}


@pytest.mark.parametrize(
    ("space", "module", "label"),
    [("attention", "self_attn", "layers 0–1, self_attn only"), ("mlp", "mlp", "layers 0–1, mlp only")],
)
def test_intervals_of_a_module_name_it(pair: ModelPair, space: str, module: str, label: str) -> None:
    infos = list(MAKERS[space](pair))
    assert [(info.start, info.end) for info in infos] == SPANS
    assert {(info.space, info.modules) for info in infos} == {(space, module)}
    assert infos[1].label == label


@pytest.mark.parametrize(
    ("module", "space"),
    [
        ("self_attn", "attention"), ("attn", "attention"), ("attention", "attention"), ("mlp", "mlp"),
        ("feed_forward", "mlp"), ("self_attention", "attention"), ("ffn", "mlp"), ("block_sparse_moe", "mlp"),
    ],
)  # fmt: skip
def test_modules_are_found_by_their_usual_names(tmp_path: Path, module: str, space: str) -> None:
    pair = odd_pair(tmp_path, f"{module}.w", "norm.w")
    assert {info.modules for info in MAKERS[space](pair)} == {module}


@pytest.mark.parametrize("space", ["attention", "mlp"])
def test_a_model_without_such_modules_is_refused(tmp_path: Path, space: str) -> None:
    pair = odd_pair(tmp_path, "mixer.w")
    with refused(PlanError, "no-such-module") as caught:
        make_candidates(pair, [space])
    assert caught.value.problems[0].where == str(tmp_path / "post")
    assert space in caught.value.problems[0].remedy


def test_layers_without_the_module_do_not_count_and_intervals_of_only_such_layers_are_left_out(tmp_path: Path) -> None:
    names = ["model.layers.0.conv.w", "model.layers.1.self_attn.w", "model.layers.2.conv.w"]
    candidates = make_candidates(named_pair(tmp_path, names, layers=3), ["attention"])[2:]
    assert [each.info.label for each in candidates] == ["layers 0–1, self_attn only"]
    assert candidates[0].info.layers_restored == 1
    assert len(candidates[0].info.also_named) == 3  # other intervals with the same layer


def test_soups_and_parents_are_all_twentieths(pair: ModelPair) -> None:
    alphas = [info.alpha for info in (*MAKERS["soups"](pair), *parents(pair))]
    assert sorted(alpha or 0 for alpha in alphas) == [step / 20 for step in range(21)]


def test_the_parents_are_the_first_candidates(pair: ModelPair) -> None:
    models = make_candidates(pair, [])
    assert [(model.info.space, model.info.layers_restored) for model in models] == [("post", 0), ("pre", LAYERS)]
    assert [set(model.alphas.values()) for model in models] == [{0.0}, {1.0}]


def test_a_space_is_one_function(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(pair: ModelPair) -> Iterator[CandidateInfo]:
        yield CandidateInfo(space="ends", label="ends", rules=Rules(restore=((0, 0), (LAYERS - 1, LAYERS - 1))))

    monkeypatch.setitem(MAKERS, "ends", ends)
    made = make_candidates(pair, ["ends"])[-1]
    assert {layer_of(name) for name, alpha in made.alphas.items() if alpha == 1} == {0, LAYERS - 1}


def test_a_space_with_an_invalid_candidate_is_refused_by_its_label(
    pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_deep(pair: ModelPair) -> Iterator[CandidateInfo]:
        yield CandidateInfo(space="deep", label="deep", rules=Rules(restore=((0, LAYERS),)))

    monkeypatch.setitem(MAKERS, "deep", too_deep)
    with refused(PlanError, "layer-out-of-range") as caught:
        make_candidates(pair, ["deep"])
    assert caught.value.problems[0].where == "deep"


# recipes


@pytest.mark.parametrize(
    "rules",
    [
        {"restore": [[0, 0], [2, 3]]},
        {"alpha": 0.5, "restore": [1, 2]},
        {"layers": [{"range": [0, 3], "alpha": [0.0, 1.0], "modules": ["mlp"]}]},
        {"restore": [0, 3], "tensors": [{"match": "*.q_proj.*", "alpha": 0.25}]},
    ],
)
def test_a_recipe_is_a_candidate_with_its_rules_and_alphas(pair: ModelPair, rules: dict[str, Any]) -> None:
    own = recipe(**rules, dtype="float16")
    made = make_candidates(pair, [], [("mine", own)])[-1]
    assert (made.info.space, made.info.label) == ("recipe", "mine")
    assert made.info.rules.rules() == own.rules()
    assert made.alphas == own.resolve(pair).alphas


@pytest.mark.parametrize(
    ("rules", "restored"),
    [
        ({"alpha": 0.5}, 0),
        ({"restore": [1, 2]}, 2),
        ({"restore": [[0, 1], [1, 3]]}, 4),
        ({"layers": [{"range": [1, 2], "alpha": 1.0, "modules": ["mlp"]}]}, 2),
        ({"layers": [{"range": [0, 3], "alpha": 0.5}]}, 0),
        ({"restore": [0, 1], "layers": [{"range": [0, 0], "alpha": 0.0}]}, 1),
    ],
)
def test_restored_layers_have_a_wholly_pretrained_tensor(pair: ModelPair, rules: dict[str, Any], restored: int) -> None:
    made = make_candidates(pair, [], [("mine", recipe(**rules))])[-1]
    assert len({layer_of(name) for name, alpha in made.alphas.items() if alpha == 1} - {None}) == restored
    assert made.info.layers_restored == restored


def test_a_recipe_that_does_not_fit_is_refused(pair: ModelPair) -> None:
    with refused(PlanError, "layer-out-of-range"):
        make_candidates(pair, [], [("mine", recipe(restore=[1, LAYERS]))])


@pytest.mark.parametrize("blend", ["slerp"])
def test_a_blend_that_is_not_linear_is_refused(pair: ModelPair, blend: str) -> None:
    with refused(PlanError, "unsupported-blend") as caught:
        make_candidates(pair, [], [("mine", recipe(alpha=0.5, blend=blend))])
    assert caught.value.problems[0].where == "mine"


def test_candidates_with_equal_alphas_are_one_with_all_labels(pair: ModelPair) -> None:
    recipes = [
        ("all", recipe(alpha=1.0)),
        ("middle", recipe(restore=[1, 2])),
        ("a = b", recipe(layers=[{"range": [1, 2], "alpha": 1.0}])),
        ("new", recipe(restore=[[0, 0], [3, 3]])),
        ("new again", recipe(restore=[[3, 3], [0, 0]])),
    ]
    plain, made = make_candidates(pair, ["intervals"]), make_candidates(pair, ["intervals"], recipes)
    found = by_label(made)
    assert found["pre-trained"].info.also_named == ("all",)
    assert found["layers 1–2"].info.also_named == ("middle", "a = b")
    assert found["new"].info.also_named == ("new again",)
    assert [replace(each.info, also_named=()) for each in made[:-1]] == [each.info for each in plain]
    assert found["layers 1–2"].info.space == "interval"
    for name in ("middle", "a = b"):
        assert name in found["layers 1–2"].info.full_label


def test_labels_are_unique(pair: ModelPair) -> None:
    recipes = [
        ("r.yaml", recipe(restore=[[0, 0], [2, 2]])),
        ("r.yaml", recipe(restore=[[0, 0], [3, 3]])),
        ("layer 3", recipe(restore=[[1, 1], [3, 3]])),
        ("r.yaml", recipe(alpha=0.3)),
    ]
    made = make_candidates(pair, ["intervals"], recipes)
    assert [each.info.label for each in made[-4:]] == ["r.yaml", "r.yaml (2)", "layer 3 (2)", "r.yaml (3)"]


def test_a_space_that_is_named_twice_is_tried_once(pair: ModelPair) -> None:
    assert make_candidates(pair, ["soups", "soups"]) == make_candidates(pair, ["soups"])


MEAN = """\
merge_method: linear
slices:
- sources:
  - {model: POST, layer_range: [0, LAYERS], parameters: {weight: 3}}
  - {model: PRE, layer_range: [0, LAYERS], parameters: {weight: 1}}
"""


def mergekit_config(folder: Path, pair: ModelPair, *, layers: int = LAYERS) -> Path:
    config = folder / "mergekit.yaml"
    text = MEAN.replace("LAYERS", f"{layers}")
    text = text.replace("POST", str(pair.posttrained.folder)).replace("PRE", str(pair.pretrained.folder))
    config.write_text(text)
    return config


def test_a_mergekit_config_is_a_candidate(pair: ModelPair, tmp_path: Path) -> None:
    made = make_candidates(pair, [], [("mine", load_recipe(mergekit_config(tmp_path, pair)))])[-1]
    assert set(made.alphas.values()) == {0.25}
    assert (made.info.space, made.info.rules.has_rules) == ("recipe", False)


def test_a_mergekit_config_with_a_soups_alphas_is_that_soup(pair: ModelPair, tmp_path: Path) -> None:
    made = make_candidates(pair, ["soups"], [("mine", load_recipe(mergekit_config(tmp_path, pair)))])
    assert by_label(made)["soup 0.25"].info.also_named == ("mine",)


def test_a_mergekit_config_that_does_not_fit_is_refused(pair: ModelPair, tmp_path: Path) -> None:
    config = load_recipe(mergekit_config(tmp_path, pair, layers=1))
    with pytest.raises(PlanError):
        make_candidates(pair, [], [("mine", config)])


def test_reprs_are_one_line(pair: ModelPair) -> None:
    for candidate in make_candidates(pair, ["intervals"])[:3]:
        assert "\n" not in repr(candidate)
        assert len(repr(candidate)) < 400
