"""Recipes: every form that is accepted, every one that is refused, and what each refusal says."""

import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slrmerge.errors import RecipeError, SlrmergeError
from slrmerge.hub import open_pair
from slrmerge.recipe import LayerRule, Recipe, TensorRule, load_recipe, parse_recipe, recipe_schema
from slrmerge.repository import Repository
from slrmerge.structure import UNWRITTEN, keys_of
from slrmerge.written import MAX_BYTES

SIDES = {"pretrained": "pre", "posttrained": "post"}
KEYS = "pretrained, posttrained, restore, alpha, layers, tensors, dtype, blend, tokenizer, max_shard_size"
INTERVAL = "is not an interval; write [first, last], both ends count"
WEIGHT = "is not a weight; alpha is the pre-trained side's share, from 0 to 1"
SIZE = "is not a size; write a number with KB, MB, GB, KiB, MiB or GiB, such as 5GB"
DTYPES = "is not known; use 'float64', 'float32', 'float16' or 'bfloat16'"
NOTHING = "recipe: $: nothing to merge; give one of restore, alpha, layers, tensors"


def layer(**more: Any) -> dict[str, Any]:
    """A recipe with one sound layer rule, changed by `more`; a key set to `...` is left out."""
    rule = {"range": [1, 2], "alpha": 1, **more}
    return {"layers": [{key: value for key, value in rule.items() if value is not ...}]}


GOOD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"restore": [12, 17]}, {"restore": [[12, 17]]}),
    ({"restore": [3, 3]}, {"restore": [[3, 3]]}),
    ({"restore": [[3, 5], [12, 17]]}, {"restore": [[3, 5], [12, 17]]}),
    ({"restore": [[3, 5]]}, {"restore": [[3, 5]]}),
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

