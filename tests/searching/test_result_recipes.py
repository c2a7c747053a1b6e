"""The recipes of a search name their origin, and merge from where they are."""

import shutil
from pathlib import Path

import pytest
import yaml

from slrmerge.errors import OutputError
from slrmerge.merging.executor import merge
from slrmerge.recipe.load import AnyRecipe, load_recipe
from slrmerge.recipe.model import Recipe
from slrmerge.searching.results_folder import write_result
from slrmerge.searching.run import search
from tests.merging.faults import snapshot
from tests.problems import refused
from tests.searching.made_results import FILES, SCORES
from tests.searching.pairs import SmallPair, made_result, made_rows

pytestmark = pytest.mark.usefixtures("hurried")


def recipe_text(folder: Path, name: str) -> list[str]:
    return (folder / f"{name}.yaml").read_text(encoding="utf-8").splitlines()


def test_a_recipe_has_its_origin_in_a_comment(tmp_path: Path) -> None:
    write_result(tmp_path, made_result(made_rows(SCORES), base=Recipe(pretrained="../pre", posttrained="../post")))
    for name, label in (("slr", "layers 1–1"), ("soup", "soup 0.50"), ("early", "layers 0–0"), ("late", "layers 2–2")):
        lines = recipe_text(tmp_path, name)
        comment = "\n".join(line for line in lines if line.startswith("#"))
        assert lines[0].startswith(f"# {label}: ")
        assert "40 prompts, float32" in comment
        assert "9 candidates" in comment
        assert "0.9600" in comment
    assert "Q 0.9000, D 1.7000" in "\n".join(recipe_text(tmp_path, "slr"))


def test_a_recipe_has_the_pair_the_rules_and_the_dtype(tmp_path: Path) -> None:
    base = Recipe(pretrained="../pre", posttrained="../post", dtype="bfloat16")
    write_result(tmp_path, made_result(made_rows(SCORES), base=base))
    content = yaml.safe_load((tmp_path / "slr.yaml").read_text(encoding="utf-8"))
    assert content == {"pretrained": "../pre", "posttrained": "../post", "restore": [1, 1], "dtype": "bfloat16"}


def test_recipes_without_a_selection_are_removed(tmp_path: Path) -> None:
    write_result(tmp_path, made_result(made_rows(SCORES)))
    assert set(snapshot(tmp_path) or {}) >= {*FILES}
    write_result(tmp_path, made_result(made_rows({(0, 0): (0.1, 1.4)})))
    assert [path.name for path in tmp_path.glob("*.yaml")] == ["soup.yaml"]


@pytest.mark.parametrize("scores", [SCORES, {(0, 0): (0.1, 1.4)}], ids=["written", "removed"])
def test_a_recipe_that_cannot_be_replaced_is_an_output_error(
    tmp_path: Path, scores: dict[tuple[int, int], tuple[float, float]]
) -> None:
    (tmp_path / "slr.yaml").mkdir()
    with refused(OutputError, "io-error"):
        write_result(tmp_path, made_result(made_rows(scores)))


def folders(recipe: AnyRecipe) -> list[Path]:
    """Where a recipe's checkpoints are."""
    sources = [recipe.source("pretrained"), recipe.source("posttrained")]
    return [source.resolve() for source in sources if isinstance(source, Path)]


NAMES = {
    "beside": ("pair", "pair/search"),
    "with spaces and other letters": ("a b/pär 模型", "a b/out put/sëarch"),
    "with characters of YAML and CSV": ("it's: #1, [x] & *y", "it's: #1, [x] & *y/search"),
}


@pytest.mark.parametrize(
    ("names", "written"),
    [
        ("beside", "relative"),
        ("beside", "absolute"),
        ("with spaces and other letters", "relative"),
        ("with characters of YAML and CSV", "absolute"),
    ],
)
def test_every_recipe_merges_from_the_results_folder(made_pair: Path, tmp_path: Path, names: str, written: str) -> None:
    folder, out = (tmp_path / name for name in NAMES[names])
    pair = SmallPair(Path(shutil.copytree(made_pair, folder)))
    sides = {side: str(folder / side.removesuffix("trained")) for side in ("pretrained", "posttrained")}
    result = pair.search(pair.recipe(**(sides if written == "absolute" else {}))).run(out)
    for name in ("slr", "soup", "early", "late"):
        loaded = load_recipe(out / f"{name}.yaml")
        assert Path(loaded.pretrained).is_absolute() == (written == "absolute")
        assert folders(loaded) == [folder / "pre", folder / "post"]
        assert loaded.rules() == result.choice.named()[name].rules.rules()
        hybrid = merge(out / f"{name}.yaml", tmp_path / "hybrids" / name, fsync=False).folder
        assert (hybrid / "model.safetensors").is_file()


def test_a_recipe_reached_through_a_link_still_finds_its_sources(small: SmallPair) -> None:
    (small.folder / "recipes" / "deep").mkdir(parents=True)
    (small.folder / "link").symlink_to(small.folder / "recipes" / "deep")
    content = {"pretrained": "../../pre", "posttrained": "../../post"}
    (small.folder / "link" / "pair.yaml").write_text(yaml.safe_dump(content))
    small.search(load_recipe(small.folder / "link" / "pair.yaml"), spaces=("intervals",)).run(small.out)
    assert folders(load_recipe(small.out / "slr.yaml")) == [small.folder / "pre", small.folder / "post"]


def test_relative_folders_of_a_recipe_without_a_file_count_from_the_current_folder(
    small: SmallPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small.folder)
    search({"pretrained": "./pre", "posttrained": "post"}, "deep/search", spaces="intervals", threads=1)
    monkeypatch.chdir("/")
    recipe = load_recipe(small.folder / "deep" / "search" / "slr.yaml")
    assert (recipe.pretrained, recipe.posttrained) == ("../../pre", "../../post")
    assert folders(recipe) == [small.folder / "pre", small.folder / "post"]
