"""A search of repositories fetches both whole, once, and finds what a search of folders finds."""

import csv
from pathlib import Path

import pytest
import yaml
from huggingface_hub import scan_cache_dir

from tests.cli import run
from tests.conftest import TINY
from tests.hub.conftest import BASE, CHAT, files_of
from tests.hub.server import HubServer


@pytest.fixture
def tiny(hub: HubServer, tmp_path: Path) -> Path:
    """A recipe that names the example pair, on the hub."""
    for repository, side in ((BASE, "pretrained"), (CHAT, "posttrained")):
        hub.commit(repository, files_of(TINY / side))
    recipe = tmp_path / "pair.yaml"
    recipe.write_text(f"pretrained: {BASE}\nposttrained: {CHAT}\n")
    return recipe


def test_repositories_are_searched_like_folders(tiny: Path, hub: HubServer, tmp_path: Path, tiny_search: Path) -> None:
    result = run("search", tiny, "--out", tmp_path / "search", "--space", "intervals", "--threads", 1)
    assert result.exit_code == 0, result.stderr
    here, there = (scores(folder) for folder in (tiny_search / "search", tmp_path / "search"))
    assert {label: here[label] for label in there} == there
    chosen = yaml.safe_load((tmp_path / "search" / "slr.yaml").read_text())
    assert chosen["restore"] == yaml.safe_load((tiny_search / "search" / "slr.yaml").read_text())["restore"]
    assert (chosen["pretrained"], chosen["posttrained"]) == tuple(f"{name}@{hub.head(name)}" for name in (BASE, CHAT))

    hub.requests.clear()
    result = run(tmp_path / "search" / "slr.yaml", "--out", tmp_path / "hybrid")
    assert (result.exit_code, hub.served("^/blobs/")) == (0, 0)
    card = (tmp_path / "hybrid" / "README.md").read_text()
    assert "## What the search found" in card
    assert (tmp_path / "hybrid" / "tradeoff.png").is_file()


def test_an_estimate_fetches_no_weights(tiny: Path, hub: HubServer) -> None:
    result = run("search", tiny, "--dry-run")
    assert result.exit_code == 0, result.stderr
    weights = {file.file_name for repo in scan_cache_dir().repos for rev in repo.revisions for file in rev.files}
    assert "tokenizer.json" in weights
    assert not any(name.endswith(".safetensors") for name in weights)


def scores(folder: Path) -> dict[str, tuple[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        return {row["label"]: (row["quality"], row["diversity"]) for row in csv.DictReader(file)}
