"""Recipes: every form that is accepted, and where the others are refused."""

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from slrmerge.checkpoint.location import Repository
from slrmerge.errors import CheckpointError, OutputError, RecipeError, SlrmergeError
from slrmerge.recipe.blend import BLEND_RULES
from slrmerge.recipe.load import as_recipe, load_recipe
from slrmerge.recipe.model import Recipe, generate_schema
from slrmerge.recipe.rules import LayerRule, Rules, TensorRule
from tests.conftest import Pair
from tests.problems import refused
from tests.recipe import SCHEMA, VALIDATOR

SIDES = {"pretrained": "pre", "posttrained": "post"}


def recipe(**content: Any) -> Recipe:
    return Recipe(**SIDES | content)


def layer(**more: Any) -> dict[str, Any]:
    """A recipe with one valid layer rule, changed by `more`; a key set to `...` is left out."""
    rule = {"range": [1, 2], "alpha": 1, **more}
    return {"layers": [{key: value for key, value in rule.items() if value is not ...}]}


GOOD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"restore": None, "alpha": None, "layers": (), "tensors": []}, {}),
    ({"blend": "slerp", "tokenizer": "pretrained"}, {"blend": "slerp", "tokenizer": "pretrained"}),
    ({"restore": [12, 17]}, {"restore": [12, 17]}),
    ({"restore": [3, 3]}, {"restore": [3, 3]}),
    ({"restore": [[3, 5], [12, 17]]}, {"restore": [[3, 5], [12, 17]]}),
    ({"restore": [[3, 5]]}, {"restore": [3, 5]}),
    ({"alpha": 0.85}, {"alpha": 0.85}),
    ({"alpha": 0}, {"alpha": 0.0}),
    ({"alpha": 1}, {"alpha": 1.0}),
    ({"alpha": 0.5, "restore": None, "dtype": None}, {"alpha": 0.5}),
    ({"alpha": 0.5, "layers": [], "tensors": []}, {"alpha": 0.5}),
    (layer(), {"layers": [{"range": [1, 2], "alpha": 1.0}]}),
    (layer(alpha=[1.0, 0]), {"layers": [{"range": [1, 2], "alpha": [1.0, 0.0]}]}),
    (
        layer(modules=["self_attn", "mlp.*_proj"]),
        {"layers": [{"range": [1, 2], "alpha": 1.0, "modules": ["self_attn", "mlp.*_proj"]}]},
    ),
    ({"tensors": [{"match": "*.bias", "alpha": 0.25}]}, {"tensors": [{"match": "*.bias", "alpha": 0.25}]}),
    ({"alpha": 1, "dtype": "bfloat16"}, {"alpha": 1.0, "dtype": "bfloat16"}),
    ({"alpha": 0.5, "blend": "slerp"}, {"alpha": 0.5, "blend": "slerp"}),
    ({"alpha": 0.5, "tokenizer": "pretrained"}, {"alpha": 0.5, "tokenizer": "pretrained"}),
    ({"alpha": 0.5, "blend": "linear", "tokenizer": "posttrained"}, {"alpha": 0.5}),
    ({"alpha": 1, "max_shard_size": "5GB"}, {"alpha": 1.0}),
    ({"alpha": 1, "max_shard_size": "2GiB"}, {"alpha": 1.0, "max_shard_size": 2**31}),
    ({"alpha": 1, "max_shard_size": 1000}, {"alpha": 1.0, "max_shard_size": 1000}),
]