# what is refused, with every line of the refusal
BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({}, [NOTHING]),
    ({"restore": None}, [NOTHING]),
    ({"alpha": None}, [NOTHING]),
    ({"layers": []}, [NOTHING]),
    ({"tensors": []}, [NOTHING]),
    ({"restor": [1, 2]}, ["recipe: $: unknown key restor; did you mean restore?"]),
    ({"alpha": 1, "Dtype": "x"}, ["recipe: $: unknown key Dtype; did you mean dtype?"]),
    ({"alpha": 1, "slices": []}, [f"recipe: $: unknown key slices; known: {KEYS}"]),
    (layer(module=["x"]), ["recipe: $.layers[0]: unknown key module; did you mean modules?"]),
    (layer(weight=1), ["recipe: $.layers[0]: unknown key weight; known: range, alpha, modules"]),
    (
        {"tensors": [{"matches": "a", "alpha": 1}]},
        [
            "recipe: $.tensors[0].match: is missing; add it",
            "recipe: $.tensors[0]: unknown key matches; did you mean match?",
        ],
    ),
    (layer(range=...), ["recipe: $.layers[0].range: is missing; add it"]),
    (layer(alpha=...), ["recipe: $.layers[0].alpha: is missing; add it"]),
    ({"tensors": [{"match": "a"}]}, ["recipe: $.tensors[0].alpha: is missing; add it"]),
    # intervals
    ({"restore": []}, [f"recipe: $.restore: [] {INTERVAL}"]),
    ({"restore": [3]}, [f"recipe: $.restore: [3] {INTERVAL}"]),
    ({"restore": [1, 2, 3]}, [f"recipe: $.restore: [1, 2, 3] {INTERVAL}"]),
    ({"restore": 5}, [f"recipe: $.restore: 5 {INTERVAL}"]),
    ({"restore": "1-2"}, [f"recipe: $.restore: '1-2' {INTERVAL}"]),
    ({"restore": {"first": 1}}, [f"recipe: $.restore: {{'first': 1}} {INTERVAL}"]),
    ({"restore": [2, 1]}, ["recipe: $.restore: [2, 1] runs backwards; did you mean [1, 2]?"]),
    ({"restore": [-1, 2]}, ["recipe: $.restore: -1 is before the first layer; layers count from 0"]),
    ({"restore": [False, True]}, [f"recipe: $.restore: [False, True] {INTERVAL}"]),
    ({"restore": [1.5, 2]}, [f"recipe: $.restore: [1.5, 2] {INTERVAL}"]),
    ({"restore": [1.0, 2]}, [f"recipe: $.restore: [1.0, 2] {INTERVAL}"]),
    ({"restore": ["1", "2"]}, [f"recipe: $.restore: ['1', '2'] {INTERVAL}"]),
    ({"restore": [None, 2]}, [f"recipe: $.restore: [None, 2] {INTERVAL}"]),
    ({"restore": [[]]}, [f"recipe: $.restore[0]: [] {INTERVAL}"]),
    ({"restore": [[1, 2], 3]}, [f"recipe: $.restore[1]: 3 {INTERVAL}"]),
    ({"restore": [[[1, 2]]]}, [f"recipe: $.restore[0]: [[1, 2]] {INTERVAL}"]),
    (
        {"restore": [[1, 2], [4, 3], [-1, 0]]},
        [
            "recipe: $.restore[1]: [4, 3] runs backwards; did you mean [3, 4]?",
            "recipe: $.restore[2]: -1 is before the first layer; layers count from 0",
        ],
    ),
    (layer(range=[2, 1]), ["recipe: $.layers[0].range: [2, 1] runs backwards; did you mean [1, 2]?"]),
    (layer(range=[[1, 2]]), [f"recipe: $.layers[0].range: [[1, 2]] {INTERVAL}"]),
    (layer(range=None), [f"recipe: $.layers[0].range: None {INTERVAL}"]),
    # weights
    ({"alpha": True}, [f"recipe: $.alpha: True {WEIGHT}"]),
    ({"alpha": float("nan")}, [f"recipe: $.alpha: nan {WEIGHT}"]),
    ({"alpha": float("inf")}, [f"recipe: $.alpha: inf {WEIGHT}"]),
    ({"alpha": -0.1}, [f"recipe: $.alpha: -0.1 {WEIGHT}"]),
    ({"alpha": 1.1}, [f"recipe: $.alpha: 1.1 {WEIGHT}"]),
    ({"alpha": "0.5"}, [f"recipe: $.alpha: '0.5' {WEIGHT}"]),
    ({"alpha": [0, 1]}, [f"recipe: $.alpha: [0, 1] {WEIGHT}"]),
    (layer(alpha=False), [f"recipe: $.layers[0].alpha: False {WEIGHT}"]),
    (layer(alpha=None), [f"recipe: $.layers[0].alpha: None {WEIGHT}"]),
    (layer(alpha=[0, 2]), [f"recipe: $.layers[0].alpha: 2 {WEIGHT}"]),
    (
        layer(alpha=[0.5]),
        ["recipe: $.layers[0].alpha: [0.5] is not a gradient; write [alpha of the first layer, alpha of the last]"],
    ),
    (
        layer(range=[3, 3], alpha=[1, 0]),
        ["recipe: $.layers[0]: a gradient over the single layer 3 has no slope; write one alpha"],
    ),
    ({"tensors": [{"match": "a", "alpha": [0, 1]}]}, [f"recipe: $.tensors[0].alpha: [0, 1] {WEIGHT}"]),
    # lists and names
    ({"layers": {}}, ["recipe: $.layers: {} is not valid; write a list"]),
    ({"layers": "all"}, ["recipe: $.layers: 'all' is not valid; write a list"]),
    ({"alpha": 1, "layers": None}, ["recipe: $.layers: None is not valid; write a list"]),
    ({"layers": [1]}, ["recipe: $.layers[0]: 1 is not valid; write a map of keys to values"]),
    ({"layers": [None]}, ["recipe: $.layers[0]: None is not valid; write a map of keys to values"]),
    (layer(modules="self_attn"), ["recipe: $.layers[0].modules: 'self_attn' is not valid; write a list"]),
    (layer(modules=None), ["recipe: $.layers[0].modules: None is not valid; write a list"]),
    (layer(modules=[]), ["recipe: $.layers[0].modules: [] is not valid; give at least one"]),
    (layer(modules=[""]), ["recipe: $.layers[0].modules[0]: '' is not valid; it cannot be empty"]),
    (layer(modules=["a", 1]), ["recipe: $.layers[0].modules[1]: 1 is not valid; write a text"]),
    ({"tensors": [{"match": "", "alpha": 1}]}, ["recipe: $.tensors[0].match: '' is not valid; it cannot be empty"]),
    ({"tensors": [{"match": 7, "alpha": 1}]}, ["recipe: $.tensors[0].match: 7 is not valid; write a text"]),
    ({"alpha": 1, "pretrained": ""}, ["recipe: $.pretrained: '' is not valid; it cannot be empty"]),
    ({"alpha": 1, "pretrained": None}, ["recipe: $.pretrained: None is not valid; write a text"]),
    ({"alpha": 1, "posttrained": ["post"]}, ["recipe: $.posttrained: ['post'] is not valid; write a text"]),
    # dtypes and sizes
    ({"alpha": 1, "dtype": "bf16"}, [f"recipe: $.dtype: 'bf16' {DTYPES}"]),
    ({"alpha": 1, "dtype": 16}, [f"recipe: $.dtype: 16 {DTYPES}"]),
    ({"alpha": 1, "blend": "nlerp"}, ["recipe: $.blend: 'nlerp' is not known; use 'linear' or 'slerp'"]),
    ({"alpha": 1, "blend": None}, ["recipe: $.blend: None is not known; use 'linear' or 'slerp'"]),
    (
        {"alpha": 1, "tokenizer": "pre"},
        ["recipe: $.tokenizer: 'pre' is not known; use 'pretrained' or 'posttrained'"],
    ),
    ({"blend": "slerp", "tokenizer": "pretrained"}, [NOTHING]),
    ({"alpha": 1, "max_shard_size": "five"}, [f"recipe: $.max_shard_size: 'five' {SIZE}"]),
    ({"alpha": 1, "max_shard_size": "5 potatoes"}, [f"recipe: $.max_shard_size: '5 potatoes' {SIZE}"]),
    ({"alpha": 1, "max_shard_size": "5iB"}, [f"recipe: $.max_shard_size: '5iB' {SIZE}"]),
    ({"alpha": 1, "max_shard_size": ""}, [f"recipe: $.max_shard_size: '' {SIZE}"]),
    ({"alpha": 1, "max_shard_size": True}, [f"recipe: $.max_shard_size: True {SIZE}"]),
    ({"alpha": 1, "max_shard_size": None}, [f"recipe: $.max_shard_size: None {SIZE}"]),
    ({"alpha": 1, "max_shard_size": 1.5}, [f"recipe: $.max_shard_size: 1.5 {SIZE}"]),
    ({"alpha": 1, "max_shard_size": -1}, [f"recipe: $.max_shard_size: -1 {SIZE}"]),
    ({"alpha": 1, "max_shard_size": 0}, ["recipe: $.max_shard_size: 0 is no room for a tensor; the usual size is 5GB"]),
    (
        {"alpha": 1, "max_shard_size": "0GB"},
        ["recipe: $.max_shard_size: '0GB' is no room for a tensor; the usual size is 5GB"],
    ),
]

