"""What a recipe's two sides may name: folders, and repositories on the Hub."""

from pathlib import Path
from typing import Any

import pytest

from slrmerge.checkpoint.location import Repository, is_broken_link, parse_source
from slrmerge.checkpoint.opening import open_checkpoint
from slrmerge.errors import CheckpointError, OptionError
from tests.checkpoints import llama_tensors, write_checkpoint
from tests.problems import refused

REPOSITORIES = {
    "org/model": Repository("org/model"),
    "meta-llama/Llama-3.1-8B": Repository("meta-llama/Llama-3.1-8B"),
    "a/b": Repository("a/b"),
    "_/0": Repository("_/0"),
    "org_1/a.b-c_d": Repository("org_1/a.b-c_d"),
    "google/gemma-2-9b@main": Repository("google/gemma-2-9b", "main"),
    "org/model@0123456789abcdef0123456789abcdef01234567": Repository(
        "org/model", "0123456789abcdef0123456789abcdef01234567"
    ),
    "org/model@refs/pr/1": Repository("org/model", "refs/pr/1"),
    "org/model@v1.0-rc_2": Repository("org/model", "v1.0-rc_2"),
    "org/" + "x" * 300: Repository("org/" + "x" * 300),
}
NO_REPOSITORIES = [
    "missing",
    "missing@main",
    "./org/model",
    "../model",
    "/org/model",
    "a/b/c",
    "org/",
    "org//model",
    "org/model/",
    "org/.model",
    ".org/model",
    "-org/model",
    "org/model@",
    "org/model@v1@v2",
    "org/model@v 1",
    "org/model\n",
    "org /model",
    "örg/model",
    "org/modèl",
    "org\\model",
    "C:/model",
    "https://huggingface.co/datasets/org/model",
    "https://huggingface.co/org",
    "https://example.org/org/model",
    "hf://org",
    "~nobody-of-that-name/model",
    "model\0",
    "x" * 300,
]


@pytest.mark.parametrize("name", ["a/b/c", "model", "", "org/model@main", "hf://org/model", 5, None])
def test_a_repository_has_an_organisation_and_a_name(name: Any) -> None:
    with refused(OptionError, "invalid-repository"):
        Repository(name)


@pytest.mark.parametrize(
    ("written", "name", "revision"),
    [
        ("https://huggingface.co/org/model", "org/model", None),
        ("http://hf.co/org/model/", "org/model", None),
        ("huggingface.co/org/model/tree/v1.0", "org/model", "v1.0"),
        ("https://huggingface.co/org/model/tree/refs%2Fpr%2F1", "org/model", "refs/pr/1"),
        ("hf://org/model", "org/model", None),
        ("hf://org/model@main", "org/model", "main"),
    ],
)
def test_a_page_of_the_hub_names_its_repository(tmp_path: Path, written: str, name: str, revision: str | None) -> None:
    assert parse_source(written, base=tmp_path) == Repository(name, revision)


