"""A dataset on the Hub comes as rows, by the real `datasets` library; everything wrong with it in words."""

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

from slrmerge.errors import DataError, HubError, SlrmergeError
from slrmerge.evaluate.questions import Row, read_data
from slrmerge.hub.datasets import load_rows
from slrmerge.repository import Repository
from tests.hub.server import HubServer, use

GSM8K, AT_HUB = "org/gsm8k", "datasets/org/gsm8k"
SUBSETS, SPLITS = ("main", "socratic"), ("train", "test")
CARD = "---\nconfigs:\n" + "".join(
    f"- config_name: {subset}\n  data_files:\n"
    + "".join(f"  - split: {split}\n    path: {subset}/{split}-*\n" for split in SPLITS)
    for subset in SUBSETS
)
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
NAME_IT = "name what it has with --subset and --split"


def rows_of(*words: str) -> list[dict[str, Any]]:
    return [{"question": f"{' '.join(words)} {number}?", "answer": f"#### {number}"} for number in (3, 1, 2)]


def parquet_of(rows: Sequence[dict[str, Any]]) -> bytes:
    written = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(rows)), written)
    return written.getvalue()


def load(name: str = GSM8K, subset: str | None = None, split: str = "test") -> list[dict[str, Any]]:
    repository = Repository.parse(name)
    assert repository is not None
    return list(load_rows(repository, subset=subset, split=split)[1])


def refusal(error: type[SlrmergeError], name: str = GSM8K, *, subset: str | None = "main", split: str = "test") -> str:
    with pytest.raises(error) as caught:
        load(name, subset, split)
    return str(caught.value)