BEYOND_A_SCHEMA = (
    "nothing to merge",  # a key may be there and say nothing
    "runs backwards",  # a schema compares no two values
    "has no slope",
    "[1.0, 2] is not an interval",  # to a schema 1.0 is an integer
    "nan is not a weight",  # not JSON at all
    "is not a size",  # the grammar of sizes is left to the parser
    "is no room for a tensor",
)
"""What the JSON Schema lets pass though a recipe must not say it."""


def said(content: Mapping[Any, Any]) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(content)
    return str(caught.value).splitlines()


def recipe_file(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def said_of_file(path: Path, **overrides: object) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, **overrides)
    return str(caught.value)


@pytest.mark.parametrize(("content", "plain"), GOOD)
def test_a_good_recipe_is_read_and_written_back(content: dict[str, Any], plain: dict[str, Any]) -> None:
    recipe = parse_recipe(SIDES | content)
    assert recipe.to_dict() == SIDES | plain
    assert parse_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize(("content", "lines"), BAD)
def test_a_bad_recipe_is_refused_with_its_place_and_a_remedy(content: dict[str, Any], lines: list[str]) -> None:
    assert said(SIDES | content) == lines


def test_missing_sides_are_named_together_with_the_missing_work() -> None:
    assert said({}) == [
        "recipe: $.pretrained: is missing; add it",
        "recipe: $.posttrained: is missing; add it",
        NOTHING,
    ]


def test_a_key_that_is_no_text_is_an_unknown_key_at_every_level() -> None:
    assert said(SIDES | {"alpha": 1, 1: 2}) == [f"recipe: $: unknown key 1; known: {KEYS}"]
    rule: dict[object, Any] = {"range": [1, 2], "alpha": 1, 1: 2}
    assert said(SIDES | {"layers": [rule]}) == ["recipe: $.layers[0]: unknown key 1; known: range, alpha, modules"]


