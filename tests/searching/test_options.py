"""Options of a search: which are refused, and that its constructor opens nothing."""

import builtins
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from slrmerge.errors import MissingExtraError, OptionError, RecipeError
from slrmerge.io.options import make_options
from slrmerge.searching.options import SearchOptions
from slrmerge.searching.run import Search, search
from tests.merging.faults import Stop, stop
from tests.problems import refused
from tests.searching.pairs import SmallPair, Watcher, hurried


@hurried
def test_the_constructor_opens_nothing(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, also = small.recipe(restore=[1, 2]), small.recipe(alpha=0.3)
    opened: list[object] = []
    for name in ("socket.socket.connect", "slrmerge.recipe.model.open_pair", "slrmerge.searching.prepare.tokenize"):
        monkeypatch.setattr(name, lambda *args, **_: opened.append(args))
    real_open = builtins.open

    def noting_open(file: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(file)
        return real_open(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", noting_open)
    for side in ("pre", "post"):
        shutil.rmtree(small.folder / side)
    Search(recipe, SearchOptions(threads=1, also=(also,)))
    Search({"pretrained": "org/nowhere", "posttrained": "org/nowhere-chat"}, SearchOptions(also=(recipe,)))
    assert opened == []


@hurried
@pytest.mark.parametrize("threads", [1, 2])
def test_torch_threads_are_restored(small: SmallPair, threads: int) -> None:
    before, seen = torch.get_num_threads(), []
    options = SearchOptions(threads=threads, spaces=())
    ready = Search(small.recipe(), options)
    assert torch.get_num_threads() == before
    ready.run(small.out, progress=Watcher(1, lambda: seen.append(torch.get_num_threads())))
    assert (seen, torch.get_num_threads()) == ([threads], before)
    with pytest.raises(Stop):
        ready.run(small.folder / "other", progress=Watcher(1, stop))
    assert torch.get_num_threads() == before


@hurried
def test_an_estimate_uses_the_same_threads(small: SmallPair, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []

    def rate(*_: object) -> float:
        seen.append(torch.get_num_threads())
        return 1e11

    monkeypatch.setattr("slrmerge.searching.estimate.measured_rate", rate)
    Search(small.recipe(), SearchOptions(threads=2)).estimate()
    assert (set(seen), torch.get_num_threads()) == ({2}, before)


@pytest.mark.parametrize(
    ("options", "code", "where"),
    [
        ({"task": "crossword"}, "invalid-choice", "task"),
        ({"spaces": ("intervals", "circles")}, "invalid-choice", "spaces"),
        ({"spaces": "circles"}, "invalid-choice", "spaces"),
        ({"dtype": "float16"}, "invalid-choice", "dtype"),
        ({"min_quality": 1.5}, "out-of-range", "min_quality"),
        ({"threads": 0}, "out-of-range", "threads"),
        ({"max_memory": "lots"}, "invalid-size", "max_memory"),
        ({"depth": 3}, "unknown-option", "depth"),
        ({"device": "warp"}, "device-unavailable", "device"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_opened(
    tmp_path: Path, options: dict[str, Any], code: str, where: str
) -> None:
    with refused(OptionError, code) as caught:
        search({"pretrained": "./nowhere", "posttrained": "./nowhere-else"}, tmp_path / "out", **options)
    assert [problem.where for problem in caught.value.problems] == [where]


def test_several_invalid_options_are_reported_together() -> None:
    with refused(OptionError, "out-of-range", "invalid-choice"):
        SearchOptions(min_quality=-1, task="crossword")


def test_spaces_and_recipes_may_be_one_value_or_a_list() -> None:
    for name, one, two in (("spaces", "soups", "mlp"), ("also", "mine.yaml", {"alpha": 0.5})):
        for given, kept in ((one, (one,)), ([one, two], (one, two)), ((two,), (two,)), (two, (two,))):
            assert getattr(make_options(SearchOptions, {name: given}), name) == kept


@pytest.mark.parametrize("value", [3, None, object()])
def test_what_is_no_recipe_is_refused(value: Any) -> None:
    with refused(OptionError, "wrong-type"):
        Search(value)


def test_an_invalid_recipe_is_refused() -> None:
    with refused(RecipeError, "missing-key"):
        Search({"pretrained": "./pre"})


@pytest.mark.parametrize("missing", [("transformers",), ("matplotlib",), ("transformers", "matplotlib")])
def test_missing_packages_are_named(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    monkeypatch.setattr("slrmerge.errors.find_spec", lambda name: None if name in missing else object())
    with refused(MissingExtraError, "missing-extra") as caught:
        small.search()
    assert all(name in caught.value.problems[0].what for name in missing)


def test_the_repr_is_one_line(small: SmallPair) -> None:
    assert "\n" not in repr(small.search())
    assert "./pre" in repr(small.search())
