"""A merge of repositories downloads what it needs, once, and equals a merge of folders."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import constants, scan_cache_dir, snapshot_download

from slrmerge import execute, merge, verify
from slrmerge.errors import CheckpointError, HubError, NoSpaceError, VerificationError
from slrmerge.io import pieces
from slrmerge.merging.options import MergeOptions
from tests.checkpoint.hub.conftest import BASE, CHAT, HubPair
from tests.checkpoint.hub.server import HubServer, environment, use
from tests.checkpoints import read_back
from tests.cli import run
from tests.merging.faults import Recorder, Stop, leftovers, snapshot, stop
from tests.merging.plan.test_findings import FIGURE, SUMMARY
from tests.merging.test_manifest import signed
from tests.problems import refused

BLOBS = "GET /blobs/"
RULES: dict[str, dict[str, Any]] = {
    "restoration": {"restore": [2, 3]},
    "soup": {"alpha": 0.25},
    "cast": {"restore": [2, 3], "dtype": "float32"},
    "mixed": {"restore": [1, 2], "layers": [{"range": [3, 5], "alpha": [0.9, 0.1], "modules": ["mlp"]}]},
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces in every shard."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 15)


def shards_in(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in snapshot(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("download", ["ranges", "full"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_a_merge_of_repositories_equals_a_merge_of_folders(
    pair: HubPair, rules: dict[str, Any], size: str, download: str
) -> None:
    there = pair.recipe_file(**rules, max_shard_size=size)
    here = pair.recipe_file("here.yaml", pretrained="./pre", posttrained="./post", **rules, max_shard_size=size)
    merge(there, pair.out, download=download)
    merge(here, pair.folder / "local")
    assert shards_in(pair.out) == shards_in(pair.folder / "local")
    assert snapshot(pair.out).keys() == snapshot(pair.folder / "local").keys()
    assert verify(pair.out, full=True).against_sources


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_served_bytes_stay_within_five_percent_of_what_is_needed(pair: HubPair, rules: dict[str, Any]) -> None:
    recipe = pair.recipe_file(**rules)
    pair.hub.requests.clear()
    merge(recipe, pair.out)
    needed = pair.plan(**rules).read_bytes
    assert needed <= pair.hub.served() <= 1.05 * needed


def test_a_restoration_costs_one_model_and_not_two(pair: HubPair) -> None:
    plan = pair.plan(restore=[2, 3])
    one = sum(file.file_bytes for file in plan.pair.posttrained.weight_files.values())
    side_files = sum(file.file_bytes for file in plan.files if file.source)
    assert one <= plan.download_bytes <= one + side_files
    assert plan.full_download_bytes >= 2 * sum(len(tensor.data) for tensor in pair.post.values())


def test_a_plan_counts_downloads_and_downloads_no_weights(pair: HubPair) -> None:
    pair.hub.requests.clear()
    plan = pair.plan(restore=[2, 3])
    headers = sum(file.data_start for _, side in plan.pair.items() for file in side.shards.values())
    assert pair.hub.served("^/blobs/") == headers
    assert not any(request.path.endswith("tokenizer.json") for request in pair.hub.requests)
    assert (plan.download_bytes, plan.full_download_bytes) == (365026, 730034)


def test_an_unchanged_shard_is_compared_with_the_hubs_digest_without_the_source(pair: HubPair) -> None:
    merge(pair.recipe(restore=[4, 5]), pair.out)
    content = json.loads((pair.out / "slrmerge.json").read_bytes())
    name = "model-00001-of-00002.safetensors"
    digest = hashlib.sha256(pair.hub.files(CHAT)[name]).hexdigest()
    assert {file: entry["sha256"] for file, entry in content["files"].items() if "sha256" in entry} == {name: digest}
    pair.hub.requests.clear()
    result = verify(pair.out)
    assert (result.against_sources, pair.hub.served("^/blobs/")) == (False, 0)
    content["files"][name]["sha256"] = "0" * 64
    (pair.out / "slrmerge.json").write_bytes(signed(content))
    with refused(VerificationError, "sources-differ") as caught:
        verify(pair.out)
    assert caught.value.problems[0].where == str(pair.out / name)


def test_neighbouring_ranges_of_one_side_are_one_request(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A soup reads two ranges for each piece of each shard, and its header; here each shard is one piece."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 24)
    plan = pair.plan(alpha=0.5)
    pair.hub.requests.clear()
    execute(plan, pair.out)
    ranges = [request for request in pair.hub.requests if request.host == "cdn"]
    assert len(ranges) == 3 * len(plan.shards)


def test_a_pickled_plan_of_repositories_is_equal_and_executes(pair: HubPair) -> None:
    plan = pair.plan(alpha=0.25, blend="slerp")
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    pair.hub.requests.clear()
    assert execute(again, pair.out / "again").files == execute(plan, pair.folder / "plain" / "again").files
    assert pair.hub.served("^/blobs/") >= 2 * plan.read_bytes  # both runs read every byte of a slerp twice


def test_cached_files_are_not_downloaded_again(pair: HubPair) -> None:
    for repository in (BASE, CHAT):
        snapshot_download(repository)
    pair.hub.requests.clear()
    merge(pair.recipe(restore=[2, 3]), pair.out)
    assert pair.hub.served() == 0
    assert read_back(pair.out) == pair.mixed(2, 3)
    assert verify(pair.out).against_sources


def test_streaming_leaves_no_second_copy_of_the_weights(pair: HubPair) -> None:
    merge(pair.recipe(restore=[2, 3]), pair.out)
    assert scan_cache_dir().size_on_disk < 10_000


def test_a_full_download_fetches_only_files_that_are_read(pair: HubPair) -> None:
    recipe = pair.recipe(restore=[0, 5], tensors=[{"match": "*", "alpha": 1.0}])
    merge(recipe, pair.out, download="full")
    cached = {file.file_name for repo in scan_cache_dir().repos for rev in repo.revisions for file in rev.files}
    assert {name for name in cached if name.endswith(".safetensors")} == {"model.safetensors"}


def test_a_full_download_that_would_not_fit_is_refused_before_it_starts(
    pair: HubPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pair.plan(restore=[2, 3])
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=700_000))
    pair.hub.requests.clear()
    with refused(NoSpaceError, "no-space") as caught:
        execute(plan, pair.out, options=MergeOptions(download="full"))
    assert caught.value.problems[0].where == constants.HF_HUB_CACHE
    assert pair.hub.served() == 0


def test_the_manifest_pins_commits_and_says_what_was_not_checked(pair: HubPair) -> None:
    merge(pair.recipe(posttrained=f"{CHAT}@main", restore=[2, 3]), pair.out)
    sources = json.loads((pair.out / "slrmerge.json").read_text())["sources"]
    pinned = {key: sources["posttrained"][key] for key in ("model", "repository", "revision", "commit")}
    assert pinned == {"model": CHAT, "repository": CHAT, "revision": "main", "commit": pair.hub.head(CHAT)}
    assert sources["pretrained"]["unchecked"].keys() == {"model.safetensors"}
    assert sources["posttrained"]["unchecked"].keys() == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert all(digest.startswith("sha256:") for side in sources.values() for digest in side["unchecked"].values())
    recipe = yaml.safe_load((pair.out / "slrmerge.yaml").read_text())
    assert recipe["pretrained"] == f"{BASE}@{pair.hub.head(BASE)}"
    assert recipe["posttrained"] == f"{CHAT}@{pair.hub.head(CHAT)}"


def test_the_manifest_of_a_full_download_lists_no_unchecked_files(pair: HubPair) -> None:
    merge(pair.recipe(restore=[2, 3]), pair.out, download="full")
    sources = json.loads((pair.out / "slrmerge.json").read_text())["sources"]
    assert [side["unchecked"] for side in sources.values()] == [{}, {}]


def test_a_recipe_of_a_merge_repeats_it_after_the_branches_moved(pair: HubPair) -> None:
    merge(pair.recipe_file(restore=[2, 3]), pair.out)
    for repository in (BASE, CHAT):
        pair.hub.commit(repository, {"config.json": b'{"num_hidden_layers": 6, "new": true}'})
    merge(pair.out / "slrmerge.yaml", pair.folder / "again")
    assert shards_in(pair.out) == shards_in(pair.folder / "again")
    assert (pair.out / "config.json").read_bytes() == (pair.folder / "again/config.json").read_bytes()


def test_verify_compares_with_the_hub_only_on_request(pair: HubPair) -> None:
    merge(pair.recipe(restore=[2, 3]), pair.out)
    pair.hub.requests.clear()
    result = verify(pair.out)
    assert (result.against_sources, pair.hub.requests) == (False, [])
    assert f"{BASE}@{pair.hub.head(BASE)}" in result.sources
    assert verify(pair.out, full=True).against_sources


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_a_full_verification_detects_bytes_that_were_damaged_in_transit(pair: HubPair, rules: dict[str, Any]) -> None:
    plan = pair.plan(**rules, max_shard_size="100KB")
    pair.hub.misbehave("corrupt", BLOBS, times=None)
    execute(plan, pair.out)
    pair.hub.behave()
    assert verify(pair.out).files > 0
    with refused(VerificationError, "sources-differ"):
        verify(pair.out, full=True)


def test_a_kept_header_that_was_damaged_in_transit_is_noticed(pair: HubPair) -> None:
    plan = pair.plan(restore=[2, 3])
    pair.hub.misbehave("corrupt", BLOBS, times=None)
    with refused(CheckpointError, "header-changed"):
        execute(plan, pair.out, options=MergeOptions(threads=1))
    pair.hub.behave()
    execute(plan, pair.out)
    assert read_back(pair.out) == pair.mixed(2, 3)


def test_a_full_verification_reports_a_damaged_download(pair: HubPair) -> None:
    merge(pair.recipe_file(restore=[2, 3]), pair.out)
    pair.hub.misbehave("corrupt", BLOBS, skip=6, times=None)  # after the headers, the whole files
    with refused(HubError, "digest-mismatch"):
        verify(pair.out, full=True)
    pair.hub.behave()
    assert verify(pair.out, full=True).against_sources


def test_a_full_verification_replaces_a_damaged_source_in_the_cache(pair: HubPair) -> None:
    folder = Path(snapshot_download(BASE))
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    merge(pair.recipe_file(restore=[2, 3], tensors=[{"match": "lm_head.*", "alpha": 1}]), pair.out)
    verify(pair.out)
    with refused(VerificationError, "sources-differ") as caught:
        verify(pair.out, full=True)
    assert "lm_head.weight" in caught.value.problems[0].what


def test_a_full_verification_needs_the_hub(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(pair.recipe_file(restore=[2, 3]), pair.out, download="full")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    verify(pair.out)
    with refused(HubError, "offline"):
        verify(pair.out, full=True)


def test_a_merge_works_without_a_network_from_a_whole_cache(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    for repository in (BASE, CHAT):
        snapshot_download(repository)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    merge(pair.recipe_file(restore=[2, 3]), pair.out)
    assert read_back(pair.out) == pair.mixed(2, 3)


def test_a_folder_and_a_repository_go_together(pair: HubPair) -> None:
    merge(pair.recipe_file(pretrained="./pre", restore=[2, 3]), pair.out)
    assert read_back(pair.out) == pair.mixed(2, 3)
    sources = json.loads((pair.out / "slrmerge.json").read_text())["sources"]
    assert ("commit" in sources["pretrained"], "commit" in sources["posttrained"]) == (False, True)


@pytest.mark.parametrize("kind", ["ignore_range", "wrong_range", "cut", "overlong", "gzip", "reset"])
def test_a_merge_survives_transient_failures(pair: HubPair, kind: Any) -> None:
    plan = pair.plan(restore=[2, 3], max_shard_size="100KB")
    pair.hub.misbehave(kind, BLOBS, times=12)
    pair.hub.misbehave("status", BLOBS, times=6, status=429, headers={"Retry-After": "0"})
    execute(plan, pair.out)
    assert read_back(pair.out) == pair.mixed(2, 3)


def test_a_merge_that_failed_resumes_from_its_finished_pieces(pair: HubPair) -> None:
    plan = pair.plan(restore=[2, 3], max_shard_size="100KB")
    pair.hub.misbehave("status", BLOBS, times=None, status=503, skip=6)
    with refused(HubError, "hub-error") as caught:
        execute(plan, pair.out, options=MergeOptions(threads=1))
    kept = caught.value.__notes__[0]
    assert "pieces are finished and kept" in kept
    assert not pair.out.exists()
    pair.hub.behave()
    pair.hub.requests.clear()
    result = execute(plan, pair.out)
    assert result.resumed_pieces == int(kept.partition(" ")[0]) > 0
    assert pair.hub.served("^/blobs/") <= plan.read_bytes - (result.resumed_pieces - len(plan.shards)) * (1 << 15)
    assert read_back(pair.out) == pair.mixed(2, 3)


def test_a_stopped_merge_downloads_only_the_missing_pieces(pair: HubPair) -> None:
    plan = pair.plan(restore=[2, 3])
    with pytest.raises(Stop):
        execute(plan, pair.out, options=MergeOptions(threads=1), progress=Recorder(10, stop))
    pair.hub.requests.clear()
    recorder = Recorder()
    result = execute(pair.plan(restore=[2, 3]), pair.out, progress=recorder)
    ((_, missing),) = recorder.started
    resumed = sum(shard.file_bytes for shard in plan.shards) - missing
    assert (result.resumed_pieces - 2) << 15 < resumed <= result.resumed_pieces << 15  # a shard's last piece is shorter
    assert result.resumed_pieces > 2
    assert pair.hub.served("^/blobs/") <= missing + 10_000
    assert read_back(pair.out) == pair.mixed(2, 3)
    assert leftovers(pair.out) == []


def test_a_killed_merge_leaves_no_output_and_resumes(pair: HubPair) -> None:
    recipe = pair.recipe_file(restore=[2, 3], max_shard_size="60KB")
    before = 6 + 5  # requests: for headers, and for the first pieces
    pair.hub.misbehave("hang", BLOBS, times=None, skip=before)
    command = [sys.executable, "-m", "slrmerge", recipe, "--out", pair.out, "--threads", "1", "--json"]
    env = os.environ | environment(pair.hub, pair.folder / "cache")
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE) as child:
        deadline = time.monotonic() + 60
        while sum(request.path.startswith("/blobs/") for request in pair.hub.requests) <= before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.kill()
    assert not pair.out.exists()
    pair.hub.behave()
    again = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True)
    assert json.loads(again.stdout)["resumed_pieces"] > 0
    assert read_back(pair.out) == pair.mixed(2, 3)


def test_ctrl_c_does_not_wait_for_a_rate_limit(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrmerge.checkpoint.hub.errors.LONGEST_WAIT_S", 300.0)
    plan = pair.plan(restore=[2, 3])
    pair.hub.misbehave("status", BLOBS, times=None, skip=3, status=429, headers={"Retry-After": "250"})
    started = time.monotonic()
    with pytest.raises(Stop):
        execute(plan, pair.out, progress=Recorder(2, stop))
    assert time.monotonic() - started < 60


def test_a_token_is_never_shown_and_never_leaves_the_hub(
    pair: HubPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    pair.hub.tokens["hf_secret"] = "org"
    pair.hub.private |= {BASE, CHAT}
    use(monkeypatch, pair.hub, tmp_path / "cache", "hf_secret")
    pair.hub.misbehave("status", BLOBS, skip=6, status=503)
    results = [run(pair.recipe_file(restore=[2, 3]), "--out", pair.out)]
    pair.hub.misbehave("status", "GET", times=None, status=403)
    results += [run("verify", pair.out, "--full"), run("inspect", CHAT)]
    assert [result.exit_code for result in results] == [0, 14, 14]
    said = "".join([*(result.output for result in results), caplog.text, *map(repr, snapshot(pair.out).values())])
    assert "secret" not in said
    assert {r.headers.get("authorization") for r in pair.hub.requests if r.host == "cdn"} == {None}


@pytest.mark.parametrize("status", [503, 403])
def test_a_hub_that_fails_during_a_full_verification_is_reported(pair: HubPair, status: int) -> None:
    merge(pair.recipe(restore=[2, 3]), pair.out)
    pair.hub.misbehave("status", f"GET /(blobs|{CHAT}/resolve)", times=None, status=status)
    with pytest.raises(HubError):
        verify(pair.out, full=True)


def test_a_full_verification_needs_both_sources(pair: HubPair) -> None:
    merge(pair.recipe(pretrained="./pre", restore=[2, 3]), pair.out)
    (pair.folder / "pre").rename(pair.folder / "moved")
    assert not verify(pair.out).against_sources
    with refused(VerificationError, "sources-unavailable"):
        verify(pair.out, full=True)


def test_a_tokenizer_that_is_damaged_in_the_cache_is_not_copied(pair: HubPair) -> None:
    snapshot_download(CHAT)
    (cached,) = Path(constants.HF_HUB_CACHE).glob("models--org--chat/snapshots/*/tokenizer.json")
    cached.write_text("[]")
    merge(pair.recipe_file(restore=[2, 3]), pair.out)
    assert (pair.out / "tokenizer.json").read_text() == "{}"


def test_a_full_verification_detects_a_damaged_side_file(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot_download(CHAT)
    snapshot_download(BASE)
    (cached,) = Path(constants.HF_HUB_CACHE).glob("models--org--chat/snapshots/*/tokenizer.json")
    cached.write_text("[]")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    merge(pair.recipe_file(restore=[2, 3]), pair.out)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    unchecked = json.loads((pair.out / "slrmerge.json").read_text())["sources"]["posttrained"]["unchecked"]
    assert unchecked.keys() >= {"tokenizer.json", "config.json", "model-00001-of-00002.safetensors"}
    assert set(unchecked.values()) == {None}
    with refused(VerificationError, "sources-differ") as caught:
        verify(pair.out, full=True)
    assert [Path(problem.where).name for problem in caught.value.problems] == ["tokenizer.json"]


def test_a_source_is_not_said_to_have_files_of_the_other_or_of_the_search(pair: HubPair) -> None:
    summary = {**SUMMARY, "pretrained": BASE, "posttrained": CHAT}
    (pair.folder / "summary.json").write_text(json.dumps(summary))
    (pair.folder / "tradeoff.png").write_bytes(FIGURE)
    merge(pair.recipe_file(restore=[2, 3]), pair.out)
    assert (pair.out / "tradeoff.png").read_bytes() == FIGURE
    sources = json.loads((pair.out / "slrmerge.json").read_text())["sources"]
    assert not {"tradeoff.png"} & {*sources["posttrained"]["unchecked"], *sources["pretrained"]["unchecked"]}


def test_a_new_commit_with_the_same_weights_uses_the_cache(pair: HubPair) -> None:
    for repository in (BASE, CHAT):
        snapshot_download(repository)
        pair.hub.commit(repository, {"README.md": b"A better word."})
    pair.hub.requests.clear()
    merge(pair.recipe_file(restore=[2, 3]), pair.out)
    assert pair.hub.served("^/blobs/") == 0
    assert read_back(pair.out) == pair.mixed(2, 3)


def test_a_full_download_can_be_merged_again_without_a_network(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = pair.recipe_file(restore=[0, 5])
    merge(recipe, pair.out, download="full")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    merge(recipe, pair.folder / "again")
    assert shards_in(pair.out) == shards_in(pair.folder / "again")


def test_diff_compares_repositories_without_keeping_them(pair: HubPair) -> None:
    here, there = run("diff", pair.folder / "pre", pair.folder / "post", "--json"), run("diff", BASE, CHAT, "--json")
    assert (there.exit_code, there.stdout) == (0, here.stdout)
    assert scan_cache_dir().size_on_disk < 10_000
    assert run("diff", pair.recipe_file(restore=[0, 1]), "--json").stdout == here.stdout


def test_the_problems_of_both_sides_are_reported_by_a_merge(hub: HubServer, tmp_path: Path) -> None:
    recipe = {"pretrained": "org/a", "posttrained": "org/b", "restore": [0, 1]}
    with refused(HubError, "repository-not-found") as caught:
        merge(recipe, tmp_path / "out")
    assert [problem.where for problem in caught.value.problems] == ["org/a", "org/b"]


def test_inspect_shows_a_repository(pair: HubPair) -> None:
    here, there = run("inspect", pair.folder / "post"), run("inspect", CHAT)
    assert there.stdout.splitlines()[1:] == here.stdout.splitlines()[1:]
    assert there.stdout.splitlines()[0] == f"{CHAT}@{pair.hub.head(CHAT)[:7]}: LlamaForCausalLM"
    assert run("inspect", "org/nope").exit_code == 14


def test_chat_templates_in_folders_are_copied_and_other_folders_are_not(pair: HubPair) -> None:
    pair.hub.commit(CHAT, {"additional_chat_templates/tools.jinja": b"{{ x }}", "onnx/config.json": b"{}"})
    merge(pair.recipe(restore=[2, 3]), pair.out)
    assert (pair.out / "additional_chat_templates" / "tools.jinja").read_bytes() == b"{{ x }}"
    assert not (pair.out / "onnx").exists()


def test_the_command_line_prints_its_own_messages_only(pair: HubPair) -> None:
    pair.hub.misbehave("status", f"GET /api/models/{CHAT}/tree", times=1, status=503)
    env = os.environ | environment(pair.hub, pair.folder / "cache")
    command = [sys.executable, "-m", "slrmerge", "inspect", CHAT]
    assert subprocess.run(command, env=env, capture_output=True, check=True).stderr == b""
    pair.hub.misbehave("status", f"GET /api/models/{CHAT}/tree", times=1, status=503)
    env |= {"HF_HUB_VERBOSITY": "warning"}
    assert b"503" in subprocess.run(command, env=env, capture_output=True, check=True).stderr