def test_all_problems_of_a_recipe_come_in_one_go() -> None:
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
    assert {line.partition(": ")[2].partition(": ")[0] for line in said(content)} == {
        "$.pretrained",
        "$.restore[0]",
        "$.alpha",
        "$.layers[1].range",
        "$.layers[1].alpha",
        "$.layers[1].modules[0]",
        "$.tensors[0].alpha",
        "$.tensors[0]",
        "$.dtype",
        "$.max_shard_size",
        "$",
    }


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
    assert parse_recipe(SIDES | {"alpha": 1, "max_shard_size": written}).max_shard_size == size_bytes


def test_an_absurdly_long_size_is_refused_shortly() -> None:
    (line,) = said(SIDES | {"alpha": 1, "max_shard_size": "9" * 400 + "GB"})
    assert line.startswith("recipe: $.max_shard_size: '9999")
    assert line.endswith(SIZE)
    assert len(line) < 200


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
).filter(lambda content: bool({"restore", "alpha", "layers", "tensors"} & content.keys()))


@settings(deadline=None, max_examples=60)
@given(RECIPES)
def test_every_recipe_survives_being_written_and_read_again(content: dict[str, Any]) -> None:
    recipe = parse_recipe(content)
    assert parse_recipe(recipe.to_dict()) == recipe
    assert parse_recipe(recipe.to_dict()).to_dict() == recipe.to_dict()


