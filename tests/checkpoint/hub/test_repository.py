"""A repository opens like a folder: headers only, pinned to one commit, refused with every problem in it."""

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, scan_cache_dir, snapshot_download

from slrmerge.checkpoint.hub import errors
from slrmerge.checkpoint.hub.file import HubFile, cache_folder
from slrmerge.checkpoint.hub.repository import HubRepository, current_commit, open_cached, open_repository, pin
from slrmerge.checkpoint.location import Repository
from slrmerge.checkpoint.opening import open_checkpoint, open_pair
from slrmerge.errors import CheckpointError, HubError, NoSpaceError, Problem, SlrmergeError
from slrmerge.io.progress import Progress
from tests.checkpoint import read
from tests.checkpoint.hub.conftest import BASE, CHAT, HubPair
from tests.checkpoint.hub.server import HubServer, environment, use
from tests.checkpoints import Tensor, safetensors_bytes
from tests.merging.faults import Recorder
from tests.problems import refused

CONFIG = b'{"num_hidden_layers": 6}'
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def opened(source: str) -> HubRepository:
    checkpoint = open_checkpoint(source)
    assert isinstance(checkpoint, HubRepository)
    return checkpoint


def refusal(source: str, code: str, error: type[SlrmergeError] = HubError) -> Problem:
    """The only problem with a repository, which has this code."""
    with refused(error, code) as caught:
        open_checkpoint(source)
    (problem,) = caught.value.problems
    return problem


def weights(checkpoint: HubRepository) -> dict[str, bytes]:
    with checkpoint.open() as reader:
        return {name: read(reader, name) for name in checkpoint}


def data(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.data for name, tensor in tensors.items()}


def test_a_repository_reads_like_the_folder_it_was_made_from(pair: HubPair) -> None:
    here, there = open_checkpoint(pair.folder / "post"), opened(CHAT)
    assert (dict(there), there.weight_map, there.config) == (dict(here), here.weight_map, here.config)
    assert there.fingerprint() == here.fingerprint()
    assert (there.model_name, str(there)) == (CHAT, f"{CHAT}@{pair.hub.head(CHAT)[:7]}")
    assert there.reference == f"{CHAT}@{pair.hub.head(CHAT)}"
    assert weights(there) == data(pair.post)


def test_a_repository_is_a_mapping_and_has_a_short_repr(pair: HubPair) -> None:
    checkpoint = opened(CHAT)
    assert list(checkpoint) == list(pair.post)
    assert len(checkpoint) == len(pair.post)
    assert ("model.norm.weight" in checkpoint, "x" in checkpoint) == (True, False)
    assert repr(checkpoint).startswith(f"<HubRepository {checkpoint}: {len(pair.post)} tensors, ")
    assert "\n" not in repr(checkpoint)


def test_a_pickled_repository_is_equal_and_readable(pair: HubPair) -> None:
    checkpoint = opened(CHAT)
    copy = pickle.loads(pickle.dumps(checkpoint))
    assert (type(copy), copy) == (HubRepository, checkpoint)
    assert weights(copy) == data(pair.post)
    both = open_pair(BASE, pair.folder / "post")
    with pickle.loads(pickle.dumps(both)).open() as readers:
        assert read(readers.pretrained, "lm_head.weight") == pair.pre["lm_head.weight"].data
        assert read(readers.posttrained, "lm_head.weight") == pair.post["lm_head.weight"].data
    assert pickle.loads(pickle.dumps(both)) == both


def test_repositories_are_equal_at_one_commit_under_one_revision(pair: HubPair) -> None:
    checkpoint = opened(CHAT)
    assert checkpoint == opened(CHAT)
    assert checkpoint != opened(BASE)
    pair.hub.commit(CHAT, {"notes.txt": b"x"})
    assert checkpoint != opened(CHAT)
    assert checkpoint.identity == opened(CHAT).identity