BAD: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    ({"restor": [1, 2]}, [("unknown-key", "$")]),
    ({"alpha": 1, "Dtype": "x"}, [("unknown-key", "$")]),
    ({"alpha": 1, "slices": [], "two words": 1, "three more words": 1}, [("unknown-key", "$")] * 3),
    (layer(module=["x"]), [("unknown-key", "$.layers[0]")]),
    (layer(weight=1), [("unknown-key", "$.layers[0]")]),
    (
        {"tensors": [{"matches": "a", "alpha": 1}]},
        [("missing-key", "$.tensors[0].match"), ("unknown-key", "$.tensors[0]")],
    ),
    (layer(range=...), [("missing-key", "$.layers[0].range")]),
    (layer(alpha=...), [("missing-key", "$.layers[0].alpha")]),
    ({"tensors": [{"match": "a"}]}, [("missing-key", "$.tensors[0].alpha")]),
    # intervals
    ({"restore": []}, [("invalid-interval", "$.restore")]),
    ({"restore": [3]}, [("invalid-interval", "$.restore")]),
    ({"restore": [1, 2, 3]}, [("invalid-interval", "$.restore")]),
    ({"restore": 5}, [("invalid-interval", "$.restore")]),
    ({"restore": "1-2"}, [("invalid-interval", "$.restore")]),
    ({"restore": {"first": 1}}, [("invalid-interval", "$.restore")]),
    ({"restore": [-1, 2]}, [("invalid-interval", "$.restore")]),
    ({"restore": [False, True]}, [("invalid-interval", "$.restore")]),
    ({"restore": [1.5, 2]}, [("invalid-interval", "$.restore")]),
    ({"restore": ["1", "2"]}, [("invalid-interval", "$.restore")]),
    ({"restore": [None, 2]}, [("invalid-interval", "$.restore")]),
    ({"restore": [[]]}, [("invalid-interval", "$.restore[0]")]),
    ({"restore": [[1, 2], 3]}, [("invalid-interval", "$.restore[1]")]),
    ({"restore": [[[1, 2]]]}, [("invalid-interval", "$.restore[0]")]),
    (
        {"restore": [[1, 2], [4, 3], [-1, 0]]},
        [("invalid-interval", "$.restore[1]"), ("invalid-interval", "$.restore[2]")],
    ),
    (layer(range=[[1, 2]]), [("invalid-interval", "$.layers[0].range")]),
    (layer(range=None), [("invalid-interval", "$.layers[0].range")]),
    # alphas
    ({"alpha": True}, [("invalid-alpha", "$.alpha")]),
    ({"alpha": float("inf")}, [("invalid-alpha", "$.alpha")]),
    ({"alpha": -0.1}, [("invalid-alpha", "$.alpha")]),
    ({"alpha": 1.1}, [("invalid-alpha", "$.alpha")]),
    ({"alpha": "0.5"}, [("invalid-alpha", "$.alpha")]),
    ({"alpha": [0, 1]}, [("invalid-alpha", "$.alpha")]),
    (layer(alpha=False), [("invalid-alpha", "$.layers[0].alpha")]),
    (layer(alpha=None), [("invalid-alpha", "$.layers[0].alpha")]),
    (layer(alpha=[0, 2]), [("invalid-alpha", "$.layers[0].alpha")]),
    (layer(alpha=[0.5]), [("invalid-alpha", "$.layers[0].alpha")]),
    ({"tensors": [{"match": "a", "alpha": [0, 1]}]}, [("invalid-alpha", "$.tensors[0].alpha")]),
    # lists and names
    ({"layers": {}}, [("wrong-type", "$.layers")]),
    ({"layers": "all"}, [("wrong-type", "$.layers")]),
    ({"alpha": 1, "layers": None}, [("wrong-type", "$.layers")]),
    ({"layers": [1]}, [("wrong-type", "$.layers[0]")]),
    ({"layers": [None]}, [("wrong-type", "$.layers[0]")]),
    (layer(modules="self_attn"), [("wrong-type", "$.layers[0].modules")]),
    (layer(modules=None), [("wrong-type", "$.layers[0].modules")]),
    (layer(modules=[]), [("empty", "$.layers[0].modules")]),
    (layer(modules=[""]), [("empty", "$.layers[0].modules[0]")]),
    (layer(modules=["a", 1]), [("wrong-type", "$.layers[0].modules[1]")]),
    ({"tensors": [{"match": "", "alpha": 1}]}, [("empty", "$.tensors[0].match")]),
    ({"tensors": [{"match": 7, "alpha": 1}]}, [("wrong-type", "$.tensors[0].match")]),
    ({"alpha": 1, "pretrained": ""}, [("empty", "$.pretrained")]),
    ({"alpha": 1, "pretrained": None}, [("wrong-type", "$.pretrained")]),
    ({"alpha": 1, "pretrained": b"pre"}, [("wrong-type", "$.pretrained")]),
    ({"alpha": 1, "posttrained": ["post"]}, [("wrong-type", "$.posttrained")]),
    # dtypes and sizes
    ({"alpha": 1, "dtype": "bf16"}, [("invalid-choice", "$.dtype")]),
    ({"alpha": 1, "dtype": 16}, [("invalid-choice", "$.dtype")]),
    ({"alpha": 1, "blend": "nlerp"}, [("invalid-choice", "$.blend")]),
    ({"alpha": 1, "blend": None}, [("wrong-type", "$.blend")]),
    ({"alpha": 1, "tokenizer": "pre"}, [("invalid-choice", "$.tokenizer")]),
    ({"alpha": 1, "max_shard_size": None}, [("invalid-size", "$.max_shard_size")]),
    ({"alpha": 1, "max_shard_size": 1.5}, [("invalid-size", "$.max_shard_size")]),
]
"""Recipes that are refused, with the code and the place of every problem; the schema refuses them too."""

