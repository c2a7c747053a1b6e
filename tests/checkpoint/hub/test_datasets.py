"""Datasets on the Hub, read by the real `datasets` library."""

import io
import logging
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from slrmerge.checkpoint.location import Repository
from slrmerge.errors import DataError, HubError, Problem, SlrmergeError
from slrmerge.evaluation.hub_dataset import load_rows
from slrmerge.evaluation.questions import QuestionRow, read_data
from tests.checkpoint.hub.server import HubServer, use

GSM8K, AT_HUB = "org/gsm8k", "datasets/org/gsm8k"
SUBSETS, SPLITS = ("main", "socratic"), ("train", "test")
CARD = "---\nconfigs:\n" + "".join(
    f"- config_name: {subset}\n  data_files:\n"
    + "".join(f"  - split: {split}\n    path: {subset}/{split}-*\n" for split in SPLITS)
    for subset in SUBSETS
)


def rows_of(*words: str) -> list[dict[str, Any]]:
    return [{"question": f"{' '.join(words)} {number}?", "answer": f"#### {number}"} for number in (3, 1, 2)]


def parquet_of(rows: Sequence[dict[str, Any]]) -> bytes:
    written = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(rows)), written)
    return written.getvalue()


def load(name: str = GSM8K, subset: str | None = None, split: str = "test") -> list[dict[str, Any]]:
    repository = Repository.parse(name)
    assert repository is not None
    return list(load_rows(repository, subset=subset, split=split).rows)


def refusal(
    error: type[SlrmergeError], name: str = GSM8K, *, subset: str | None = "main", split: str = "test"
) -> Problem:
    """The one problem with loading a dataset."""
    with pytest.raises(error) as caught:
        load(name, subset, split)
    (problem,) = caught.value.problems
    return problem


@pytest.fixture(autouse=True)
def nowhere_else(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No host but loopback is resolved, not even by code that would tolerate the failure."""
    asked, find = [], socket.getaddrinfo

    def refuse(host: str, *arguments: Any, **options: Any) -> Any:
        if host == "127.0.0.1":
            return find(host, *arguments, **options)
        asked.append(host)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert asked == []


@pytest.fixture
def gsm8k(hub: HubServer) -> HubServer:
    """A hub with a dataset of parquet files: two configurations with two splits each."""
    files = {
        f"{subset}/{split}-00000-of-00001.parquet": parquet_of(rows_of(subset, split))
        for subset in SUBSETS
        for split in SPLITS
    }
    hub.commit(AT_HUB, {"README.md": f"{CARD}---\nGrade school.".encode(), **files})
    return hub


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The libraries' log messages."""
    logger = logging.getLogger("datasets")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_rows_arrive_as_they_are_and_in_order(
    gsm8k: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], logged: pytest.LogCaptureFixture
) -> None:
    assert load(GSM8K, "main") == rows_of("main", "test")
    assert (capsys.readouterr(), logged.messages) == (("", ""), [])
    for folder in (constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE):
        assert Path(folder).is_relative_to(tmp_path)
        assert any(Path(folder).iterdir())


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("split", SPLITS)
def test_subset_and_split_are_used(gsm8k: HubServer, subset: str, split: str) -> None:
    assert load(GSM8K, subset, split) == rows_of(subset, split)
    other = SUBSETS[subset == SUBSETS[0]]
    assert not gsm8k.served(f"/{other}/(train|test)-")


def test_a_part_of_a_split_is_a_split(gsm8k: HubServer) -> None:
    assert load(GSM8K, "main", "test[1:]") == rows_of("main", "test")[1:]


