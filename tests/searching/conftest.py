"""A small pair for every test of a search, made once."""

import shutil
from pathlib import Path

import pytest

from tests.searching.pairs import SmallPair, hurry, make_pair, results


@pytest.fixture(scope="session")
def made_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both models; do not write to it."""
    return make_pair(tmp_path_factory.mktemp("pair")).folder


@pytest.fixture(scope="session")
def plain(made_pair: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The results of an undisturbed search of the small pair."""
    pair = SmallPair(Path(shutil.copytree(made_pair, tmp_path_factory.mktemp("plain") / "pair")))
    with pytest.MonkeyPatch.context() as patch:
        hurry(patch)
        pair.run()
    return results(pair.out)


@pytest.fixture
def small(made_pair: Path, tmp_path: Path) -> SmallPair:
    """The pair in the test's own folder."""
    return SmallPair(Path(shutil.copytree(made_pair, tmp_path / "pair")))


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few prompts, no figures."""
    hurry(monkeypatch)