BAD_BEYOND_A_SCHEMA: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    # a schema does not compare two values
    ({"restore": [2, 1]}, [("invalid-interval", "$.restore")]),
    (layer(range=[2, 1]), [("invalid-interval", "$.layers[0].range")]),
    (layer(range=[3, 3], alpha=[1, 0]), [("invalid-alpha", "$.layers[0]")]),
    # to a schema 1.0 is an integer
    ({"restore": [1.0, 2]}, [("invalid-interval", "$.restore")]),
    # numbers too large for a layer, and what is not JSON
    ({"restore": [1, 2**200]}, [("invalid-interval", "$.restore")]),
    ({"restore": [10**12, 2]}, [("invalid-interval", "$.restore")]),
    ({"alpha": float("nan")}, [("invalid-alpha", "$.alpha")]),
    # the parser knows the grammar of sizes
    *(
        ({"alpha": 1, "max_shard_size": size}, [("invalid-size", "$.max_shard_size")])
        for size in ("five", "5 potatoes", "5iB", "", -1, 0, "0GB", "0.1B", "9" * 400 + "GB", 10**40)
    ),
]


def problems_of(content: dict[Any, Any]) -> list[tuple[str, str]]:
    """The code and the path of every problem of a recipe that is refused."""
    with pytest.raises(RecipeError) as caught:
        as_recipe(content)
    return [(problem.code, problem.where.removeprefix("recipe: ")) for problem in caught.value.problems]


@pytest.mark.parametrize(("content", "plain"), GOOD)
def test_a_valid_recipe_is_read_and_written_back(content: dict[str, Any], plain: dict[str, Any]) -> None:
    made = recipe(**content)
    assert made.to_dict() == SIDES | plain
    assert Recipe(**made.to_dict()) == made
    assert as_recipe(SIDES | content) == made