@pytest.mark.parametrize("kept", [False, True])
def test_a_revision_is_used(gsm8k: HubServer, kept: bool) -> None:
    old, new = rows_of("main", "test"), rows_of("new")
    first = gsm8k.head(AT_HUB)
    gsm8k.tag(AT_HUB, "v1")
    gsm8k.commit(AT_HUB, {"main/test-00000-of-00001.parquet": parquet_of(new)}, branch="a/b")
    if kept:
        load(GSM8K, "main")
    assert load(f"{GSM8K}@a/b", "main") == new
    assert load(f"{GSM8K}@v1", "main") == load(f"{GSM8K}@{first}", "main") == load(GSM8K, "main") == old


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("test.jsonl", '{"question": "a?", "answers": ["1", "2"]}\n{"question": "é?", "answers": []}\n'),
        ("data/test.csv", 'question,answers\na?,1\n"b, or ""é""?",2\n'),
    ],
)
def test_plain_files_are_splits_by_their_names(hub: HubServer, file: str, content: str) -> None:
    hub.commit("datasets/org/plain", {file: content.encode(), file.replace("test", "train"): content.encode()})
    expected: list[dict[str, Any]] = (
        [{"question": "a?", "answers": ["1", "2"]}, {"question": "é?", "answers": []}]
        if file.endswith("jsonl")
        else [{"question": "a?", "answers": 1}, {"question": 'b, or "é"?', "answers": 2}]
    )
    assert load("org/plain") == expected


def test_large_files_come_from_their_storage(hub: HubServer) -> None:
    rows = [{"question": f"{number} " + "what? " * 200} for number in range(1000)]
    content = "".join(f'{{"question": "{row["question"]}"}}\n' for row in rows).encode()
    hub.commit("datasets/org/large", {"test.jsonl": content})
    assert load("org/large") == rows
    assert hub.served("^/blobs/") == len(content)


def test_rows_of_an_evaluation_have_places(gsm8k: HubServer) -> None:
    gsm8k.tag(AT_HUB, "v1")
    for name in (GSM8K, f"{GSM8K}@v1"):
        expected = [QuestionRow(f"{name}[{number}]", row) for number, row in enumerate(rows_of("main", "test"))]
        assert read_data(name, subset="main").rows == expected