@pytest.fixture(autouse=True)
def nowhere_else(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody but loopback is looked for, not even by those who would do without; nobody is waited for long."""
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
    """A hub with a dataset of parquet files: two subsets, two splits each."""
    files = {
        f"{subset}/{split}-00000-of-00001.parquet": parquet_of(rows_of(subset, split))
        for subset in SUBSETS
        for split in SPLITS
    }
    hub.commit(AT_HUB, {"README.md": f"{CARD}---\nGrade school.".encode(), **files})
    return hub


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the libraries would print on standard error."""
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
def test_subset_and_split_choose(gsm8k: HubServer, subset: str, split: str) -> None:
    assert load(GSM8K, subset, split) == rows_of(subset, split)
    other = SUBSETS[subset == SUBSETS[0]]
    assert not gsm8k.served(f"/{other}/(train|test)-")


def test_a_part_of_a_split_is_one(gsm8k: HubServer) -> None:
    assert load(GSM8K, "main", "test[1:]") == rows_of("main", "test")[1:]


@pytest.mark.parametrize("kept", [False, True])
def test_a_revision_is_taken(gsm8k: HubServer, kept: bool) -> None:
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


def test_large_files_come_from_where_they_are_kept(hub: HubServer) -> None:
    rows = [{"question": f"{number} " + "what? " * 200} for number in range(1000)]
    content = "".join(f'{{"question": "{row["question"]}"}}\n' for row in rows).encode()
    hub.commit("datasets/org/large", {"test.jsonl": content})
    assert load("org/large") == rows
    assert hub.served("^/blobs/") == len(content)


def test_the_questions_of_an_evaluation_say_where_they_stand(gsm8k: HubServer) -> None:
    gsm8k.tag(AT_HUB, "v1")
    for name in (GSM8K, f"{GSM8K}@v1"):
        expected = [Row(f"{name}[{number}]", row) for number, row in enumerate(rows_of("main", "test"))]
        assert read_data(name, subset="main").rows == expected


def test_what_was_fetched_serves_without_the_hub(gsm8k: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    load(GSM8K, "main")
    gsm8k.requests.clear()
    go_offline(monkeypatch)
    assert load(GSM8K, "main") == rows_of("main", "test")
    assert gsm8k.requests == []


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_an_unknown_subset_is_told_the_known_ones(gsm8k: HubServer) -> None:
    what = "cannot be used so (BuilderConfig 'nope' not found. Available: ['main', 'socratic'])"
    assert refusal(DataError, subset="nope") == f"{GSM8K}: {what}; {NAME_IT}"


def test_an_unknown_split_is_told_the_known_ones(gsm8k: HubServer) -> None:
    what = """cannot be used so (Unknown split "dev". Should be one of ['train', 'test'].)"""
    assert refusal(DataError, split="dev") == f"{GSM8K}: {what}; {NAME_IT}"


def test_a_subset_must_be_named_where_there_are_several(gsm8k: HubServer) -> None:
    what = (
        "cannot be used so (Config name is missing. Please pick one among the available configs: ['main', 'socratic'])"
    )
    assert refusal(DataError, subset=None) == f"{GSM8K}: {what}; {NAME_IT}"


def test_a_dataset_that_is_not_there_is_said(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = "is no folder here, and no public repository on the Hub"
    assert refusal(HubError, "org/nope") == f"datasets/org/nope: {what}; check the name; if it is private, {LOG_IN}"
    hub.tokens["hf_ann"] = "ann"
    use(monkeypatch, hub, tmp_path / "cache", "hf_ann")
    what = "is no folder here, and no repository on the Hub that your token may see"
    assert refusal(HubError, "org/nope") == f"datasets/org/nope: {what}; check the name"


def test_a_private_dataset_is_for_those_who_may_see_it(
    gsm8k: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gsm8k.private.add(AT_HUB)
    gsm8k.tokens["hf_org"] = "org"
    what = "is no folder here, and no public repository on the Hub"
    assert refusal(HubError) == f"{AT_HUB}: {what}; check the name; if it is private, {LOG_IN}"
    use(monkeypatch, gsm8k, tmp_path / "cache", "hf_org")
    assert load(GSM8K, "main") == rows_of("main", "test")


def test_a_gated_dataset_says_how_to_get_in(gsm8k: HubServer) -> None:
    gsm8k.gated.add(AT_HUB)
    remedy = f"ask for access on {gsm8k.url}/{AT_HUB}, then {LOG_IN}"
    assert refusal(HubError) == f"{AT_HUB}: is gated: its owner decides who may read it; {remedy}"


def test_a_revision_that_is_not_there_is_said(gsm8k: HubServer) -> None:
    remedy = f"the branches and tags are on {gsm8k.url}/{AT_HUB}/refs"
    assert refusal(HubError, f"{GSM8K}@v9") == f"{AT_HUB}@v9: has no such revision; {remedy}"


def test_a_script_is_not_run(gsm8k: HubServer, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    gsm8k.commit(AT_HUB, {"gsm8k.py": f"open({str(ran)!r}, 'w')".encode()})
    what = "is made by a script of its own, which is not run"
    assert refusal(DataError) == f"{GSM8K}: {what}; name one that is made of files"
    assert not ran.exists()


def test_what_was_never_fetched_is_not_there_without_the_hub(gsm8k: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(monkeypatch)
    what = "is not in the cache of `datasets`, and HF_HUB_OFFLINE is set"
    assert refusal(HubError) == f"{AT_HUB}: {what}; unset it"


def test_a_hub_that_fails_is_said(gsm8k: HubServer) -> None:
    gsm8k.misbehave("status", "", times=None)
    remedy = "try again later; the same command goes on where it was"
    assert refusal(HubError) == f"{AT_HUB}: got the answer 500 from the Hub: told to; {remedy}"


def test_a_hub_that_cannot_be_reached_is_said(gsm8k: HubServer) -> None:
    gsm8k.misbehave("reset", "", times=None)
    why = "RemoteProtocolError: Server disconnected without sending a response."
    remedy = "check the network; HF_HUB_OFFLINE=1 takes what is in the Hub's cache"
    assert refusal(HubError) == f"{AT_HUB}: cannot be reached at {gsm8k.url} ({why}); {remedy}"


def test_a_hub_that_fails_does_not_give_what_was_fetched_of_another_commit(gsm8k: HubServer) -> None:
    load(GSM8K, "main")
    gsm8k.commit(AT_HUB, {"main/test-00000-of-00001.parquet": parquet_of(rows_of("new"))})
    gsm8k.misbehave("reset", "", times=None)
    assert "cannot be reached" in refusal(HubError)


def test_nor_does_one_that_fails_once_it_has_named_the_commit(gsm8k: HubServer) -> None:
    load(GSM8K, "main")
    gsm8k.commit(AT_HUB, {"main/test-00000-of-00001.parquet": parquet_of(rows_of("new"))})
    for part in ("/resolve/", "/tree/"):
        gsm8k.misbehave("status", part, times=None, status=403)
    assert refusal(HubError) == f"{AT_HUB}: was not to be had as of commit {gsm8k.head(AT_HUB)}; run again"


def test_offline_another_revision_is_not_what_happens_to_be_there(
    gsm8k: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(GSM8K, "main")
    go_offline(monkeypatch)
    assert refusal(HubError, f"{GSM8K}@v1") == f"{AT_HUB}@v1: was not to be had as of commit v1; run again"


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
def test_files_that_are_no_rows_are_said(
    hub: HubServer, files: dict[str, bytes], why: str, logged: pytest.LogCaptureFixture
) -> None:
    hub.commit("datasets/org/bad", files)
    said = refusal(DataError, "org/bad", subset=None)
    assert said.startswith(f"org/bad: cannot be used so ({why}")
    assert said.endswith(f"; {NAME_IT}")
    assert logged.messages == []


def test_a_folder_of_its_name_is_not_the_dataset(
    gsm8k: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / GSM8K).mkdir(parents=True)
    (tmp_path / GSM8K / "test.csv").write_text("question\nanother?\n")
    monkeypatch.chdir(tmp_path)
    assert load(f"{GSM8K}@main", "main") == rows_of("main", "test")