@pytest.mark.parametrize(("content", "expected"), BAD + BAD_BEYOND_A_SCHEMA, ids=lambda value: repr(value)[:60])
def test_an_invalid_recipe_is_refused(content: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert problems_of(SIDES | content) == expected
    with refused(RecipeError, *dict.fromkeys(code for code, _ in expected)):
        recipe(**content)


def test_both_missing_sides_are_reported() -> None:
    assert problems_of({}) == [("missing-key", "$.pretrained"), ("missing-key", "$.posttrained")]


@pytest.mark.parametrize("key", [1, None, 1.5, (1, 2)], ids=repr)
def test_a_key_that_is_not_a_string_is_an_unknown_key_at_every_level(key: object) -> None:
    assert problems_of(SIDES | {"alpha": 1, key: 2}) == [("unknown-key", "$")]
    rule: dict[object, Any] = {"range": [1, 2], "alpha": 1, key: 2}
    assert problems_of(SIDES | {"layers": [rule]}) == [("unknown-key", "$.layers[0]")]


def test_all_problems_of_a_recipe_are_reported_together() -> None:
    content = {
        "posttrained": "post",
        "restore": [[9, 8]],
        "alpha": 2,
        "layers": [{"range": [0, 1], "alpha": 1}, {"range": "all", "alpha": "x", "modules": [3]}],
        "tensors": [{"match": "a", "aplha": 1}],
        "dtype": "int8",
        "max_shard_size": "big",
        "shards": 1,
    }
    assert set(problems_of(content)) == {
        ("invalid-interval", "$.restore[0]"),
        ("invalid-alpha", "$.alpha"),
        ("invalid-interval", "$.layers[1].range"),
        ("invalid-alpha", "$.layers[1].alpha"),
        ("wrong-type", "$.layers[1].modules[0]"),
        ("missing-key", "$.tensors[0].alpha"),
        ("unknown-key", "$.tensors[0]"),
        ("invalid-choice", "$.dtype"),
        ("invalid-size", "$.max_shard_size"),
        ("unknown-key", "$"),
    }


@pytest.mark.parametrize("key", ["restore", "alpha", "dtype", "max_shard_size", "pretrained", "x" * 70])
def test_messages_stay_short_however_long_the_value(key: str) -> None:
    for value in ("9" * 5000, 16**5000, [[["x" * 500] * 500] * 500] * 500):
        with pytest.raises(RecipeError) as caught:
            recipe(**{key: value if key != "pretrained" else [value]})
        assert max(map(len, str(caught.value).splitlines())) < 400


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [
        ("5GB", 5 * 10**9),
        ("5 gb", 5 * 10**9),
        (" 500 MB ", 500 * 10**6),
        ("1.5GB", 1_500_000_000),
        ("2GiB", 2**31),
        ("3KiB", 3072),
        ("10KB", 10_000),
        ("1TiB", 2**40),
        ("100B", 100),
        ("100", 100),
        (100, 100),
        (2**60 + 1, 2**60 + 1),
        ("9007199254740993", 2**53 + 1),
    ],
)
def test_sizes_are_decimal_or_binary_and_exact(written: str | int, size_bytes: int) -> None:
    assert recipe(max_shard_size=written).max_shard_size == size_bytes


INTERVALS = st.tuples(st.integers(0, 99), st.integers(0, 99)).map(sorted)
ALPHAS = st.floats(0, 1) | st.integers(0, 1)
NAMES = st.text(min_size=1, max_size=9)
LAYER_RULES = st.fixed_dictionaries(
    {"range": INTERVALS, "alpha": ALPHAS}, optional={"modules": st.lists(NAMES, min_size=1, max_size=3)}
) | st.fixed_dictionaries({"range": st.just([2, 5]), "alpha": st.lists(ALPHAS, min_size=2, max_size=2)})
RECIPES = st.fixed_dictionaries(
    {"pretrained": NAMES, "posttrained": NAMES},
    optional={
        "restore": INTERVALS | st.lists(INTERVALS, min_size=1, max_size=3),
        "alpha": ALPHAS,
        "layers": st.lists(LAYER_RULES, min_size=1, max_size=3),
        "tensors": st.lists(st.fixed_dictionaries({"match": NAMES, "alpha": ALPHAS}), min_size=1, max_size=3),
        "dtype": st.sampled_from(["float64", "float32", "float16", "bfloat16"]),
        "max_shard_size": st.integers(1, 10**13) | st.integers(1, 999).map("{}MiB".format),
    },
)


@settings(deadline=None, max_examples=60)
@given(RECIPES)
def test_every_recipe_survives_being_written_and_read_again(content: dict[str, Any]) -> None:
    made = Recipe(**content)
    again = Recipe(**yaml.safe_load(yaml.safe_dump(made.to_dict())))
    assert again == made
    assert hash(again) == hash(made)
    assert again.to_dict() == made.to_dict()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.builds(pow, st.just(16), st.just(5000))  # too long for Python to print
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.binary(max_size=3)
    | st.sampled_from([object(), Path("x"), LayerRule(range=(1, 2), alpha=1), {1, 2}, "slerp", "5GB", [1, 2], 0.5]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["range", "alpha", "modules", "match", 1, None]), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.sampled_from(list(Recipe.model_fields)) | NAMES, VALUES, max_size=6))
