"""What a search tries: every space counts as the issue says, and each candidate is what a recipe would say."""

from collections.abc import Callable
from itertools import combinations_with_replacement
from pathlib import Path

import pytest

from slrmerge.checkpoint import Checkpoint
from slrmerge.errors import PlanError
from slrmerge.hub import open_checkpoint
from slrmerge.recipe import load_recipe, parse_recipe
from slrmerge.search.candidates import SPACES, Candidate, alphas_of, ends, from_recipe, intervals, recipe_of, words
from tests.checkpoints import random_tensor, write_checkpoint
from tests.search.pairs import LAYERS, SmallPair

SPANS = list(combinations_with_replacement(range(LAYERS), 2))


@pytest.fixture
def post(small: SmallPair) -> Checkpoint:
    return open_checkpoint(small.folder / "post")


def layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else None


def inside(candidate: Candidate, name: str) -> bool:
    layer = layer_of(name)
    assert candidate.start is not None
    assert candidate.end is not None
    return layer is not None and candidate.start <= layer <= candidate.end


EXPECTED: dict[str, Callable[[Candidate, str], float]] = {
    "intervals": lambda candidate, name: float(inside(candidate, name)),
    "soups": lambda candidate, name: candidate.alpha or 0.0,
    "attention": lambda candidate, name: float(inside(candidate, name) and ".self_attn." in name),
    "mlp": lambda candidate, name: float(inside(candidate, name) and ".mlp." in name),
}


@pytest.mark.parametrize("layers", [1, 2, 5, 28])
def test_there_are_as_many_intervals_as_pairs_of_ends(post: Checkpoint, layers: int) -> None:
    spans = [(candidate.start, candidate.end) for candidate in intervals(post, layers)]
    assert len(spans) == len(set(spans)) == layers * (layers + 1) // 2
    assert spans == list(combinations_with_replacement(range(layers), 2))


def test_both_ends_of_an_interval_count(post: Checkpoint) -> None:
    found = {candidate.label: candidate for candidate in intervals(post, LAYERS)}
    assert found["layers 1–2"].layers_restored == 2
    assert found["layer 3"].layers_restored == 1
    (alphas,) = alphas_of([found["layers 1–2"]], post)
    assert {layer_of(name) for name, alpha in alphas.items() if alpha == 1} == {1, 2}
    assert {layer_of(name) for name, alpha in alphas.items() if alpha == 0} == {None, 0, 3}


@pytest.mark.parametrize(("start", "end", "said"), [(3, 3, "layer 3"), (0, 0, "layer 0"), (2, 8, "layers 2–8")])
def test_an_interval_is_read_with_both_ends(start: int, end: int, said: str) -> None:
    assert words(start, end) == said


@pytest.mark.parametrize("space", SPACES)
def test_every_candidate_routes_each_tensor_as_its_space_says(post: Checkpoint, space: str) -> None:
    candidates = list(SPACES[space](post, LAYERS))
    for candidate, alphas in zip(candidates, alphas_of(candidates, post), strict=True):
        assert list(alphas) == list(post.weight_map)
        assert alphas == {name: EXPECTED[space](candidate, name) for name in alphas}, candidate.label
        restored = {layer_of(name) for name, alpha in alphas.items() if alpha == 1} - {None}
        assert candidate.layers_restored == len(restored)


@pytest.mark.parametrize(
    ("space", "module", "label"),
    [("attention", "self_attn", "layers 0–1, self_attn only"), ("mlp", "mlp", "layers 0–1, mlp only")],
)
def test_intervals_of_some_modules_only_name_them(post: Checkpoint, space: str, module: str, label: str) -> None:
    candidates = list(SPACES[space](post, LAYERS))
    assert [(candidate.start, candidate.end) for candidate in candidates] == SPANS
    assert {(candidate.space, candidate.modules) for candidate in candidates} == {(space, module)}
    assert candidates[1].label == label


@pytest.mark.parametrize(("module", "space"), [("attention", "attention"), ("feed_forward", "mlp")])
def test_modules_are_found_by_the_names_that_models_give_them(tmp_path: Path, module: str, space: str) -> None:
    names = [f"model.layers.{k}.{inner}.w" for k in range(2) for inner in (module, "norm")]
    config = {"num_hidden_layers": 2}
    folder = write_checkpoint(tmp_path / "odd", {name: random_tensor("F32", (2, 2), name) for name in names}, config)
    assert {candidate.modules for candidate in SPACES[space](open_checkpoint(folder), 2)} == {module}


@pytest.mark.parametrize(
    ("space", "known"), [("attention", "self_attn or attn or attention"), ("mlp", "mlp or feed_forward")]
)
def test_a_model_without_such_modules_is_refused_with_what_to_leave_out(tmp_path: Path, space: str, known: str) -> None:
    names = [f"model.layers.{k}.mixer.w" for k in range(2)]
    config = {"num_hidden_layers": 2}
    folder = write_checkpoint(tmp_path / "odd", {name: random_tensor("F32", (2, 2), name) for name in names}, config)
    with pytest.raises(PlanError) as caught:
        list(SPACES[space](open_checkpoint(folder), 2))
    assert str(caught.value) == f"{folder}: has no module called {known} in its layers; leave out --space {space}"