@settings(deadline=None, max_examples=60)
@given(RECIPES)
def test_the_schema_accepts_whatever_a_recipe_may_say(content: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(recipe_schema())
    assert validator.is_valid(content)
    assert validator.is_valid(parse_recipe(content).to_dict())


def test_the_schema_is_sound_and_describes_every_key() -> None:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    kinds = {Recipe: schema, LayerRule: schema["$defs"]["LayerRule"], TensorRule: schema["$defs"]["TensorRule"]}
    for kind, described in kinds.items():
        properties = described["properties"]
        assert list(properties) == keys_of(kind)
        assert all(entry.get("description") for entry in properties.values()), properties
        assert described["required"] == [
            each.name for each in fields(kind) if each.default is MISSING and each.metadata != UNWRITTEN
        ]


@pytest.mark.parametrize("content", [content for content, _ in GOOD])
def test_the_schema_accepts_good_recipes(content: dict[str, Any]) -> None:
    jsonschema.validate(SIDES | content, recipe_schema(), jsonschema.Draft202012Validator)


@pytest.mark.parametrize(("content", "lines"), BAD)
def test_the_schema_refuses_bad_recipes_but_for_what_it_cannot_say(content: dict[str, Any], lines: list[str]) -> None:
    accepted = jsonschema.Draft202012Validator(recipe_schema()).is_valid(SIDES | content)
    assert not accepted or any(word in lines[0] for word in BEYOND_A_SCHEMA)


# files


def test_a_recipe_file_is_read_with_comments_and_an_optional_byte_order_mark(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "\ufeff# mine\npretrained: ./pre  # α\nposttrained: ./post\nrestore: [1, 2]\n")
    assert load_recipe(path).to_dict() == {"pretrained": "./pre", "posttrained": "./post", "restore": [[1, 2]]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a map of keys to values; start with `pretrained: FOLDER`"),
        ("# nothing\n", "is not a map of keys to values; start with `pretrained: FOLDER`"),
        ("- pretrained: a\n", "is not a map of keys to values; start with `pretrained: FOLDER`"),
        ("llama", "is not a map of keys to values; start with `pretrained: FOLDER`"),
        ("alpha: 1\nalpha: 0\n", "is not sound YAML: line 2, column 1: the key alpha stands twice"),
        (
            "layers: [{range: [0, 1], alpha: 1, alpha: 0}]",
            "is not sound YAML: line 1, column 36: the key alpha stands twice",
        ),
        (
            "layers:\n\t- 1\n",
            "is not sound YAML: line 2, column 1: found character '\\t' that cannot start any token",
        ),
        ("alpha: [1\n", "is not sound YAML: line 2, column 1: expected ',' or ']', but got '<stream end>'"),
        ("alpha: *soup\n", "is not sound YAML: line 1, column 8: *soup: aliases are not read in recipes"),
        ("alpha: 1\n---\nalpha: 0\n", "is not sound YAML: line 2, column 1: but found another document"),
        (
            "alpha: !!python/object:os.system {}\n",
            (
                "is not sound YAML: line 1, column 8: could not determine a constructor for the tag "
                "'tag:yaml.org,2002:python/object:os.system'"
            ),
        ),
        (
            "alpha: \x01\n",
            (
                "is not sound YAML: unacceptable character #x0001: special characters are not allowed in "
                '"<unicode string>", position 7'
            ),
        ),
        (b"alpha: \xe9\n", "is not UTF-8 text (byte 7)"),
        ("alpha: 1\n".encode("utf-16"), "is not UTF-8 text (byte 0)"),
        ("alpha: " + "[" * 1500 + "]" * 1500, "is nested too deeply"),
        ("alpha: " + "{a: " * 1500 + "}" * 1500, "is nested too deeply"),
        (b"#" * (MAX_BYTES + 1), "is 1,000,001 bytes long, which no recipe is"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = recipe_file(tmp_path, text)
    assert said_of_file(path) == f"{path}: {message}"


@pytest.mark.parametrize(
    "value",
    ["2020-13-45", "!!int ''", "!!float abc", "!!timestamp soon", "!!bool maybe", "9" * 5000],
    ids=lambda value: value[:20],
)
def test_a_value_that_yaml_itself_cannot_make_is_refused_not_a_crash(tmp_path: Path, value: str) -> None:
    path = recipe_file(tmp_path, f"pretrained: a\nposttrained: b\nalpha: {value}\n")
    message = said_of_file(path)
    assert message.startswith(f"{path}: is not sound YAML: ")
    assert len(message) < 400 + len(str(path))


def test_deep_nesting_that_yaml_can_read_is_shown_shortly(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "pretrained: a\nposttrained: b\nalpha: " + "[" * 150 + "]" * 150)
    message = said_of_file(path)
    assert message.startswith(f"{path}: $.alpha: [[")
    assert len(message) < 200 + len(str(path))


def test_a_recipe_file_that_is_missing_or_a_folder_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert said_of_file(missing) == f"{missing}: cannot be read (No such file or directory); name a recipe file"
    assert said_of_file(tmp_path) == f"{tmp_path}: cannot be read (Is a directory); name a recipe file"


def test_a_huge_file_is_refused_without_reading_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.truncate(64 << 20)
    tracemalloc.start()
    try:
        assert said_of_file(path) == f"{path}: is 67,108,864 bytes long, which no recipe is"
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def laughs(levels: int) -> str:
    """The billion laughs: `levels` lists of ten aliases each, the last named `xN`."""
    lines = ["x0: &x0 [" + ", ".join(["lol"] * 10) + "]"]
    lines += [f"x{n}: &x{n} [" + ", ".join([f"*x{n - 1}"] * 10) + "]" for n in range(1, levels)]
    return "\n".join([*lines, ""])


@pytest.mark.parametrize(
    "use",
    [
        "restore: *x5",
        "alpha: *x5",
        "layers: *x5",
        "tensors: *x5",
        "dtype: *x5",
        "max_shard_size: *x5",
        "layers: [{range: *x5, alpha: *x5, modules: *x5}]",
        "tensors: [{match: *x5, alpha: *x5}]",
        "pretrained: *x5",
    ],
)
def test_billion_laughs_get_a_short_answer(tmp_path: Path, use: str) -> None:
    sides = "posttrained: b\n" + ("" if use.startswith("pretrained") else "pretrained: a\n")
    message = said_of_file(recipe_file(tmp_path, laughs(6) + sides + use))
    assert max(map(len, message.splitlines())) < 500


@pytest.mark.parametrize(
    "text",
    [
        laughs(11) + "max_shard_size: *x10\n",
        laughs(11) + "? *x10\n: 1\n",
        "x0: &x0 {a: 1}\n" + "".join(f"x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 10)}]}}\n" for n in range(1, 11)),
    ],
    ids=["value", "key", "merge keys"],
)
def test_billion_laughs_take_neither_time_nor_memory(tmp_path: Path, text: str) -> None:
    path = recipe_file(tmp_path, text)
    code = (
        "import resource, sys, pathlib; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from slrmerge.recipe import load_recipe, RecipeError\n"
        "try: load_recipe(pathlib.Path(sys.argv[1]))\n"
        "except RecipeError as error: print(len(str(error)) < 5000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=8)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_overrides_replace_top_level_keys_and_none_leaves_them(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "pretrained: a\nposttrained: b\nalpha: 1\ndtype: float32\nmax_shard_size: 1MB\n")
    recipe = load_recipe(path, dtype="float16", max_shard_size=None)
    assert (recipe.dtype, recipe.max_shard_size) == ("float16", 1_000_000)
    assert load_recipe(path, max_shard_size="2KiB").max_shard_size == 2048


def test_a_bad_override_is_refused_like_a_bad_recipe(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "pretrained: a\nposttrained: b\nalpha: 1\n")
    assert said_of_file(path, dtype="int8") == f"{path}: $.dtype: 'int8' {DTYPES}"


# folders


def test_relative_folders_count_from_the_recipes_folder(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "pretrained: ../pre\nposttrained: /models/post\nalpha: 1\n")
    assert load_recipe(path).sources() == (tmp_path / "../pre", Path("/models/post"))


def test_without_a_file_relative_folders_count_from_here() -> None:
    assert parse_recipe(SIDES | {"alpha": 1}).sources() == (Path("pre"), Path("post"))


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = parse_recipe({"pretrained": "~/pre", "posttrained": "post", "alpha": 1})
    assert recipe.source("pretrained") == tmp_path / "pre"


def test_a_hub_id_is_a_repository_at_its_revision(tmp_path: Path) -> None:
    path = recipe_file(
        tmp_path, "pretrained: meta-llama/Llama-3.1-8B\nposttrained: google/gemma-2-9b@refs/pr/1\nalpha: 1\n"
    )
    pretrained, posttrained = Repository("meta-llama/Llama-3.1-8B"), Repository("google/gemma-2-9b", "refs/pr/1")
    recipe = load_recipe(path)
    assert recipe.sources() == (pretrained, posttrained)
    assert (recipe.source("pretrained"), recipe.source("posttrained")) == (pretrained, posttrained)


def test_a_folder_and_a_repository_may_be_the_two_sides(tmp_path: Path) -> None:
    (tmp_path / "post").mkdir()
    path = recipe_file(tmp_path, "pretrained: org/base\nposttrained: ./post\nalpha: 1\n")
    assert load_recipe(path).sources() == (Repository("org/base"), tmp_path / "post")


@pytest.mark.parametrize("written", ["org/model", "org/model@main", "org/model@refs/pr/1"])
def test_one_repository_cannot_be_both_sides(tmp_path: Path, written: str) -> None:
    path = recipe_file(tmp_path, f"pretrained: {written}\nposttrained: {written}\nalpha: 1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path).sources()
    assert str(caught.value) == (
        f"{path}: $.pretrained: is the same repository as posttrained; "
        "name the checkpoint that the other was trained from"
    )


def test_two_revisions_of_one_repository_may_be_the_two_sides() -> None:
    recipe = parse_recipe({"pretrained": "org/model@v1", "posttrained": "org/model", "alpha": 1})
    assert recipe.sources() == (Repository("org/model", "v1"), Repository("org/model"))


def test_a_folder_that_looks_like_a_hub_id_is_that_folder(tmp_path: Path) -> None:
    (tmp_path / "org/model").mkdir(parents=True)
    path = recipe_file(tmp_path, "pretrained: org/model\nposttrained: post\nalpha: 1\n")
    assert load_recipe(path).source("pretrained") == tmp_path / "org/model"


@pytest.mark.parametrize("written", ["./missing", "../missing", "/missing/model", "a/b/c", "missing"])
def test_a_missing_folder_is_not_taken_for_a_hub_id(tmp_path: Path, written: str) -> None:
    path = recipe_file(tmp_path, f"pretrained: {written}\nposttrained: post\nalpha: 1\n")
    assert load_recipe(path).source("pretrained") == tmp_path / written


@pytest.mark.parametrize("written", ["~nobody-of-that-name/x", "a" * 300], ids=["home", "long"])
def test_a_folder_that_cannot_be_is_refused_not_a_crash(written: str) -> None:
    recipe: Recipe = parse_recipe({"pretrained": written, "posttrained": "post", "alpha": 1})
    with pytest.raises(SlrmergeError):
        open_pair(*recipe.sources())


def test_one_folder_cannot_be_both_sides(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    recipe = load_recipe(recipe_file(tmp_path, "pretrained: ./a\nposttrained: ./link\nalpha: 0.5\n"))
    with pytest.raises(RecipeError) as caught:
        recipe.sources()
    assert str(caught.value).endswith(
        "$.pretrained: is the same folder as posttrained; name the checkpoint that the other was trained from"
    )


@pytest.mark.parametrize("rule", ["alpha: 0x{f}", "restore: [1, 0x{f}]"])
def test_a_number_past_all_sense_is_refused_not_a_crash(tmp_path: Path, rule: str) -> None:
    text = f"pretrained: a\nposttrained: b\n{rule.format(f='f' * 5000)}\n"
    assert "a number of more than 64 bits" in said_of_file(recipe_file(tmp_path, text))