def test_a_constructor_returns_or_raises_a_recipe_error(content: dict[str, Any]) -> None:
    for kind in (Recipe, Rules, LayerRule, TensorRule):
        with suppress(RecipeError):
            kind(**content)


# the schema


def test_the_packaged_schema_is_the_generated_one() -> None:
    assert generate_schema() == SCHEMA, "write generate_schema() to slrmerge/recipe/recipe.schema.json"


@settings(deadline=None, max_examples=60)
@given(RECIPES)
def test_the_schema_accepts_every_valid_recipe(content: dict[str, Any]) -> None:
    assert VALIDATOR.is_valid(content)
    assert VALIDATOR.is_valid(Recipe(**content).to_dict())


def test_the_schema_is_valid_and_describes_every_key() -> None:
    VALIDATOR.check_schema(SCHEMA)
    kinds = {Recipe: SCHEMA, LayerRule: SCHEMA["$defs"]["LayerRule"], TensorRule: SCHEMA["$defs"]["TensorRule"]}
    for kind, described in kinds.items():
        assert described["properties"].keys() == kind.model_fields.keys()
        assert all(entry.get("description") for entry in described["properties"].values())
        assert described["required"] == [name for name, each in kind.model_fields.items() if each.is_required()]
    assert SCHEMA["properties"]["blend"]["enum"] == list(BLEND_RULES)


@pytest.mark.parametrize("content", [content for content, _ in GOOD if "layers" not in content or content["layers"]])
def test_the_schema_accepts_valid_recipes(content: dict[str, Any]) -> None:
    VALIDATOR.validate(SIDES | content)


