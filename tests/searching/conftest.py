"""A small pair for every test of a search, made once."""

import shutil
from pathlib import Path

import pytest

from tests.searching.pairs import SmallPair, hurry, make_pair


@pytest.fixture(scope="session")
def made_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both models; do not write to it."""
    return make_pair(tmp_path_factory.mktemp("pair")).folder


@pytest.fixture
def small(made_pair: Path, tmp_path: Path) -> SmallPair:
    """The pair in the test's own folder."""
    return SmallPair(Path(shutil.copytree(made_pair, tmp_path / "pair")))


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few prompts, no figures."""
    hurry(monkeypatch)