def test_downloaded_rows_are_used_offline(gsm8k: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    load(GSM8K, "main")
    gsm8k.requests.clear()
    go_offline(monkeypatch)
    assert load(GSM8K, "main") == rows_of("main", "test")
    assert gsm8k.requests == []


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_an_unknown_subset_is_refused_with_the_known_ones(gsm8k: HubServer) -> None:
    problem = refusal(DataError, subset="nope")
    assert (problem.code, problem.where) == ("unusable-dataset", GSM8K)
    assert "['main', 'socratic']" in problem.what


def test_an_unknown_split_is_refused_with_the_known_ones(gsm8k: HubServer) -> None:
    problem = refusal(DataError, split="dev")
    assert problem.code == "unusable-dataset"
    assert "['train', 'test']" in problem.what


def test_a_subset_must_be_named_where_there_are_several(gsm8k: HubServer) -> None:
    problem = refusal(DataError, subset=None)
    assert problem.code == "unusable-dataset"
    assert "['main', 'socratic']" in problem.what


def test_a_missing_dataset_is_refused(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = refusal(HubError, "org/nope")
    assert (problem.code, problem.where) == ("repository-not-found", "datasets/org/nope")
    hub.tokens["hf_ann"] = "ann"
    use(monkeypatch, hub, tmp_path / "cache", "hf_ann")
    assert refusal(HubError, "org/nope").code == "repository-not-found"


def test_a_private_dataset_needs_a_token(gsm8k: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gsm8k.private.add(AT_HUB)
    gsm8k.tokens["hf_org"] = "org"
    assert refusal(HubError).code == "repository-not-found"
    use(monkeypatch, gsm8k, tmp_path / "cache", "hf_org")
    assert load(GSM8K, "main") == rows_of("main", "test")


def test_a_gated_dataset_is_refused_with_its_address(gsm8k: HubServer) -> None:
    gsm8k.gated.add(AT_HUB)
    problem = refusal(HubError)
    assert problem.code == "gated-repository"
    assert f"{gsm8k.url}/{AT_HUB}" in problem.remedy


def test_a_missing_revision_is_refused(gsm8k: HubServer) -> None:
    problem = refusal(HubError, f"{GSM8K}@v9")
    assert (problem.code, problem.where) == ("revision-not-found", f"{AT_HUB}@v9")


def test_a_script_is_not_run(gsm8k: HubServer, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    gsm8k.commit(AT_HUB, {"gsm8k.py": f"open({str(ran)!r}, 'w')".encode()})
    assert refusal(DataError).code == "dataset-script"
    assert not ran.exists()


def test_a_dataset_that_was_never_downloaded_is_refused_offline(
    gsm8k: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_offline(monkeypatch)
    problem = refusal(HubError)
    assert (problem.code, problem.where) == ("not-cached", AT_HUB)


def test_a_failing_hub_is_an_error(gsm8k: HubServer) -> None:
    gsm8k.misbehave("status", "", times=None)
    problem = refusal(HubError)
    assert (problem.code, problem.where) == ("hub-error", AT_HUB)


def test_an_unreachable_hub_is_an_error(gsm8k: HubServer) -> None:
    gsm8k.misbehave("reset", "", times=None)
    problem = refusal(HubError)
    assert (problem.code, problem.where) == ("hub-unreachable", AT_HUB)


def test_another_commit_in_the_cache_is_not_used_when_the_hub_is_unreachable(gsm8k: HubServer) -> None:
    load(GSM8K, "main")
    gsm8k.commit(AT_HUB, {"main/test-00000-of-00001.parquet": parquet_of(rows_of("new"))})
    gsm8k.misbehave("reset", "", times=None)
    assert refusal(HubError).code == "hub-unreachable"


def test_another_commit_in_the_cache_is_not_used_when_the_hub_fails_later(gsm8k: HubServer) -> None:
    load(GSM8K, "main")
    gsm8k.commit(AT_HUB, {"main/test-00000-of-00001.parquet": parquet_of(rows_of("new"))})
    for part in ("/resolve/", "/tree/"):
        gsm8k.misbehave("status", part, times=None, status=403)
    problem = refusal(HubError)
    assert problem.code == "commit-not-available"
    assert gsm8k.head(AT_HUB) in problem.what


def test_another_revision_in_the_cache_is_not_used_offline(gsm8k: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    load(GSM8K, "main")
    go_offline(monkeypatch)
    assert refusal(HubError, f"{GSM8K}@v1").code == "commit-not-available"


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"test.parquet": b"nothing of the kind, as anybody sees"}, "Parquet magic bytes not found in footer. Either "),
        ({"test.jsonl": b'{"question": "a?"}\n{what?\n'}, "JSON parse error: Missing a name for object member. in row"),
        ({"README.md": b"---\n[what?\n---\n", "test.csv": b"a\n1\n"}, "while parsing a flow sequence"),
        ({"README.md": b"Nothing."}, "The directory at hf://datasets/org/bad@"),
        ({"test.jsonl": b""}, "no rows)"),
    ],
)
def test_unreadable_files_are_refused_with_the_reason(
    hub: HubServer, files: dict[str, bytes], why: str, logged: pytest.LogCaptureFixture
) -> None:
    hub.commit("datasets/org/bad", files)
    problem = refusal(DataError, "org/bad", subset=None)
    assert (problem.code, problem.where) == ("unusable-dataset", "org/bad")
    assert f"({why}" in problem.what
    assert logged.messages == []


def test_a_local_folder_of_the_same_name_is_not_used(
    gsm8k: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / GSM8K).mkdir(parents=True)
    (tmp_path / GSM8K / "test.csv").write_text("question\nanother?\n")
    monkeypatch.chdir(tmp_path)
    assert load(f"{GSM8K}@main", "main") == rows_of("main", "test")
