"""The Python API: what a user of transformers, mergekit or pandas would type."""

import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import slrmerge as slr
from slrmerge import errors
from slrmerge.checkpoint.header import TensorInfo
from slrmerge.errors import (
    CheckpointError,
    OptionError,
    OutputError,
    PlanError,
    Problem,
    RecipeError,
    SlrmergeError,
    VerificationError,
)
from tests.checkpoints import read_back
from tests.conftest import Pair
from tests.problems import refused

ERRORS: list[type[SlrmergeError]] = [
    value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, SlrmergeError)
]


def test_merge_by_a_dict_writes_a_checkpoint_that_verifies(pair: Pair) -> None:
    folders = {"pretrained": str(pair.folder / "pre"), "posttrained": str(pair.folder / "post")}
    result = slr.merge({**folders, "restore": [2, 3]}, out=str(pair.out))
    assert isinstance(result, slr.MergeResult)
    assert slr.verify(str(result.folder)).against_sources
    assert read_back(pair.out).keys() == pair.post.keys()


SIMPLE = [
    (name, parameter)
    for name in slr.__all__
    if inspect.isfunction(function := getattr(slr, name))
    for parameter, kind in get_type_hints(function).items()
    if kind in (bool, slr.Progress | None)
]


@pytest.mark.parametrize(("name", "parameter"), SIMPLE)
def test_arguments_of_the_wrong_type_are_option_errors(name: str, parameter: str) -> None:
    function = getattr(slr, name)
    required = [each for each in inspect.signature(function).parameters.values() if each.default is each.empty]
    with refused(OptionError, "wrong-type") as caught:
        function(*("nothing" for each in required), **{parameter: print})
    assert caught.value.problems[0].where == parameter


def test_a_pair_of_paths_a_plan_as_recipe_and_options_in_a_dict_are_option_errors(pair: Pair) -> None:
    plan: Any = slr.plan(pair.recipe_file(restore=[2, 3]))
    folders: Any = (pair.folder / "pre", pair.folder / "post")
    options: Any = {"overwrite": True}
    attempts: dict[str, Callable[[], object]] = {
        "pretrained": lambda: slr.ModelPair(*folders),
        "recipe": lambda: slr.merge(plan, pair.out),
        "options": lambda: slr.execute(plan, pair.out, options=options),
    }
    for where, attempt in attempts.items():
        with refused(OptionError, "wrong-type") as caught:
            attempt()
        assert caught.value.problems[0].where == where
    with refused(OptionError, "invalid-choice"):
        slr.plan(pair.recipe_file(restore=[2, 3]), output="gguf")


def test_merge_accepts_recipe_path_dict_and_anything_with_a_recipe(pair: Pair) -> None:
    class Selected:
        recipe = pair.recipe(restore=[2, 3])

    content = {"pretrained": str(pair.folder / "pre"), "posttrained": str(pair.folder / "post"), "restore": [2, 3]}
    ways: list[Any] = [
        pair.recipe_file(restore=[2, 3]),
        str(pair.recipe_file(restore=[2, 3])),
        pair.recipe(restore=[2, 3]),
    ]
    ways += [content, slr.Recipe(**content), Selected()]
    written = [slr.merge(way, out=pair.folder / "out" / str(number)).files for number, way in enumerate(ways)]
    weights = [tuple(files[path.name] for path in (pair.folder / "post").glob("*.safetensors")) for files in written]
    assert len(set(weights)) == 1


def test_merge_step_by_step_gives_the_same_files(pair: Pair) -> None:
    opened = slr.open_pair(pair.folder / "pre", str(pair.folder / "post"))
    folders = {"pretrained": str(pair.folder / "pre"), "posttrained": str(pair.folder / "post")}
    recipe = slr.Recipe(**folders, restore=[2, 3])
    plan = slr.plan(recipe, opened)
    assert isinstance(opened, slr.ModelPair)
    assert isinstance(plan, slr.MergePlan)
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    result = slr.execute(again, pair.out)
    assert slr.merge(recipe, pair.folder / "again" / pair.out.name, pair=opened).files == result.files