def test_soups_go_from_the_post_trained_model_to_the_pre_trained_in_steps_of_a_twentieth(post: Checkpoint) -> None:
    soups = [candidate.alpha for candidate in SPACES["soups"](post, LAYERS)]
    models = [candidate.alpha for candidate in ends(post, LAYERS)]
    assert sorted(alpha or 0 for alpha in soups + models) == [step / 20 for step in range(21)]


def test_the_two_models_are_candidates_themselves(post: Checkpoint) -> None:
    models = list(ends(post, LAYERS))
    assert [(model.space, model.layers_restored) for model in models] == [("post", 0), ("pre", LAYERS)]
    assert [set(alphas.values()) for alphas in alphas_of(models, post)] == [{0.0}, {1.0}]


def test_a_candidate_as_a_recipe_names_its_sources_and_its_rules_only() -> None:
    candidate = Candidate("soup", {"alpha": 0.25}, "soup 0.25", alpha=0.25)
    named = {"pretrained": "../a", "posttrained": "../b"}
    assert recipe_of(candidate, pretrained="../a", posttrained="../b", dtype=None) == {**named, "alpha": 0.25}
    assert recipe_of(candidate, pretrained="../a", posttrained="../b", dtype="float16") == {
        **named, "alpha": 0.25, "dtype": "float16"
    }  # fmt: skip


@pytest.mark.parametrize(
    "rules",
    [
        {"restore": [[0, 0], [2, 3]]},
        {"alpha": 0.5, "restore": [1, 2]},
        {"layers": [{"range": [0, 3], "alpha": [0.0, 1.0], "modules": ["mlp"]}]},
        {"restore": [0, 3], "tensors": [{"match": "*.q_proj.*", "alpha": 0.25}]},
    ],
)
def test_a_recipe_as_a_candidate_routes_as_the_recipe(post: Checkpoint, rules: dict[str, object]) -> None:
    recipe = parse_recipe({"pretrained": "a", "posttrained": "b", **rules, "dtype": "float16"})
    candidate = from_recipe(recipe, "mine", post)
    assert (candidate.space, candidate.label) == ("recipe", "mine")
    again = parse_recipe(recipe_of(candidate, pretrained="a", posttrained="b", dtype="float16"))
    assert again == recipe


@pytest.mark.parametrize(
    ("rules", "restored"),
    [
        ({"alpha": 0.5}, 0),
        ({"restore": [1, 2]}, 2),
        ({"restore": [[0, 1], [1, 3]]}, 4),
        ({"layers": [{"range": [1, 2], "alpha": 1.0, "modules": ["mlp"]}]}, 2),
        ({"layers": [{"range": [0, 3], "alpha": 0.5}]}, 0),
        ({"alpha": 1.0}, 4),
        ({"restore": [0, 1], "layers": [{"range": [0, 0], "alpha": 0.0}]}, 1),
    ],
)
def test_layers_of_which_something_is_wholly_pre_trained_are_counted(
    post: Checkpoint, rules: dict[str, object], restored: int
) -> None:
    recipe = parse_recipe({"pretrained": "a", "posttrained": "b", **rules})
    candidate = from_recipe(recipe, "mine", post)
    (alphas,) = alphas_of([candidate], post)
    assert len({layer_of(name) for name, alpha in alphas.items() if alpha == 1} - {None}) == restored
    assert candidate.layers_restored == restored


def test_what_does_not_fit_the_checkpoint_is_named_by_its_label_once(post: Checkpoint) -> None:
    recipe = parse_recipe({"pretrained": "a", "posttrained": "b", "restore": [1, LAYERS]})
    with pytest.raises(PlanError) as caught:
        alphas_of([from_recipe(recipe, label, post) for label in ("mine", "mine", "yours")], post)
    assert [str(problem) for problem in caught.value.problems] == [
        f"{label}: {LAYERS} is past the last layer ({LAYERS - 1}); use 0–{LAYERS - 1}" for label in ("mine", "yours")
    ]


MEAN = """\
merge_method: linear
slices:
- sources:
  - {model: org/post, layer_range: [0, LAYERS], parameters: {weight: 3}}
  - {model: org/pre, layer_range: [0, LAYERS], parameters: {weight: 1}}
"""


def test_a_mergekit_config_is_tried_as_the_recipe_that_it_stands_for(post: Checkpoint, tmp_path: Path) -> None:
    config = tmp_path / "mergekit.yaml"
    config.write_text(MEAN.replace("LAYERS", f"{LAYERS}"))
    candidate = from_recipe(load_recipe(config), "mine", post)
    assert (candidate.rules, candidate.alpha) == ({"alpha": 0.25}, 0.25)
    assert set(alphas_of([candidate], post)[0].values()) == {0.25}


def test_a_mergekit_config_that_does_not_fit_is_not_tried(post: Checkpoint, tmp_path: Path) -> None:
    config = tmp_path / "mergekit.yaml"
    config.write_text(MEAN.replace("LAYERS", "1"))
    with pytest.raises(PlanError) as caught:
        from_recipe(load_recipe(config), "mine", post)
    assert str(caught.value) == (
        f"{config}: $.slices: makes 1 layer of a model that has {LAYERS}; mergekit would write a model of another depth"
    )