def test_opening_downloads_headers_and_small_files_but_no_weights(pair: HubPair) -> None:
    pair.hub.requests.clear()
    checkpoint = opened(CHAT)
    headers = sum(shard.data_start for shard in checkpoint.shards.values())
    assert pair.hub.served("^/blobs/") == headers
    downloaded = {request.path.rpartition("/")[2] for request in pair.hub.requests if request.served_bytes}
    assert {"config.json", "model.safetensors.index.json", "README.md"} < downloaded
    assert "tokenizer.json" not in downloaded
    assert checkpoint.is_remote


@pytest.mark.parametrize("revision", ["main", "v1", "work", "commit", None])
def test_a_branch_a_tag_and_a_commit_are_revisions(pair: HubPair, revision: str | None) -> None:
    first = pair.hub.head(CHAT)
    pair.hub.tag(CHAT, "v1")
    second = pair.hub.commit(CHAT, {"config.json": CONFIG}, branch="work")
    expected = second if revision == "work" else first
    snapshot = open_repository(Repository(CHAT, first if revision == "commit" else revision)).snapshot
    assert (snapshot.commit, snapshot.pinned) == (expected, Repository(CHAT, expected))


def test_an_open_repository_stays_at_its_commit(pair: HubPair) -> None:
    checkpoint = opened(CHAT)
    pair.hub.commit(CHAT, dict.fromkeys(checkpoint.shards) | {"model.safetensors": b"another model"})
    assert weights(checkpoint) == data(pair.post)


def test_a_pin_lists_files_with_sizes_and_digests(pair: HubPair) -> None:
    pair.hub.commit(CHAT, {"additional_chat_templates/tools.jinja": b"{{ x }}", "onnx/config.json": b"{}"})
    snapshot = pin(Repository(CHAT))
    names = {path.name for path in (pair.folder / "post").iterdir()}
    assert snapshot.files.keys() == names | {"additional_chat_templates/tools.jinja"}
    for name in names:
        file = snapshot.files[name]
        assert file.file_bytes == (pair.folder / "post" / name).stat().st_size
        assert file.repository == snapshot.pinned
        assert file.digest.startswith("sha256:" if name.endswith(".safetensors") else "git-sha1:")


def test_one_commit_is_not_two_checkpoints(pair: HubPair) -> None:
    with refused(CheckpointError, "same-checkpoint"):
        open_pair(Repository(CHAT), Repository(CHAT, "main"))


def test_two_commits_of_a_repository_are_two_checkpoints(pair: HubPair) -> None:
    pair.hub.commit(CHAT, {SECOND: None, FIRST: None, "model.safetensors.index.json": None}, branch="work")
    pair.hub.commit(CHAT, {"model.safetensors": safetensors_bytes(pair.pre)}, branch="work")
    both = open_pair(Repository(CHAT, "main"), Repository(CHAT, "work"))
    assert both.pretrained.keys() == both.posttrained.keys()


def test_a_pointer_that_was_uploaded_as_weights_cannot_be_pulled(pair: HubPair) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1000000\n"
    pair.hub.commit(CHAT, dict.fromkeys(opened(CHAT).shards) | {"model.safetensors": pointer})
    pair.hub.commit(CHAT, {"model.safetensors.index.json": None})
    found = refusal(CHAT, "not-safetensors", CheckpointError)
    assert "git lfs" not in found.remedy
    (pair.folder / "pointer").mkdir()
    (pair.folder / "pointer/config.json").write_bytes(b"{}")
    (pair.folder / "pointer/model.safetensors").write_bytes(pointer)
    assert "git lfs" in refusal(str(pair.folder / "pointer"), "not-safetensors", CheckpointError).remedy


