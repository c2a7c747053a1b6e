"""A repository is evaluated like a folder: checked before any request, downloaded when needed, identified by commit."""

import json
from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir

from slrmerge.errors import OutputError, UnsupportedModelError
from slrmerge.evaluation.run import evaluate
from tests.checkpoint.hub.conftest import CHAT
from tests.checkpoint.hub.server import HubServer
from tests.conftest import TINY
from tests.merging.faults import snapshot
from tests.problems import refused

pytestmark = pytest.mark.usefixtures("sketched")


def sample(out: Path, model: str | Path) -> dict[tuple[str, int], tuple[str, str]]:
    """The text and the model id of each sample of an evaluation of one model."""
    evaluate("open-qa", TINY / "questions.json", {"post": model}, out, questions=2, samples=4, max_tokens=4)
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return {(line["prompt"], line["sample"]): (line["text"], line["settings"]["model_id"]) for line in lines}


def test_a_repository_gives_the_samples_of_its_files_in_a_folder(hub: HubServer, tmp_path: Path) -> None:
    hub.commit(CHAT, snapshot(TINY / "posttrained"))
    there, here = sample(tmp_path / "there", CHAT), sample(tmp_path / "here", TINY / "posttrained")
    assert {key: text for key, (text, _) in there.items()} == {key: text for key, (text, _) in here.items()}
    assert {model_id for _, model_id in there.values()} == {f"{CHAT}@{hub.head(CHAT)}"}


def test_another_commit_is_another_model(hub: HubServer, tmp_path: Path) -> None:
    hub.commit(CHAT, snapshot(TINY / "posttrained"))
    sample(tmp_path / "out", CHAT)
    hub.commit(CHAT, {"notes.txt": b"retrained"})
    with refused(OutputError, "settings-changed"):
        sample(tmp_path / "out", CHAT)


def test_a_repository_without_chat_template_is_refused_before_its_weights_are_downloaded(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.commit(CHAT, {name: data for name, data in snapshot(TINY / "posttrained").items() if name[-6:] != ".jinja"})
    with pytest.raises(UnsupportedModelError):
        sample(tmp_path / "out", CHAT)
    cached = {file.file_name for repo in scan_cache_dir().repos for rev in repo.revisions for file in rev.files}
    assert not any(name.endswith(".safetensors") for name in cached)
