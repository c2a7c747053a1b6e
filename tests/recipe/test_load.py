"""Recipes from files and from what callers pass."""

import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slrmerge.errors import OptionError, RecipeError
from slrmerge.recipe.load import as_recipe, load_recipe, require_rules
from slrmerge.recipe.mergekit.recipe import MergekitRecipe
from slrmerge.recipe.model import Recipe
from tests.problems import refused

SIDES = {"pretrained": "a", "posttrained": "b"}
CONFIG = {"merge_method": "linear", "models": [{"model": name, "parameters": {"weight": 1}} for name in "ab"]}


def recipe_file(folder: Path, text: str | bytes) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_recipe_file_is_read_with_comments_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "\ufeff# mine\npretrained: ./pre  # α\nposttrained: ./post\nrestore: [1, 2]\n")
    recipe = load_recipe(path)
    assert recipe.to_dict() == {"pretrained": "./pre", "posttrained": "./post", "restore": [1, 2]}
    assert recipe.file == path


def test_anchors_and_merge_keys_are_read(tmp_path: Path) -> None:
    rules = "layers:\n- &first {range: [0, 1], alpha: &half 0.5}\n- {<<: *first, range: [4, 5]}\nalpha: *half\n"
    assert load_recipe(recipe_file(tmp_path, f"pretrained: a\nposttrained: b\n{rules}")).rules() == {
        "alpha": 0.5,
        "layers": [{"range": [0, 1], "alpha": 0.5}, {"range": [4, 5], "alpha": 0.5}],
    }


@pytest.mark.parametrize("convert", [str, Path])
def test_a_path_may_be_text(tmp_path: Path, convert: type[str | Path]) -> None:
    path = recipe_file(tmp_path, "pretrained: a\nposttrained: b\n")
    assert load_recipe(convert(path)) == as_recipe(convert(path))
    assert load_recipe(convert(path)).file == path


def test_problems_name_the_file_and_the_place(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "pretrained: a\nposttrained: b\nalpha: 2\nlayers: [{range: [1, 0], alpha: 1}]\n")
    with refused(RecipeError, "invalid-alpha", "invalid-interval") as caught:
        load_recipe(path)
    assert [problem.where for problem in caught.value.problems] == [f"{path}: $.alpha", f"{path}: $.layers[0].range"]


def test_deep_nesting_is_shown_briefly(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "pretrained: a\nposttrained: b\nalpha: " + "[" * 100 + "]" * 100)
    with refused(RecipeError, "invalid-alpha") as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 200 + len(str(path))


@pytest.mark.parametrize("name", ["none.yaml", ".", "a\0b", "x" * 300])
def test_a_recipe_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with refused(RecipeError, "recipe-unreadable") as caught:
        load_recipe(tmp_path / name)
    assert caught.value.problems[0].where == str(tmp_path / name)