def test_a_missing_repository_is_refused(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "hf auth login" in refusal("org/nope", "repository-not-found").remedy
    hub.tokens["hf_ann"] = "ann"
    use(monkeypatch, hub, tmp_path / "cache", "hf_ann")
    problem = refusal("org/nope", "repository-not-found")
    assert (problem.where, "hf auth login" in problem.remedy) == ("org/nope", False)


def test_a_private_repository_is_visible_to_its_owner_only(
    pair: HubPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.hub.private.add(CHAT)
    refusal(CHAT, "repository-not-found")
    pair.hub.tokens |= {"hf_ann": "ann", "hf_org": "org"}
    use(monkeypatch, pair.hub, tmp_path / "cache", "hf_ann")
    refusal(CHAT, "repository-not-found")
    use(monkeypatch, pair.hub, tmp_path / "cache", "hf_org")
    assert opened(CHAT).model_name == CHAT


def test_a_gated_repository_says_how_to_get_access(
    pair: HubPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.hub.gated.add(CHAT)
    problem = refusal(CHAT, "gated-repository")
    assert problem.where.startswith(f"{CHAT}@{pair.hub.head(CHAT)[:7]}")
    assert f"{pair.hub.url}/{CHAT}" in problem.remedy
    assert "hf auth login" in problem.remedy
    use(monkeypatch, pair.hub, tmp_path / "cache", "hf_of_nobody")
    assert "hf auth login" not in refusal(CHAT, "gated-repository").remedy
    pair.hub.tokens["hf_ann"] = "ann"
    use(monkeypatch, pair.hub, tmp_path / "cache", "hf_ann")
    assert opened(CHAT).model_name == CHAT


def test_a_missing_revision_is_refused(pair: HubPair) -> None:
    problem = refusal(f"{CHAT}@v9", "revision-not-found")
    assert (problem.where, f"{pair.hub.url}/{CHAT}/refs" in problem.remedy) == (f"{CHAT}@v9", True)


def test_an_impossible_repository_name_is_refused(hub: HubServer) -> None:
    with refused(HubError, "invalid-repository"):
        open_checkpoint(Repository("org/" + "x" * 300))
    assert hub.requests == []


def test_the_problems_of_both_sides_are_reported_at_once(pair: HubPair) -> None:
    with refused(HubError, "repository-not-found", "revision-not-found") as caught:
        open_pair(Repository("org/nope"), Repository(CHAT, "v9"))
    assert [problem.where for problem in caught.value.problems] == ["org/nope", f"{CHAT}@v9"]


def test_an_unreachable_hub_is_reported(hub: HubServer) -> None:
    hub.misbehave("reset", "GET /api/models", times=None)
    refusal(CHAT, "hub-unreachable")
    assert len(hub.requests) == errors.MAX_ATTEMPTS


@pytest.mark.parametrize("match", ["GET /api/models/org/chat$", "GET /api/models/org/chat/tree"])
def test_a_response_that_is_not_from_a_hub_is_reported(pair: HubPair, match: str) -> None:
    pair.hub.misbehave("status", match, times=None, status=200)
    problem = refusal(CHAT, "unexpected-response")
    assert pair.hub.url in problem.remedy


def test_a_cache_without_write_permission_is_reported(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/no-such-place")
    assert CHAT in refusal(CHAT, "cache-unusable").remedy


def test_a_repository_without_commits_is_refused(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    info = SimpleNamespace(sha=None)
    client = SimpleNamespace(model_info=lambda *_, **__: info)
    monkeypatch.setattr("slrmerge.checkpoint.hub.repository.client", lambda: client)
    refusal("org/empty", "empty-repository")


def test_a_repository_without_a_config_is_refused(pair: HubPair) -> None:
    commit = pair.hub.commit(CHAT, {"config.json": None})
    assert refusal(CHAT, "no-config", CheckpointError).where == f"{CHAT}@{commit[:7]}/config.json"


def test_chat_templates_in_folders_are_side_files_and_other_folders_are_not(pair: HubPair) -> None:
    pair.hub.commit(CHAT, {"additional_chat_templates/tools.jinja": b"{{ x }}", "onnx/config.json": b"{}"})
    side_files = opened(CHAT).side_files
    assert sorted(side_files) == ["additional_chat_templates/tools.jinja", "config.json", "tokenizer.json"]
    assert side_files["additional_chat_templates/tools.jinja"].fetch().read_bytes() == b"{{ x }}"


def test_ctrl_c_does_not_wait_while_a_repository_is_opened(pair: HubPair) -> None:
    pair.hub.misbehave("status", "GET /blobs/", times=None, status=429, headers={"Retry-After": "250"})
    env = os.environ | environment(pair.hub, pair.folder / "cache")
    # Ctrl-C is ignored where the suite itself runs in the background, so the child listens to it again.
    body = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from slrmerge.checkpoint.opening import open_checkpoint
try:
    open_checkpoint({CHAT!r})
except KeyboardInterrupt:
    raise SystemExit(130)
"""
    with subprocess.Popen([sys.executable, "-c", body], env=env) as child:
        try:
            deadline = time.monotonic() + 60
            while not any(request.host == "cdn" for request in pair.hub.requests):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            child.send_signal(signal.SIGINT)
            assert child.wait(30) == 130
        finally:
            child.kill()


def test_an_overloaded_hub_is_retried(pair: HubPair) -> None:
    pair.hub.misbehave("status", "GET /api/models", status=503, times=2)
    pair.hub.misbehave("status", "GET /api/models", status=429, headers={"Retry-After": "0"})
    pair.hub.misbehave("status", "GET /api/models/org/chat/tree", status=503, times=2)
    pair.hub.misbehave("reset", "HEAD .*config.json")
    assert opened(CHAT).model_name == CHAT


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"pytorch_model.bin": b"x"}, "pickles-only"),
        ({"model.gguf": b"x"}, "gguf-only"),
        ({"original/model.safetensors": b"x"}, "no-checkpoint"),
    ],
)
def test_a_repository_without_a_readable_model_is_refused_by_what_it_has(
    hub: HubServer, files: dict[str, bytes], code: str
) -> None:
    commit = hub.commit("org/odd", {"config.json": CONFIG, **files})
    assert refusal("org/odd", code, CheckpointError).where == f"org/odd@{commit[:7]}"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "not-safetensors"),
        (b"short", "truncated"),
        ((10**9).to_bytes(8, "little") + bytes(64), "truncated"),
        ((2).to_bytes(8, "little") + b"{]", "invalid-header"),
    ],
)
def test_a_file_that_is_not_safetensors_is_refused(hub: HubServer, content: bytes, code: str) -> None:
    commit = hub.commit("org/odd", {"config.json": CONFIG, "model.safetensors": content})
    assert refusal("org/odd", code, CheckpointError).where == f"org/odd@{commit[:7]}/model.safetensors"


def test_a_shard_that_the_repository_lacks_is_reported(pair: HubPair) -> None:
    commit = pair.hub.commit(CHAT, {SECOND: None})
    assert refusal(CHAT, "shard-missing", CheckpointError).where == f"{CHAT}@{commit[:7]}/{SECOND}"


def test_cached_files_are_used(pair: HubPair) -> None:
    snapshot_download(CHAT, allow_patterns="model-00001*")
    pair.hub.requests.clear()
    checkpoint = opened(CHAT)
    remote = {name: isinstance(shard.file, HubFile) for name, shard in checkpoint.shards.items()}
    assert remote == {FIRST: False, SECOND: True}
    assert pair.hub.served("^/blobs/") == checkpoint.shards[SECOND].data_start
    assert weights(checkpoint) == data(pair.post)


def test_a_cached_file_of_another_commit_is_used(pair: HubPair) -> None:
    snapshot_download(CHAT)
    pair.hub.commit(CHAT, {"notes.txt": b"x"})
    assert not opened(CHAT).is_remote


def test_all_weights_are_downloaded_and_verified(pair: HubPair) -> None:
    checkpoint, progress = opened(CHAT), Recorder()
    local = checkpoint.download(progress)
    sizes = [file.file_bytes for file in checkpoint.weight_files.values()]
    assert (local.is_remote, local.verified) == (False, frozenset({FIRST, SECOND}))
    assert (progress.started, progress.advanced) == ([(f"downloading {checkpoint}", sum(sizes))], sum(sizes))
    assert (local.reference, local.fingerprint()) == (checkpoint.reference, checkpoint.fingerprint())
    pair.hub.requests.clear()
    assert weights(local) == data(pair.post)
    assert local.download(progress) == local
    assert pair.hub.requests == []


def test_only_the_named_files_are_downloaded(pair: HubPair) -> None:
    local = opened(CHAT).download(Progress(), [SECOND])
    assert {name: isinstance(shard.file, HubFile) for name, shard in local.shards.items()} == {
        FIRST: True,
        SECOND: False,
    }
    assert (local.verified, local.is_remote) == (frozenset({SECOND}), True)
    cached = {file.file_name for repo in scan_cache_dir().repos for rev in repo.revisions for file in rev.files}
    assert (SECOND in cached, FIRST in cached) == (True, False)
    assert weights(local) == data(pair.post)
    assert local.download(Progress(), []) == local


def test_a_pair_downloads_the_named_files_of_each_side(pair: HubPair) -> None:
    local = open_pair(BASE, CHAT).download(Progress(), {"pretrained": [], "posttrained": [FIRST]})
    assert [side.is_remote for _, side in local.items()] == [True, True]
    assert isinstance(local.posttrained, HubRepository)
    assert local.posttrained.verified == {FIRST}
    assert not local.download(Progress()).is_remote


def test_cached_files_are_compared_with_their_digests_only_on_request(pair: HubPair) -> None:
    folder = Path(snapshot_download(CHAT))
    raw = bytearray((folder / FIRST).read_bytes())
    raw[-1] ^= 1
    (folder / FIRST).write_bytes(raw)
    checkpoint = opened(CHAT)
    assert checkpoint.download(Progress()).verified == frozenset()
    assert weights(checkpoint) != data(pair.post)
    checked = checkpoint.download(Progress(), recheck=True)
    assert checked.verified == {FIRST, SECOND}
    assert weights(checked) == data(pair.post)


def test_a_download_with_another_header_than_before_is_refused(pair: HubPair) -> None:
    checkpoint = opened(CHAT)
    shard = checkpoint.shards[FIRST]
    object.__setattr__(shard, "header_digest", "another")
    with refused(HubError, "header-changed") as caught:
        checkpoint.download(Progress())
    assert caught.value.problems[0].where == str(shard.file)


def test_a_damaged_download_is_refused(pair: HubPair) -> None:
    checkpoint = opened(CHAT)
    pair.hub.misbehave("corrupt", "GET /blobs/", times=None)
    with refused(HubError, "digest-mismatch"):
        checkpoint.download(Progress())


def test_a_download_that_would_not_fit_is_refused_before_it_starts(
    pair: HubPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, progress = opened(CHAT), Recorder()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    pair.hub.requests.clear()
    with refused(NoSpaceError, "no-space") as caught:
        checkpoint.download(progress)
    assert (caught.value.problems[0].where, pair.hub.requests, progress.started) == (constants.HF_HUB_CACHE, [], [])


def test_a_pair_that_would_not_fit_is_refused_before_either_side_is_downloaded(
    pair: HubPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, progress = open_pair(BASE, CHAT), Recorder()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=500_000))  # one side would fit
    with refused(NoSpaceError, "no-space"):
        both.download(progress)
    assert progress.started == []
    assert not both["pretrained"].download(progress).is_remote


@pytest.mark.parametrize("name", ["org/a--b", "org/a..b", f"org/{'x' * 97}"])
def test_a_name_that_the_hub_does_not_allow_is_an_error_without_it_too(name: str) -> None:
    with pytest.raises(HubError) as caught:
        open_checkpoint(name, local_files_only=True)
    assert [problem.code for problem in caught.value.problems] == ["invalid-repository"]


@pytest.mark.parametrize("offline", [True, False], ids=["HF_HUB_OFFLINE", "local_files_only"])
def test_without_a_network_a_repository_opens_from_the_cache(
    pair: HubPair, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    snapshot_download(CHAT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    pair.hub.requests.clear()
    checkpoint = open_checkpoint(f"{CHAT}@main", local_files_only=not offline)
    assert isinstance(checkpoint, HubRepository)
    assert checkpoint.reference == f"{CHAT}@{pair.hub.head(CHAT)}"
    assert weights(checkpoint) == data(pair.post)
    assert checkpoint.download(Progress(), recheck=True) == checkpoint
    assert pickle.loads(pickle.dumps(checkpoint)) == checkpoint
    assert pair.hub.requests == []


def test_a_branch_that_was_opened_is_known_without_a_network(pair: HubPair) -> None:
    opened(CHAT).download(Progress())
    snapshot = open_cached(Repository(CHAT)).snapshot
    assert (snapshot.commit, str(snapshot)) == (pair.hub.head(CHAT), f"{CHAT}@{pair.hub.head(CHAT)[:7]}")


def test_the_commit_of_a_branch_is_known_without_a_network(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    online = current_commit(Repository(CHAT))
    assert online == pair.hub.head(CHAT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pair.hub.requests.clear()
    assert (current_commit(Repository(CHAT)), pair.hub.requests) == (online, [])
    with refused(HubError, "not-cached"):
        current_commit(Repository(BASE))


@pytest.mark.parametrize("cached", [(), ("config.json", "*.index.json", "model-00001*")])
def test_without_a_network_an_incomplete_cache_is_refused(
    pair: HubPair, monkeypatch: pytest.MonkeyPatch, cached: Any
) -> None:
    if cached:
        snapshot_download(CHAT, allow_patterns=cached)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with refused(HubError, "not-cached", *(["shard-missing"] if cached else [])) as caught:
        open_checkpoint(f"{CHAT}@main")
    problem = caught.value.problems[0]
    assert (problem.where, f"hf download {CHAT} --revision main" in problem.remedy) == (f"{CHAT}@main", True)


def test_without_a_network_a_note_that_is_no_commit_is_an_incomplete_cache(
    pair: HubPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(CHAT)
    (cache_folder(Repository(CHAT)) / "refs" / "main").write_bytes(b"\xff\xfe")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with refused(HubError, "not-cached"):
        open_checkpoint(CHAT)
    assert current_commit(Repository(CHAT))  # some text


@pytest.mark.parametrize("offline", [True, False])
def test_a_revision_that_leads_out_of_the_cache_is_refused(
    pair: HubPair, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    repository = Repository(CHAT, "../../../elsewhere")
    honest = pin(Repository(CHAT))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("slrmerge.checkpoint.hub.repository.pin", lambda _: replace(honest, repository=repository))
    with refused(HubError, "revision-not-found"):
        current_commit(repository)


def test_a_rate_limit_of_days_is_not_waited_for(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    pair.hub.misbehave("status", "/tree/", status=429, headers={"RateLimit": '"api";r=0;t=99999'})
    opened(CHAT)
    assert 0 < max(waits) <= 300


def test_requests_are_refused_offline(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    file = opened(CHAT).snapshot.files["tokenizer.json"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with refused(HubError, "offline"):
        file.fetch()
    with refused(HubError, "offline"):
        pin(Repository(CHAT))


def test_a_checkpoint_opens_from_a_string_a_repository_or_itself(pair: HubPair) -> None:
    checkpoint = opened(CHAT)
    assert open_checkpoint(Repository(CHAT)) == checkpoint
    assert open_checkpoint(checkpoint) is checkpoint
    assert open_checkpoint(f"{CHAT}@{pair.hub.head(CHAT)}").identity == checkpoint.identity


def test_a_repository_in_one_file_needs_no_index(hub: HubServer, pair: HubPair) -> None:
    config = b'{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 6}'
    hub.commit("org/one", {"config.json": config, "model.safetensors": safetensors_bytes(pair.post)})
    assert opened("org/one").weight_map == dict.fromkeys(pair.post, "model.safetensors")


def test_a_full_disk_is_reported_while_a_repository_is_opened(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", full)
    refusal(CHAT, "no-space", NoSpaceError)
