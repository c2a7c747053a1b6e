"""A repository is asked as a folder is: checked before anything is asked, fetched whole when it is, known by commit."""

import json
from pathlib import Path

from huggingface_hub import scan_cache_dir

from tests.cli import run
from tests.conftest import TINY
from tests.hub.conftest import CHAT, files_of
from tests.hub.server import HubServer

QUESTIONS = TINY / "questions.json"


def evaluate(out: Path, model: object) -> int:
    sampling = ["--questions", 2, "--samples", 4, "--max-tokens", 4]
    result = run("eval", "open-qa", "--data", QUESTIONS, "--model", f"post={model}", "--out", out, *sampling)
    return result.exit_code


def samples(out: Path) -> dict[tuple[str, int], tuple[str, str]]:
    """What was said and by whom, by prompt and sample."""
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return {(line["prompt"], line["sample"]): (line["text"], line["settings"]["asked_of"]) for line in lines}


def test_a_repository_says_what_its_files_say_in_a_folder(hub: HubServer, tmp_path: Path) -> None:
    hub.commit(CHAT, files_of(TINY / "posttrained"))
    assert evaluate(tmp_path / "there", CHAT) == 0
    assert evaluate(tmp_path / "here", TINY / "posttrained") == 0
    there, here = samples(tmp_path / "there"), samples(tmp_path / "here")
    assert {key: text for key, (text, _) in there.items()} == {key: text for key, (text, _) in here.items()}
    assert {asked_of for _, asked_of in there.values()} == {f"{CHAT}@{hub.head(CHAT)}"}


def test_another_commit_is_another_model(hub: HubServer, tmp_path: Path) -> None:
    hub.commit(CHAT, files_of(TINY / "posttrained"))
    assert evaluate(tmp_path / "out", CHAT) == 0
    hub.commit(CHAT, {"notes.txt": b"retrained"})
    assert evaluate(tmp_path / "out", CHAT) == 6


def test_one_that_cannot_be_asked_is_refused_before_its_weights_are_fetched(hub: HubServer, tmp_path: Path) -> None:
    hub.commit(CHAT, {name: data for name, data in files_of(TINY / "posttrained").items() if name[-6:] != ".jinja"})
    assert evaluate(tmp_path / "out", CHAT) == 12
    cached = {file.file_name for repo in scan_cache_dir().repos for rev in repo.revisions for file in rev.files}
    assert not any(name.endswith(".safetensors") for name in cached)