def test_a_repository_in_the_hubs_cache_is_its_snapshot_of_main(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--model"
    first, second = folder / "snapshots" / "a1", folder / "snapshots" / "b2"
    write_checkpoint(first, llama_tensors("first"))
    assert open_checkpoint(folder).folder == first  # the only one
    write_checkpoint(second, llama_tensors("second"))
    with refused(CheckpointError, "no-checkpoint"):
        open_checkpoint(folder)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("b2\n")
    found = open_checkpoint(folder)
    assert (found.folder, found.model_name) == (second, "org/model")
    for text in ("../../elsewhere", "\udcff", "b2".ljust(10_000_000)):
        (folder / "refs" / "main").write_text(text, errors="surrogateescape")
        with refused(CheckpointError, "no-checkpoint"):
            open_checkpoint(folder)


@pytest.mark.parametrize("written", REPOSITORIES, ids=lambda written: written[:60])
def test_what_could_be_a_repository_and_is_no_folder_is_one(tmp_path: Path, written: str) -> None:
    assert parse_source(written, base=tmp_path) == Repository.parse(written) == REPOSITORIES[written]


@pytest.mark.parametrize("written", REPOSITORIES, ids=lambda written: written[:60])
def test_a_repository_as_a_string_is_what_was_written(written: str) -> None:
    assert str(Repository.parse(written)) == written


@pytest.mark.parametrize("written", NO_REPOSITORIES, ids=lambda written: repr(written)[:60])
def test_what_no_repository_could_be_called_is_a_folder_even_where_there_is_none(tmp_path: Path, written: str) -> None:
    assert Repository.parse(written) is None
    assert parse_source(written, base=tmp_path) == tmp_path / written


@pytest.mark.parametrize("written", ["org/model", "org/model@main", "model"])
def test_a_folder_that_is_there_wins_over_a_repository(tmp_path: Path, written: str) -> None:
    (tmp_path / written).mkdir(parents=True)
    assert parse_source(written, base=tmp_path) == tmp_path / written


def test_so_does_a_file_which_is_then_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org/model").touch()
    assert parse_source("org/model", base=tmp_path) == tmp_path / "org/model"


@pytest.mark.parametrize("link", ["org", "org/model"])
def test_so_does_a_broken_link(tmp_path: Path, link: str) -> None:
    """A disk that is not mounted must not give way to somebody's repository."""
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "unmounted")
    assert parse_source("org/model", base=tmp_path) == tmp_path / "org/model"
    with refused(CheckpointError, "broken-link"):
        open_checkpoint(tmp_path / "org/model")


@pytest.mark.parametrize("end", ["", "\0"])
def test_a_text_of_many_slashes_is_no_link(tmp_path: Path, end: str) -> None:
    """In quadratic time, its parents would take 30 GB."""
    assert not is_broken_link(tmp_path / f"{'a/' * 125_000}{end}")


def test_so_does_a_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org/model").symlink_to("model")
    assert parse_source("org/model", base=tmp_path) == tmp_path / "org/model"


def test_so_does_a_folder_that_may_not_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **_: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refuse)
    assert parse_source("org/model", base=tmp_path) == tmp_path / "org/model"


def test_a_folder_counts_from_the_base_and_from_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse_source("org/model") == Path("org/model")
    assert parse_source("org/model", base=tmp_path / "elsewhere") == Repository("org/model")
    assert parse_source(str(tmp_path / "org/model"), base=tmp_path / "elsewhere") == tmp_path / "org/model"


def test_a_folder_is_named_the_short_way_where_that_is_the_same_one(tmp_path: Path) -> None:
    (tmp_path / "far" / "search").mkdir(parents=True)
    for parent in (tmp_path, tmp_path / "far"):
        (parent / "pre").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "search")
    assert parse_source("../pre", base=tmp_path / "search") == tmp_path / "search" / ".." / "pre"  # no such folder
    assert parse_source("../pre", base=tmp_path / "far") == tmp_path / "pre"
    assert parse_source("../pre", base=tmp_path / "link") == tmp_path / "link" / ".." / "pre"


def test_an_empty_name_is_not_the_current_folder() -> None:
    with refused(OptionError, "empty"):
        parse_source("")


@pytest.mark.parametrize("there", [True, False])
def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    if there:
        (tmp_path / "models/pre").mkdir(parents=True)
    assert parse_source("~/models/pre", base=tmp_path / "elsewhere") == tmp_path / "models/pre"


def test_a_repository_is_told_from_another_by_its_name_and_its_revision() -> None:
    repository = Repository("org/model", "main")
    assert repository == Repository.parse("org/model@main")
    others = {Repository("org/model"), Repository("org/other", "main"), Repository("org/model", "v")}
    assert len({repository, *others}) == 4
    with pytest.raises(AttributeError):
        repository.name = "org/other"  # type: ignore[misc]