def test_relative_folders_of_a_recipe_without_a_file_count_from_the_current_folder(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pair.folder)
    slr.merge(slr.Recipe(pretrained="pre", posttrained="post", restore=[2, 3]), "models/hybrid")
    assert "pretrained: ../../pre\n" in (pair.folder / "models/hybrid/slrmerge.yaml").read_text()
    assert slr.verify("models/hybrid").against_sources


def test_a_checkpoint_is_a_mapping_of_tensors(pair: Pair) -> None:
    checkpoint = slr.open_checkpoint(pair.folder / "post")
    assert list(checkpoint) == [*pair.post]
    assert len(checkpoint) == len(pair.post)
    assert "lm_head.weight" in checkpoint
    assert isinstance(dict(checkpoint)["lm_head.weight"], TensorInfo)


def test_diff_gives_a_table(pair: Pair) -> None:
    found = slr.diff(pair.open())
    assert slr.diff(pair.recipe_file()).to_rows() == found.to_rows()
    table = found.to_pandas()
    assert list(table.columns) == ["layer", "module", "parameters", "relative_change", "cosine"]
    assert len(table) == len(found.by_module)


@pytest.mark.parametrize(
    "make",
    [
        lambda pair: pair.open(),
        lambda pair: pair.open().pretrained,
        lambda pair: pair.plan(restore=[2, 3]),
        lambda pair: pair.recipe(restore=[2, 3]),
        lambda pair: pair.recipe(restore=[2, 3]).resolve(pair.open()).alphas,
        lambda pair: slr.merge(pair.recipe(restore=[2, 3]), pair.out),
        lambda pair: slr.verify(slr.merge(pair.recipe(restore=[2, 3]), pair.out).folder),
        lambda pair: slr.diff(pair.open()),
    ],
)
def test_repr_is_one_short_line(pair: Pair, make: Callable[[Pair], object]) -> None:
    text = repr(make(pair))
    assert "\n" not in text
    assert len(text) < 300


@pytest.mark.parametrize("value", [None, 3, b"x", ["x"]])
@pytest.mark.parametrize(
    "act",
    [
        lambda pair, value: slr.merge(pair.recipe(restore=[2, 3]), value),
        lambda pair, value: pair.recipe(restore=[2, 3]).save(value),
        lambda pair, value: slr.load_recipe(value),
        lambda pair, value: slr.verify(value),
        lambda pair, value: slr.push(value, "me/x"),
        lambda pair, value: slr.push(pair.folder, value),
        lambda pair, value: slr.select(value),
        lambda pair, value: slr.evaluate("open-qa", "data.json", value, pair.out),
        lambda pair, value: slr.evaluate(value, "data.json", {"a": "b"}, pair.out),
    ],
)
def test_a_value_of_another_type_is_refused(pair: Pair, act: Callable[[Pair, Any], object], value: Any) -> None:
    with pytest.raises(SlrmergeError):
        act(pair, value)


