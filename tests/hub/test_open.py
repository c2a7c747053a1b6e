"""A repository is opened like a folder: headers only, pinned to one commit, everything wrong with it in words."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, snapshot_download

import slrmerge
from slrmerge.checkpoint import CheckpointReader
from slrmerge.errors import CheckpointError, HubError
from slrmerge.hub import open_checkpoint, open_pair
from slrmerge.repository import Repository
from tests.checkpoints import safetensors_bytes
from tests.cli import run
from tests.hub.conftest import CHAT, HubPair
from tests.hub.server import HubServer, environment, use

CONFIG = b'{"num_hidden_layers": 6}'
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def test_a_repository_reads_as_the_folder_it_was_made_from(pair: HubPair) -> None:
    here, there = open_checkpoint(pair.folder / "post"), open_checkpoint(CHAT)
    assert (dict(there.items()), there.weight_map, there.config) == (dict(here.items()), here.weight_map, here.config)
    assert {name: shard.header_digest for name, shard in there.shards.items()} == {
        name: shard.header_digest for name, shard in here.shards.items()
    }
    assert (there.model_name, str(there)) == (CHAT, f"{CHAT}@{pair.hub.head(CHAT)[:7]}")


def test_opening_fetches_headers_and_small_files_and_no_weights(pair: HubPair) -> None:
    pair.hub.requests.clear()
    checkpoint = open_checkpoint(CHAT)
    headers = sum(shard.data_start for shard in checkpoint.shards.values())
    assert pair.hub.served("^/blobs/") == headers
    fetched = {request.path.rpartition("/")[2] for request in pair.hub.requests if request.served_bytes}
    assert {"config.json", "model.safetensors.index.json", "README.md"} < fetched
    assert "tokenizer.json" not in fetched


@pytest.mark.parametrize("revision", ["main", "v1", "work", "commit", None])
def test_a_branch_a_tag_and_a_commit_name_the_commit_they_are_at(pair: HubPair, revision: str | None) -> None:
    first = pair.hub.head(CHAT)
    pair.hub.tag(CHAT, "v1")
    second = pair.hub.commit(CHAT, {"config.json": CONFIG}, branch="work")
    expected = second if revision == "work" else first
    found = open_checkpoint(Repository(CHAT, first if revision == "commit" else revision))
    assert found.snapshot is not None
    assert (found.snapshot.commit, found.snapshot.pinned) == (expected, Repository(CHAT, expected))


def test_what_was_opened_stays_what_it_was_when_the_branch_moves_on(pair: HubPair) -> None:
    checkpoint = open_checkpoint(CHAT)
    pair.hub.commit(CHAT, dict.fromkeys(checkpoint.shards) | {"model.safetensors": b"another model"})
    name = "model.norm.weight"
    buffer = bytearray(checkpoint[name].nbytes)
    with CheckpointReader(checkpoint) as reader:
        reader.read_into(name, 0, memoryview(buffer))
    assert bytes(buffer) == pair.post[name].data


def test_one_commit_is_not_two_checkpoints(pair: HubPair) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_pair(Repository(CHAT), Repository(CHAT, "main"))
    assert str(caught.value) == (
        f"{CHAT}@main: is the same commit as {CHAT}; "
        "name the commit, or the repository, that the other was trained from"
    )


def test_two_commits_of_a_repository_are_two_checkpoints(pair: HubPair) -> None:
    pair.hub.commit(CHAT, {"config.json": CONFIG}, branch="work")
    first, second = open_pair(Repository(CHAT, "main"), Repository(CHAT, "work"))
    assert first.weight_map == second.weight_map


def refusal(written: str) -> str:
    with pytest.raises((HubError, CheckpointError)) as caught:
        open_checkpoint(written)
    return str(caught.value)


def test_a_repository_that_is_not_there_is_said(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remedy = f"check the name; if it is private, {LOG_IN}"
    assert refusal("org/nope") == f"org/nope: is no folder here, and no public repository on the Hub; {remedy}"
    hub.tokens["hf_ann"] = "ann"
    use(monkeypatch, hub, tmp_path / "cache", "hf_ann")
    what = "is no folder here, and no repository on the Hub that your token may see"
    assert refusal("org/nope") == f"org/nope: {what}; check the name"


def test_a_private_repository_is_for_those_who_may_see_it(
    pair: HubPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.hub.private.add(CHAT)
    assert "no public repository on the Hub" in refusal(CHAT)
    pair.hub.tokens |= {"hf_ann": "ann", "hf_org": "org"}
    use(monkeypatch, pair.hub, tmp_path / "cache", "hf_ann")
    assert "that your token may see" in refusal(CHAT)
    use(monkeypatch, pair.hub, tmp_path / "cache", "hf_org")
    assert open_checkpoint(CHAT).model_name == CHAT


def test_a_gated_repository_says_how_to_get_in(pair: HubPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.hub.gated.add(CHAT)
    where = f"{CHAT}@{pair.hub.head(CHAT)[:7]}"
    said = f"is gated: its owner decides who may read it; ask for access on {pair.hub.url}/{CHAT}"
    assert refusal(CHAT).startswith(where)
    assert refusal(CHAT).endswith(f"{said}, then {LOG_IN}")
    use(monkeypatch, pair.hub, tmp_path / "cache", "hf_of_nobody")
    assert refusal(CHAT).endswith(said)
    pair.hub.tokens["hf_ann"] = "ann"
    use(monkeypatch, pair.hub, tmp_path / "cache", "hf_ann")
    assert open_checkpoint(CHAT).model_name == CHAT


def test_a_revision_that_is_not_there_is_said(pair: HubPair) -> None:
    assert refusal(f"{CHAT}@v9") == (
        f"{CHAT}@v9: has no such revision; the branches and tags are on {pair.hub.url}/{CHAT}/refs"
    )


def test_the_problems_of_both_sides_come_at_once(pair: HubPair) -> None:
    with pytest.raises(HubError) as caught:
        open_pair(Repository("org/nope"), Repository(CHAT, "v9"))
    assert [problem.where for problem in caught.value.problems] == ["org/nope", f"{CHAT}@v9"]


def test_a_hub_that_cannot_be_reached_is_said(hub: HubServer) -> None:
    hub.misbehave("reset", "GET /api/models", times=None)
    why = "RemoteProtocolError: Server disconnected without sending a response."
    assert refusal(CHAT) == (
        f"{CHAT}: cannot be reached at {hub.url} ({why}); "
        "check the network; HF_HUB_OFFLINE=1 takes what is in the Hub's cache"
    )


def test_an_answer_of_somebody_else_is_said(hub: HubServer) -> None:
    hub.misbehave("status", "GET /api/models", times=None, status=200)
    said = refusal(CHAT)
    assert said.startswith(f"{CHAT}: got an answer that makes no sense (")
    assert said.endswith(f"); see whether {hub.url} is the Hub")


def test_a_cache_that_cannot_be_made_is_said(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/no-such-place")
    assert refusal(CHAT).endswith(f"needed for {CHAT}; HF_HUB_CACHE may name a folder of yours")


def test_a_repository_without_a_config_is_named(pair: HubPair) -> None:
    commit = pair.hub.commit(CHAT, {"config.json": None})
    assert refusal(CHAT) == f"{CHAT}@{commit[:7]}/config.json: is missing; a checkpoint needs it to be loaded"


def test_templates_in_folders_go_along_and_what_else_is_in_folders_does_not(pair: HubPair) -> None:
    pair.hub.commit(CHAT, {"additional_chat_templates/tools.jinja": b"{{ x }}", "onnx/config.json": b"{}"})
    run(pair.recipe_file(restore=[2, 3]), "--out", pair.out)
    assert (pair.out / "additional_chat_templates" / "tools.jinja").read_bytes() == b"{{ x }}"
    assert not (pair.out / "onnx").exists()


def test_ctrl_c_does_not_wait_while_a_repository_is_opened(pair: HubPair) -> None:
    pair.hub.misbehave("status", "GET /blobs/", times=None, status=429, headers={"Retry-After": "250"})
    env = os.environ | environment(pair.hub, pair.folder / "cache")
    # Ctrl-C is ignored where the suite itself runs in the background, so the child listens to it again.
    body = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import slrmerge.__main__"
    with subprocess.Popen([sys.executable, "-c", body, "inspect", CHAT], env=env) as child:
        try:
            deadline = time.monotonic() + 60
            while not any(request.host == "cdn" for request in pair.hub.requests):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(0.2)
            child.send_signal(signal.SIGINT)
            assert child.wait(30) == 130
        finally:
            child.kill()


def test_a_hub_in_trouble_is_asked_again(pair: HubPair) -> None:
    pair.hub.misbehave("status", "GET /api/models", status=503, times=2)
    pair.hub.misbehave("status", "GET /api/models", status=429, headers={"Retry-After": "0"})
    pair.hub.misbehave("reset", "HEAD .*config.json")
    assert open_checkpoint(CHAT).model_name == CHAT


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"pytorch_model.bin": b"x"},
            (
                'has pickles only, no safetensors; convert it: python -c "import transformers as t; '
                "t.AutoModelForCausalLM.from_pretrained('org/odd').save_pretrained('odd-safetensors')\""
            ),
        ),
        ({"model.gguf": b"x"}, "has GGUF files only, no safetensors; name the original checkpoint"),
        (
            {"adapter_config.json": b'{"base_model_name_or_path": "org/base"}', "adapter_model.safetensors": b"x"},
            "is an adapter for org/base; merge it into that base first (PEFT merge_and_unload)",
        ),
        (
            {"original/model.safetensors": b"x"},
            "has no safetensors files; name a folder with config.json and safetensors files",
        ),
    ],
)
def test_a_repository_that_is_no_model_is_said_to_be_what_it_is(
    hub: HubServer, files: dict[str, bytes], said: str
) -> None:
    commit = hub.commit("org/odd", {"config.json": CONFIG, **files})
    assert refusal("org/odd") == f"org/odd@{commit[:7]}: {said}"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "is a Git LFS pointer, not the weights; fetch them with: git lfs pull",
        ),
        (b"short", "is cut short at 5 bytes, inside its header; fetch it again"),
        (
            (10**9).to_bytes(8, "little") + bytes(64),
            "is cut short at 72 bytes, inside its header; fetch it again",
        ),
        ((2).to_bytes(8, "little") + b"{]", "has a header that is not sound JSON"),
    ],
)
def test_a_file_that_is_no_safetensors_is_said_to_be_what_it_is(hub: HubServer, data: bytes, said: str) -> None:
    commit = hub.commit("org/odd", {"config.json": CONFIG, "model.safetensors": data})
    assert refusal("org/odd").startswith(f"org/odd@{commit[:7]}/model.safetensors: {said}")


def test_a_shard_that_the_index_names_and_the_repository_lacks_is_said(pair: HubPair) -> None:
    pair.hub.commit(CHAT, {"model-00002-of-00002.safetensors": None})
    assert "model-00002-of-00002.safetensors: is in the index but not in the folder" in refusal(CHAT)


def test_files_in_the_cache_are_taken_from_there(pair: HubPair) -> None:
    snapshot_download(CHAT, allow_patterns="model-00001*")
    pair.hub.requests.clear()
    checkpoint = open_checkpoint(CHAT)
    remote = {name: shard.remote is not None for name, shard in checkpoint.shards.items()}
    assert remote == {"model-00001-of-00002.safetensors": False, "model-00002-of-00002.safetensors": True}
    assert pair.hub.served("^/blobs/") == checkpoint.shards["model-00002-of-00002.safetensors"].data_start


def test_without_a_network_the_cache_is_all_there_is(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot_download(CHAT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pair.hub.requests.clear()
    checkpoint = open_checkpoint(f"{CHAT}@main")
    assert checkpoint.snapshot is not None
    assert (checkpoint.snapshot.commit, pair.hub.requests) == (pair.hub.head(CHAT), [])


@pytest.mark.parametrize("fetched", [(), ("config.json", "*.index.json", "model-00001*")])
def test_without_a_network_what_is_not_whole_in_the_cache_is_refused(
    pair: HubPair, monkeypatch: pytest.MonkeyPatch, fetched: Any
) -> None:
    if fetched:
        snapshot_download(CHAT, allow_patterns=fetched)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(f"{CHAT}@main").splitlines()[0] == (
        f"{CHAT}@main: is not whole in the Hub's cache, and HF_HUB_OFFLINE is set; "
        f"fetch it where there is a network: hf download {CHAT} --revision main"
    )


def test_the_package_opens_repositories_and_folders_alike(pair: HubPair) -> None:
    opened = [slrmerge.open_checkpoint(source) for source in (CHAT, Repository(CHAT), str(pair.folder / "post"))]
    assert len({checkpoint.parameters for checkpoint in opened}) == 1


def test_inspect_shows_a_repository(pair: HubPair) -> None:
    here, there = run("inspect", pair.folder / "post"), run("inspect", CHAT)
    assert there.stdout.splitlines()[1:] == here.stdout.splitlines()[1:]
    assert there.stdout.splitlines()[0] == f"{CHAT}@{pair.hub.head(CHAT)[:7]}: LlamaForCausalLM"
    assert run("inspect", "org/nope").exit_code == 14


def test_a_repository_in_one_file_needs_no_index(hub: HubServer, pair: HubPair) -> None:
    config = b'{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 6}'
    hub.commit("org/one", {"config.json": config, "model.safetensors": safetensors_bytes(pair.post)})
    assert open_checkpoint("org/one").weight_map.keys() == pair.post.keys()