@pytest.mark.parametrize("content", [content for content, _ in BAD], ids=repr)
def test_the_schema_refuses_invalid_recipes(content: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(SIDES | content)


@pytest.mark.parametrize("content", [content for content, _ in BAD_BEYOND_A_SCHEMA], ids=lambda value: repr(value)[:60])
def test_the_schema_cannot_express_the_rest(content: dict[str, Any]) -> None:
    assert VALIDATOR.is_valid(SIDES | content)


# rules


@pytest.mark.parametrize(("content", "plain"), GOOD)
def test_the_rules_alone_are_without_sides_and_format(content: dict[str, Any], plain: dict[str, Any]) -> None:
    rules = {key: value for key, value in plain.items() if key in Rules.model_fields}
    assert recipe(**content).rules() == rules
    assert recipe(**content).has_rules == bool(rules)


def test_a_gradient_meets_its_ends_exactly() -> None:
    rule = LayerRule(range=(3, 9), alpha=(0.1, 0.7))
    assert (rule.alpha_at(3), rule.alpha_at(9)) == (0.1, 0.7)
    assert rule.alpha_at(6) == pytest.approx(0.4)
    assert LayerRule(range=(3, 9), alpha=0.3).alpha_at(4) == 0.3


def test_a_recipe_is_a_frozen_value_with_a_repr_of_one_line() -> None:
    made = recipe(restore=[2, 3])
    assert repr(made) == "Recipe(pretrained='pre', posttrained='post', restore=[2, 3])"
    assert len({made, recipe(restore=[[2, 3]]), recipe(restore=[2, 4])}) == 2
    with pytest.raises(ValueError, match="frozen"):
        made.alpha = 0.5


# folders and repositories


def test_relative_folders_count_from_the_recipes_folder(tmp_path: Path) -> None:
    made = recipe(pretrained="../pre", posttrained="/models/post").loaded_from(tmp_path / "recipe.yaml")
    assert made.source("pretrained") == tmp_path / "../pre"
    assert made.source("posttrained") == Path("/models/post")
    assert made.file == tmp_path / "recipe.yaml"
    assert made.place("$.alpha") == f"{made.file}: $.alpha"


def test_without_a_file_relative_folders_count_from_the_current_one() -> None:
    assert recipe().source("pretrained") == Path("pre")
    assert recipe().file is None
    assert recipe().place("$.alpha") == "recipe: $.alpha"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert recipe(pretrained="~/pre").source("pretrained") == tmp_path / "pre"


def test_a_hub_id_is_a_repository_at_its_revision() -> None:
    made = recipe(pretrained="meta-llama/Llama-3.1-8B", posttrained="google/gemma-2-9b@refs/pr/1")
    assert made.source("pretrained") == Repository("meta-llama/Llama-3.1-8B")
    assert made.source("posttrained") == Repository("google/gemma-2-9b", "refs/pr/1")


def test_an_existing_folder_takes_precedence_over_a_repository(tmp_path: Path) -> None:
    (tmp_path / "org/model").mkdir(parents=True)
    made = recipe(pretrained="org/model").loaded_from(tmp_path / "recipe.yaml")
    assert made.source("pretrained") == tmp_path / "org/model"


@pytest.mark.parametrize("written", ["./missing", "../missing", "/missing/model", "a/b/c", "missing"])
def test_a_missing_folder_is_not_taken_for_a_repository(tmp_path: Path, written: str) -> None:
    made = recipe(pretrained=written).loaded_from(tmp_path / "recipe.yaml")
    assert made.source("pretrained") == tmp_path / written


@pytest.mark.parametrize("written", ["org/model", "models/post", "/models/post", "post"])
def test_a_path_object_is_a_folder_never_a_repository(written: str) -> None:
    made = recipe(pretrained=Path(written))
    assert made.source("pretrained") == Path(written)
    assert Recipe(**made.to_dict()).source("pretrained") == Path(written)


@pytest.mark.parametrize("written", ["~unknown-user/x", "a" * 300, "a\0b"], ids=["home", "long", "null"])
def test_an_impossible_folder_is_refused(written: str) -> None:
    with pytest.raises(SlrmergeError):
        recipe(pretrained=written).open_pair()


def test_one_folder_cannot_be_both_sides(pair: Pair) -> None:
    (pair.folder / "link").symlink_to(pair.folder / "post")
    with refused(CheckpointError, "same-checkpoint"):
        pair.recipe(pretrained="./link").open_pair()


def test_open_pair_opens_both_sides(pair: Pair) -> None:
    opened = pair.recipe().open_pair()
    assert (opened.pretrained.folder, opened.posttrained.folder) == (pair.folder / "pre", pair.folder / "post")


# writing


def test_a_saved_recipe_finds_the_same_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("models/pre", "other"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    made = recipe(pretrained="models/pre", posttrained="/models/post", restore=[2, 3], blend="slerp")
    made.save("other/recipe.yaml")
    assert yaml.safe_load(Path("other/recipe.yaml").read_text()) == {
        "pretrained": "../models/pre",
        "posttrained": "/models/post",
        "restore": [2, 3],
        "blend": "slerp",
    }
    read = load_recipe("other/recipe.yaml")
    assert read.source("pretrained").resolve() == tmp_path / "models/pre"  # type: ignore[union-attr]
    assert read.rules() == made.rules()


def test_a_saved_recipe_keeps_repositories_and_home_folders(tmp_path: Path) -> None:
    recipe(pretrained="org/pre@v1", posttrained="~/post", alpha=0.5).save(tmp_path / "recipe.yaml")
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert written == {"pretrained": "org/pre@v1", "posttrained": "~/post", "alpha": 0.5}


def test_saving_where_nothing_can_be_written_raises_output_error(tmp_path: Path) -> None:
    with refused(OutputError, "io-error"):
        recipe(alpha=1).save(tmp_path / "missing" / "recipe.yaml")


def test_a_recipe_as_it_was_run_names_commits_and_relative_folders(tmp_path: Path) -> None:
    (tmp_path / "post").mkdir()
    made = recipe(pretrained="org/pre", posttrained="./post", restore=[2, 3]).loaded_from(tmp_path / "recipe.yaml")
    pair: Any = {"pretrained": SimpleNamespace(reference="org/pre@1234"), "posttrained": None}
    assert made.as_run(pair, tmp_path / "out") == {
        "pretrained": "org/pre@1234",
        "posttrained": "../post",
        "restore": [2, 3],
    }