@pytest.mark.parametrize(
    ("act", "error", "code"),
    [
        (lambda pair: slr.load_recipe(pair.folder / "missing.yaml"), RecipeError, "recipe-unreadable"),
        (lambda pair: slr.open_checkpoint(pair.folder / "missing"), CheckpointError, "no-checkpoint"),
        (lambda pair: slr.merge(pair.recipe(restore=[2, 30]), pair.out), PlanError, "layer-out-of-range"),
        (lambda pair: slr.merge(pair.recipe(), pair.out), RecipeError, "nothing-to-merge"),
        (lambda pair: slr.merge(pair.recipe(restore=[2, 3]), pair.folder / "pre"), OutputError, "output-overlaps"),
        (lambda pair: slr.merge(pair.recipe(restore=[2, 3]), pair.out, threads=0), OptionError, "out-of-range"),
        (lambda pair: slr.merge(pair.recipe(restore=[2, 3]), pair.out, thread=1), OptionError, "unknown-option"),
        (lambda pair: slr.merge(3, pair.out), OptionError, "wrong-type"),  # type: ignore[arg-type]  # the test
        (lambda pair: slr.verify(str(pair.folder / "pre")), VerificationError, "no-manifest"),
        (lambda pair: slr.push(pair.folder, "a b"), OptionError, "invalid-repository"),
        (lambda pair: slr.select(str(pair.folder)), OutputError, "no-results"),
        (lambda pair: slr.select(str(pair.folder), min_quality=3), OptionError, "out-of-range"),
        (lambda pair: slr.search(pair.open(), pair.out, task="x"), OptionError, "invalid-choice"),
        (lambda pair: slr.search(pair.open(), pair.out, device="cuda"), OptionError, "device-unavailable"),
        (lambda pair: slr.evaluate("x", "data.json", {"a": "b"}, pair.out), OptionError, "invalid-choice"),
        (lambda pair: slr.Recipe(pretrained="a"), RecipeError, "missing-key"),
        (lambda pair: slr.Recipe(pretrained="a", posttrained="b", restor=[1, 2]), RecipeError, "unknown-key"),
    ],
)
def test_whatever_a_caller_causes_is_one_kind_of_error(
    pair: Pair, act: Callable[[Pair], object], error: type[SlrmergeError], code: str
) -> None:
    with refused(error, code) as caught:
        act(pair)
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))


def test_every_error_has_an_exit_code_and_a_docstring_of_its_own() -> None:
    assert len({error.exit_code for error in ERRORS}) == len(ERRORS) == 18
    assert all(error.__doc__ and error.__doc__ != SlrmergeError.__doc__ for error in ERRORS[1:])


def test_all_problems_are_raised_at_once() -> None:
    with refused(PlanError, "one", "two") as caught:
        errors.raise_all([Problem("one", "here", "is wrong", "fix it"), Problem("two", "there", "is too")], PlanError)
    assert str(caught.value) == "here: is wrong; fix it\nthere: is too"
    errors.raise_all([], PlanError)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'slrmerge' has no attribute 'merge_checkpoint'$"):
        slr.merge_checkpoint  # noqa: B018 (the access is the test)


def test_dir_lists_the_public_names() -> None:
    assert {"merge", "plan", "search", "select", "verify", "diff", "push", "evaluate", "open_pair"} <= set(dir(slr))
    assert set(slr.__all__) <= set(dir(slr))


@pytest.mark.parametrize("name", slr.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    assert (getattr(slr, name).__doc__ or "").strip()


@pytest.mark.parametrize("name", ["merge", "search", "evaluate"])
def test_the_signature_shows_the_options(name: str) -> None:
    parameters = inspect.signature(getattr(slr, name)).parameters
    expected = {"merge": "overwrite", "search": "min_quality", "evaluate": "temperature"}[name]
    assert parameters[expected].kind is inspect.Parameter.KEYWORD_ONLY
    assert not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())


def test_the_functions_stay_functions_whatever_is_imported() -> None:
    code = (
        "import slrmerge, pkgutil, importlib\n"
        "for module in pkgutil.walk_packages(slrmerge.__path__, 'slrmerge.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
        "print(all(callable(getattr(slrmerge, name)) for name in slrmerge.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_importing_the_package_imports_nothing_else_of_it() -> None:
    code = "import sys, slrmerge; print([name for name in sys.modules if name.startswith('slrmerge.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout in ("[]\n", "['slrmerge._version']\n")


def test_paths_are_accepted_as_strings_and_path_objects(pair: Pair) -> None:
    for kind in (str, Path):
        assert slr.open_checkpoint(kind(pair.folder / "post")) == slr.open_checkpoint(pair.folder / "post")