def test_a_huge_file_is_refused_without_reading_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.truncate(64 << 20)
    tracemalloc.start()
    try:
        with refused(RecipeError, "recipe-too-large"):
            load_recipe(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rule", ["alpha: 0x{f}", "restore: [1, 0x{f}]"])
def test_a_number_too_long_to_print_is_refused(tmp_path: Path, rule: str) -> None:
    text = f"pretrained: a\nposttrained: b\n{rule.format(f='f' * 5000)}\n"
    with pytest.raises(RecipeError):
        load_recipe(recipe_file(tmp_path, text))


def laughs(levels: int) -> str:
    """The billion laughs: `levels` lists of ten aliases each, the last named `xN`."""
    lines = ["x0: &x0 [" + ", ".join(["lol"] * 10) + "]"]
    lines += [f"x{n}: &x{n} [" + ", ".join([f"*x{n - 1}"] * 10) + "]" for n in range(1, levels)]
    return "\n".join([*lines, ""])


@pytest.mark.parametrize(
    "use",
    [
        "restore: *x3",
        "alpha: *x3",
        "layers: *x3",
        "tensors: *x3",
        "dtype: *x3",
        "max_shard_size: *x3",
        "layers: [{range: *x3, alpha: *x3, modules: *x3}]",
        "tensors: [{match: *x3, alpha: *x3}]",
        "pretrained: *x3",
    ],
)
def test_a_value_of_many_aliases_is_shown_briefly(tmp_path: Path, use: str) -> None:
    sides = "posttrained: b\n" + ("" if use.startswith("pretrained") else "pretrained: a\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file(tmp_path, laughs(4) + sides + use))
    assert max(map(len, str(caught.value).splitlines())) < 500


@pytest.mark.parametrize(
    "text",
    [
        laughs(11) + "max_shard_size: *x10\n",
        laughs(11) + "? *x10\n: 1\n",
        "x0: &x0 {a: 1}\n" + "".join(f"x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 10)}]}}\n" for n in range(1, 11)),
    ],
    ids=["value", "key", "merge keys"],
)
def test_billion_laughs_are_refused_with_little_memory(tmp_path: Path, text: str) -> None:
    path = recipe_file(tmp_path, text)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from slrmerge.recipe.load import load_recipe, RecipeError\n"
        "try: load_recipe(sys.argv[1])\n"
        "except RecipeError as error: print([problem.code for problem in error.problems])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("['invalid-yaml']\n", "")


# overrides


def test_overrides_replace_top_level_keys_and_none_does_not(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "pretrained: a\nposttrained: b\nalpha: 1\ndtype: float32\nmax_shard_size: 1MB\n")
    recipe = load_recipe(path, dtype="float16", max_shard_size=None)
    assert (recipe.dtype, recipe.max_shard_size) == ("float16", 1_000_000)
    assert load_recipe(path, max_shard_size="2KiB").max_shard_size == 2048


def test_an_override_may_repair_a_recipe(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "pretrained: a\nposttrained: b\ndtype: int8\n")
    assert load_recipe(path, dtype="float16").dtype == "float16"


@pytest.mark.parametrize(
    ("overrides", "code", "place"),
    [({"dtype": "int8"}, "invalid-choice", "$.dtype"), ({"dtpye": "float32"}, "unknown-key", "$")],
)
def test_an_invalid_override_is_refused(tmp_path: Path, overrides: dict[str, str], code: str, place: str) -> None:
    path = recipe_file(tmp_path, "pretrained: a\nposttrained: b\nalpha: 1\n")
    with refused(RecipeError, code) as caught:
        load_recipe(path, **overrides)
    assert caught.value.problems[0].where == f"{path}: {place}"


# what callers pass


def test_a_recipe_a_dict_and_a_selection_are_recipes(tmp_path: Path) -> None:
    recipe = Recipe(**SIDES, restore=[2, 3])
    assert as_recipe(recipe) is recipe
    assert as_recipe(SIDES | {"restore": [2, 3]}) == recipe
    selection: Any = SimpleNamespace(recipe=recipe)
    assert as_recipe(selection) is recipe


def test_a_mapping_with_a_merge_method_is_a_mergekit_config(tmp_path: Path) -> None:
    made = as_recipe(CONFIG)
    assert isinstance(made, MergekitRecipe)
    assert as_recipe(made) is made
    path = recipe_file(tmp_path, str(CONFIG))
    read = load_recipe(path, dtype="float16")
    assert (type(read), read.file, read.dtype) == (MergekitRecipe, path, "float16")
    with refused(RecipeError, "missing-key", "unknown-key"):
        as_recipe({"models": CONFIG["models"]})


@pytest.mark.parametrize(
    "value", [None, 5, b"recipe.yaml", [("pretrained", "a")], object()], ids=lambda value: type(value).__name__
)
def test_anything_else_is_refused(value: Any) -> None:
    with refused(OptionError, "wrong-type"):
        as_recipe(value)


def test_a_recipe_without_rules_is_valid_until_something_is_to_be_merged() -> None:
    for recipe in (Recipe(**SIDES), Recipe(**SIDES, layers=[], dtype="float32")):
        with refused(RecipeError, "nothing-to-merge") as caught:
            require_rules(recipe)
        assert caught.value.problems[0].where == "recipe: $"
    require_rules(Recipe(**SIDES, alpha=0))
    require_rules(as_recipe(CONFIG))
