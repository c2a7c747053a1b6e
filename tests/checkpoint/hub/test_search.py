"""A search of repositories downloads both once, and selects as a search of folders does."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir

from slrmerge.checkpoint.opening import open_pair
from slrmerge.errors import HubError, OutputError, PlanError
from slrmerge.merging.executor import merge
from slrmerge.recipe.load import load_recipe
from slrmerge.searching.options import SearchOptions
from slrmerge.searching.results import SearchResult
from slrmerge.searching.results_folder import read_result
from slrmerge.searching.run import Search, search
from tests.checkpoint.hub.conftest import BASE, CHAT
from tests.checkpoint.hub.server import HubServer
from tests.checkpoint.hub.test_hostile import answer_with
from tests.checkpoint.hub.transport import Answer
from tests.conftest import TINY
from tests.merging.faults import snapshot
from tests.problems import refused


@pytest.fixture
def tiny(hub: HubServer, tmp_path: Path) -> Path:
    """A recipe that names the example pair, on the Hub."""
    for repository, side in ((BASE, "pretrained"), (CHAT, "posttrained")):
        hub.commit(repository, snapshot(TINY / side))
    recipe = tmp_path / "pair.yaml"
    recipe.write_text(f"pretrained: {BASE}\nposttrained: {CHAT}\n")
    return recipe


def test_repositories_are_searched_like_folders(tiny: Path, hub: HubServer, tmp_path: Path, tiny_search: Path) -> None:
    result = search(tiny, tmp_path / "search", spaces="intervals", threads=1)
    here = scores(read_result(tiny_search / "search"))
    assert {label: here[label] for label in scores(result)} == scores(result)
    pinned = {side: f"{name}@{hub.head(name)}" for side, name in (("pretrained", BASE), ("posttrained", CHAT))}
    recipe = load_recipe(tmp_path / "search" / "slr.yaml")
    assert recipe.to_dict() == {**pinned, "restore": [2, 8]}

    hub.requests.clear()
    merge(tmp_path / "search" / "slr.yaml", tmp_path / "from-file")
    merge(result.choice, tmp_path / "chosen")
    for name in ("from-file", "chosen"):
        assert "## Search" in (tmp_path / name / "README.md").read_text()
        assert (tmp_path / name / "tradeoff.png").is_file()
    assert hub.served("^/blobs/") == 0


def test_an_estimate_downloads_no_weights(tiny: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrmerge.searching.estimate.measured_rate", lambda width, dtype, device: 1e11)
    monkeypatch.setattr("slrmerge.searching.scorer.measured_state_s", lambda model, contexts, layer: 1e-3)
    rows = Search(tiny).estimate().rows
    assert rows[0].candidates == 76
    names = cached_names()
    assert "tokenizer.json" in names
    assert not any(name.endswith(".safetensors") for name in names)


def test_the_constructor_sends_no_request(tiny: Path, hub: HubServer) -> None:
    hub.requests.clear()
    Search(tiny, SearchOptions(also=(tiny,)))
    assert hub.requests == []


def test_an_output_that_exists_is_refused_before_weights_are_downloaded(
    tiny: Path, hub: HubServer, tmp_path: Path
) -> None:
    pair = open_pair(BASE, CHAT)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.md").write_text("mine")
    with refused(OutputError, "output-exists"):
        Search(pair).run(tmp_path / "out")
    assert not any(name.endswith(".safetensors") for name in cached_names())


@pytest.mark.parametrize(("revision", "fits"), [(None, True), ("main", True), ("HEAD", True), ("v0", False)])
def test_a_recipe_for_the_same_repositories_may_name_the_branch_or_the_commit(
    tiny: Path, hub: HubServer, tmp_path: Path, revision: str | None, fits: bool
) -> None:
    at = "" if revision is None else f"@{hub.head(BASE) if revision == 'HEAD' else revision}"
    other = tmp_path / "other.yaml"
    other.write_text(f"pretrained: {BASE}{at}\nposttrained: {CHAT}\nalpha: 0.33\n")
    ready = Search(tiny, SearchOptions(also=(other,), spaces=()))
    if fits:
        assert [each.info.label for each in ready.prepared.candidates][-1] == "other.yaml"
    else:
        with refused(PlanError, "other-checkpoint"):
            _ = ready.prepared


def flipped(answer: Answer, *, longer_than: int = 0) -> Answer:
    """The last bit of a body is another."""
    last = answer.body[-1:]
    return replace(answer, body=answer.body[:-1] + bytes([last[0] ^ 1])) if len(answer.body) > longer_than else answer


LIES: dict[str, tuple[str, Callable[[Answer], Answer], str]] = {
    "other weights": ("GET /blobs/", lambda answer: flipped(answer, longer_than=100_000), "digest-mismatch"),
    "fewer weights": ("GET /blobs/", lambda answer: replace(answer, body=answer.body[:-1]), "invalid-response"),
    "another tokenizer": ("/tokenizer.json", flipped, "digest-mismatch"),
    "another chat template": ("/chat_template.jinja", flipped, "digest-mismatch"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_search_of_what_the_hub_does_not_list_is_an_error(
    tiny: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    match, lie, code = LIES[name]
    answer_with(monkeypatch, hub, match, lie)
    with refused(HubError, code):
        search(tiny, tmp_path / "search", spaces=(), threads=1)
    assert not (tmp_path / "search").exists()


def scores(result: SearchResult) -> dict[str, tuple[float, float]]:
    return {row.label: (row.quality, row.diversity) for row in result.rows}


def cached_names() -> set[str]:
    """The names of all files in the Hub's cache."""
    return {file.file_name for repo in scan_cache_dir().repos for rev in repo.revisions for file in rev.files}
