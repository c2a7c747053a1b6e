"""The Python API: what `slrmerge.__all__` names works as its docstrings say."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import slrmerge
from slrmerge import errors
from tests.checkpoints import read_back
from tests.conftest import Pair

ERRORS: list[type[slrmerge.SlrmergeError]] = [
    value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, slrmerge.SlrmergeError)
]


def test_a_merge_in_three_lines(pair: Pair) -> None:
    recipe = slrmerge.load_recipe(pair.recipe_file(restore=[2, 3]))
    result = slrmerge.merge_checkpoints(recipe, pair.out)
    report = slrmerge.verify_checkpoint(result.folder)
    assert isinstance(result, slrmerge.MergeResult)
    assert isinstance(report, slrmerge.VerifyReport)
    assert report.against_sources
    assert read_back(pair.out).keys() == pair.post.keys()


def test_the_same_merge_step_by_step(pair: Pair) -> None:
    folders = {side: str(pair.folder / side.removesuffix("trained")) for side in ("pretrained", "posttrained")}
    recipe = slrmerge.parse_recipe({**folders, "restore": [2, 3]})
    sides = [slrmerge.open_checkpoint(Path(folder)) for folder in folders.values()]
    plan = slrmerge.plan_merge(recipe, (sides[0], sides[1]))
    assert isinstance(recipe, slrmerge.Recipe)
    assert isinstance(sides[0], slrmerge.Checkpoint)
    assert isinstance(plan, slrmerge.MergePlan)
    result = slrmerge.execute(plan, pair.out)
    again = slrmerge.merge_checkpoints(recipe, pair.folder / "again" / pair.out.name)  # the card says its name
    assert again.files == result.files


def test_a_recipe_without_a_file_counts_relative_folders_from_where_one_stands(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pair.folder)
    recipe = slrmerge.parse_recipe({"pretrained": "pre", "posttrained": "post", "restore": [2, 3]})
    slrmerge.merge_checkpoints(recipe, Path("models/hybrid"))
    assert "pretrained: ../../pre\n" in (pair.folder / "models/hybrid/slrmerge.yaml").read_text()
    assert slrmerge.verify_checkpoint(Path("models/hybrid")).against_sources


def test_one_except_clause_catches_every_expected_error(pair: Pair) -> None:
    for act in (
        lambda: slrmerge.load_recipe(pair.folder / "missing.yaml"),
        lambda: slrmerge.open_checkpoint(pair.folder / "missing"),
        lambda: slrmerge.merge_checkpoints(pair.recipe(restore=[2, 30]), pair.out),
        lambda: slrmerge.merge_checkpoints(pair.recipe(restore=[2, 3]), pair.folder / "pre"),
        lambda: slrmerge.verify_checkpoint(pair.folder / "pre"),
    ):
        with pytest.raises(slrmerge.SlrmergeError) as caught:
            act()
        assert caught.value.problems
        assert str(caught.value) == "\n".join(map(str, caught.value.problems))


def test_every_error_has_an_exit_code_a_summary_and_a_docstring_of_its_own() -> None:
    assert len({error.exit_code for error in ERRORS}) == len({error.summary for error in ERRORS}) == len(ERRORS) == 15
    assert all(error.__doc__ and error.__doc__ != slrmerge.SlrmergeError.__doc__ for error in ERRORS[1:])
    assert 2 not in {error.exit_code for error in ERRORS}  # click's, for usage


def test_all_problems_come_at_once() -> None:
    with pytest.raises(errors.PlanError) as caught:
        errors.raise_all(
            [errors.Problem("here", "is wrong", "mend it"), errors.Problem("there", "is too")], errors.PlanError
        )
    assert str(caught.value) == "here: is wrong; mend it\nthere: is too"
    errors.raise_all([], errors.PlanError)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'slrmerge' has no attribute 'merge_checkpoint'$"):
        slrmerge.merge_checkpoint  # noqa: B018 (the access is the test)


@pytest.mark.parametrize("name", ["merge_checkpoints", "execute", "verify_checkpoint", "load_recipe", "parse_recipe"])
def test_all_past_the_second_argument_is_by_keyword(name: str) -> None:
    parameters = list(inspect.signature(getattr(slrmerge, name)).parameters.values())[2:]
    assert {parameter.kind for parameter in parameters} <= {
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.VAR_KEYWORD,
    }


@pytest.mark.parametrize("name", slrmerge.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    assert (getattr(slrmerge, name).__doc__ or "").strip()


def test_importing_the_package_imports_nothing_else_of_it() -> None:
    code = "import sys, slrmerge; print([name for name in sys.modules if name.startswith('slrmerge.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
