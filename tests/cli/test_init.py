"""`slrmerge init` writes a recipe that loads, whatever is uncommented."""

import re
from pathlib import Path

import pytest

from slrmerge.errors import OutputError
from slrmerge.recipe.load import load_recipe
from slrmerge.recipe.model import Recipe
from tests.cli import refusal, run
from tests.conftest import Pair
from tests.problems import refused


def test_the_recipe_names_the_pair_and_has_the_schema_line(pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere.yaml"
    assert run("init", pair.folder / "pre", pair.folder / "post", "-o", file).exit_code == 0
    loaded = load_recipe(file)
    assert isinstance(loaded, Recipe)
    assert not loaded.has_rules
    assert loaded.open_pair().posttrained.folder == pair.folder / "post"
    schema = re.match(r"# yaml-language-server: \$schema=file://(\S+)\n", file.read_text())
    assert schema
    assert Path(schema[1]).exists()


def test_every_commented_key_is_valid(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pair.folder)
    assert run("init", "pre", "post").exit_code == 0
    text = Path("recipe.yaml").read_text()
    assert text.splitlines()[1:3] == ["pretrained: pre", "posttrained: post"]
    Path("recipe.yaml").write_text(re.sub(r"(?m)^# (?=[a-z_]+: *\S|layers:|tensors:|  )", "", text.partition("\n")[2]))
    loaded = load_recipe("recipe.yaml")
    assert isinstance(loaded, Recipe)
    assert loaded.restore
    assert loaded.alpha == 0.1
    assert loaded.layers
    assert loaded.tensors
    assert loaded.dtype == "bfloat16"


def test_an_existing_file_is_kept(pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("mine")
    assert run("init", pair.folder / "pre", pair.folder / "post", "--out", file).exit_code == 6
    assert file.read_text() == "mine"
    assert run("init", pair.folder / "pre", pair.folder / "post", "--out", file, "--overwrite").exit_code == 0


@pytest.mark.parametrize("write", ["init", "save"])
def test_a_full_disk_leaves_the_file_that_was_there(pair: Pair, tmp_path: Path, write: str) -> None:
    resource = pytest.importorskip("resource")
    file, recipe = tmp_path / "mine.yaml", load_recipe(pair.recipe_file(restore=[2, 3]))
    file.write_text("mine")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))  # bytes of a file
    try:
        if write == "init":
            assert run("init", pair.folder / "pre", pair.folder / "post", "-o", file, "--overwrite").exit_code == 6
        else:
            with refused(OutputError, "io-error"):
                recipe.save(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.read_text() == "mine"
    assert not [*tmp_path.glob(".slrmerge*")]


def test_two_checkpoints_that_are_no_pair_are_refused(pair: Pair) -> None:
    assert run("init", pair.folder / "post", pair.folder / "post").exit_code == 4
    assert refusal("inspect", pair.folder / "nowhere")[0] == 4
