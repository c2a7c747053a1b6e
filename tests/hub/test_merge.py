"""A merge of repositories fetches what it needs, once, and gives what a merge of folders gives."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import constants, scan_cache_dir, snapshot_download

from slrmerge import SlrmergeError, execute, load_recipe, merge_checkpoints, verify_checkpoint, writer
from slrmerge.errors import HubError, NoSpaceError, VerificationError
from tests.checkpoints import read_back
from tests.cli import run
from tests.hub.conftest import BASE, CHAT, HubPair, files_of
from tests.hub.server import HubServer, environment, use
from tests.merge.faults import Recorder, Stop, leftovers, stop

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
    monkeypatch.setattr(writer, "PIECE_BYTES", 1 << 15)


def shards_in(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("download", ["ranges", "full"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_repositories_give_the_weights_that_folders_give(
    pair: HubPair, rules: dict[str, Any], size: str, download: str
) -> None:
    there = pair.recipe_file(**rules, max_shard_size=size)
    here = pair.recipe_file("here.yaml", pretrained="./pre", posttrained="./post", **rules, max_shard_size=size)
    assert run(there, "--out", pair.out, "--download", download).exit_code == 0
    assert run(here, "--out", pair.folder / "local").exit_code == 0
    assert shards_in(pair.out) == shards_in(pair.folder / "local")
    assert files_of(pair.out).keys() == files_of(pair.folder / "local").keys()
    assert run("verify", pair.out, "--full").exit_code == 0


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_served_bytes_stay_within_five_percent_of_what_is_needed(pair: HubPair, rules: dict[str, Any]) -> None:
    recipe = pair.recipe_file(**rules)
    pair.hub.requests.clear()
    assert run(recipe, "--out", pair.out).exit_code == 0
    needed = pair.plan(**rules).read_bytes
    assert needed <= pair.hub.served() <= 1.05 * needed


def test_a_restoration_costs_one_model_and_not_two(pair: HubPair) -> None:
    plan = pair.plan(restore=[2, 3])
    one = sum(len(tensor.data) for tensor in pair.post.values())
    side_files = sum(file.file_bytes for file in plan.files if file.source)
    assert one <= plan.download_bytes <= one + side_files
    assert plan.whole_download_bytes >= 2 * one


def test_a_plan_says_what_it_would_fetch_and_fetches_none_of_it(pair: HubPair) -> None:
    recipe = pair.recipe_file(restore=[2, 3])
    pair.hub.requests.clear()
    shown, counted = run("plan", recipe), json.loads(run(recipe, "--dry-run", "--json").stdout)
    headers = sum(shard.data_start for side in pair.plan(restore=[2, 3]).sides for shard in side.shards.values())
    assert pair.hub.served("^/blobs/") == 3 * headers
    assert not any(request.path.endswith("tokenizer.json") for request in pair.hub.requests)
    assert "fetches  361.35 kB from the Hub; both checkpoints whole are 730.03 kB\n" in shown.stdout
    assert (counted["download_bytes"], counted["whole_download_bytes"]) == (361346, 730034)


def test_what_is_in_the_cache_is_not_fetched_again(pair: HubPair) -> None:
    for repository in (BASE, CHAT):
        snapshot_download(repository)
    pair.hub.requests.clear()
    result = run(pair.recipe_file(restore=[2, 3]), "--out", pair.out)
    assert (result.exit_code, pair.hub.served()) == (0, 0)
    assert read_back(pair.out) == pair.mixed(2, 3)
    assert "is on the Hub" not in run("verify", pair.out).stdout


def test_streaming_leaves_no_second_copy_of_the_weights(pair: HubPair) -> None:
    merge_checkpoints(pair.recipe(restore=[2, 3]), pair.out)
    assert scan_cache_dir().size_on_disk < 10_000


def test_a_full_download_fetches_only_files_that_are_read(pair: HubPair) -> None:
    recipe = pair.recipe(restore=[0, 5], tensors=[{"match": "*", "alpha": 1.0}])
    merge_checkpoints(recipe, pair.out, download="full")
    cached = {file.file_name for repo in scan_cache_dir().repos for rev in repo.revisions for file in rev.files}
    assert {name for name in cached if name.endswith(".safetensors")} == {"model.safetensors"}


def test_a_full_download_that_would_not_fit_is_refused_before_it_starts(
    pair: HubPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pair.plan(restore=[2, 3])
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=700_000))
    pair.hub.requests.clear()
    with pytest.raises(NoSpaceError) as caught:
        execute(plan, pair.out, download="full")
    assert str(caught.value) == (
        f"{constants.HF_HUB_CACHE}: the download needs 0.00 GB there, the disk has 0.00 GB free; "
        "set HF_HUB_CACHE to a folder on another disk"
    )
    assert pair.hub.served() == 0


def test_the_manifest_pins_commits_and_says_what_was_not_checked(pair: HubPair) -> None:
    merge_checkpoints(pair.recipe(posttrained=f"{CHAT}@main", restore=[2, 3]), pair.out)
    sources = json.loads((pair.out / "slrmerge.json").read_text())["sources"]
    pinned = {key: sources["posttrained"][key] for key in ("model", "repository", "revision", "commit")}
    assert pinned == {"model": CHAT, "repository": CHAT, "revision": "main", "commit": pair.hub.head(CHAT)}
    assert sources["pretrained"]["unchecked"].keys() == {"model.safetensors"}
    assert sources["posttrained"]["unchecked"].keys() == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert all(digest.startswith("sha256:") for side in sources.values() for digest in side["unchecked"].values())
    recipe = yaml.safe_load((pair.out / "slrmerge.yaml").read_text())
    assert recipe["pretrained"] == f"{BASE}@{pair.hub.head(BASE)}"
    assert recipe["posttrained"] == f"{CHAT}@{pair.hub.head(CHAT)}"


def test_files_fetched_whole_were_checked_and_the_manifest_says_so(pair: HubPair) -> None:
    merge_checkpoints(pair.recipe(restore=[2, 3]), pair.out, download="full")
    sources = json.loads((pair.out / "slrmerge.json").read_text())["sources"]
    assert [side["unchecked"] for side in sources.values()] == [{}, {}]


def test_a_merge_again_gives_the_same_files_though_the_branches_moved_on(pair: HubPair) -> None:
    run(pair.recipe_file(restore=[2, 3]), "--out", pair.out)
    for repository in (BASE, CHAT):
        pair.hub.commit(repository, {"config.json": b'{"num_hidden_layers": 6, "new": true}'})
    assert run(pair.out / "slrmerge.yaml", "--out", pair.folder / "again").exit_code == 0
    assert shards_in(pair.out) == shards_in(pair.folder / "again")
    assert (pair.out / "config.json").read_bytes() == (pair.folder / "again/config.json").read_bytes()


def test_verify_compares_with_the_hub_only_when_told_to(pair: HubPair) -> None:
    run(pair.recipe_file(restore=[2, 3]), "--out", pair.out)
    pair.hub.requests.clear()
    report = verify_checkpoint(pair.out)
    where = f"{BASE}@{pair.hub.head(BASE)}"
    assert report.sources == f"not compared: {where} is on the Hub; --full fetches it and compares"
    assert (report.against_sources, pair.hub.requests) == (False, [])
    report = verify_checkpoint(pair.out, full=True)
    assert report.sources == ("the weights are equal bit by bit; 3 files of the sources are what the Hub says of them")
    assert report.against_sources


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_bytes_that_came_wrong_by_range_are_found_by_a_full_verification(pair: HubPair, rules: dict[str, Any]) -> None:
    plan = pair.plan(**rules)
    pair.hub.misbehave("corrupt", BLOBS, times=None)
    execute(plan, pair.out)
    pair.hub.behave()
    assert verify_checkpoint(pair.out).files > 0
    with pytest.raises(VerificationError) as caught:
        verify_checkpoint(pair.out, full=True)
    (problem,) = caught.value.problems
    assert problem.what.startswith("is as it was written, but not what its sources give now (in ")


def test_a_source_that_came_damaged_is_named_by_a_full_verification(pair: HubPair) -> None:
    run(pair.recipe_file(restore=[2, 3]), "--out", pair.out)
    pair.hub.misbehave("corrupt", BLOBS, skip=6, times=None)  # after the headers, the whole files
    result = run("verify", pair.out, "--full")
    assert (result.exit_code, ": it is sha256:" in result.stderr) == (14, True)
    pair.hub.behave()
    assert run("verify", pair.out, "--full").exit_code == 0


def test_a_damaged_source_in_the_cache_is_fetched_again_for_a_full_verification(pair: HubPair) -> None:
    folder = Path(snapshot_download(BASE))
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    run(pair.recipe_file(restore=[2, 3], tensors=[{"match": "lm_head.*", "alpha": 1}]), "--out", pair.out)
    assert run("verify", pair.out).exit_code == 0
    result = run("verify", pair.out, "--full")
    assert result.exit_code == 10
    assert "is as it was written, but not what its sources give now (in lm_head.weight)" in result.stderr


def test_a_full_verification_needs_the_hub(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    run(pair.recipe_file(restore=[2, 3]), "--out", pair.out, "--download", "full")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run("verify", pair.out).exit_code == 0
    result = run("verify", pair.out, "--full")
    assert result.exit_code == 14
    assert "is here, but the Hub's digests are not, since HF_HUB_OFFLINE is set; unset it" in result.stderr


def test_a_merge_works_without_a_network_from_a_whole_cache(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    for repository in (BASE, CHAT):
        snapshot_download(repository)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run(pair.recipe_file(restore=[2, 3]), "--out", pair.out).exit_code == 0
    assert read_back(pair.out) == pair.mixed(2, 3)


def test_a_folder_and_a_repository_go_together(pair: HubPair) -> None:
    assert run(pair.recipe_file(pretrained="./pre", restore=[2, 3]), "--out", pair.out).exit_code == 0
    assert read_back(pair.out) == pair.mixed(2, 3)
    sources = json.loads((pair.out / "slrmerge.json").read_text())["sources"]
    assert ("commit" in sources["pretrained"], "commit" in sources["posttrained"]) == (False, True)


@pytest.mark.parametrize("kind", ["ignore_range", "wrong_range", "cut", "overlong", "gzip", "reset"])
def test_a_merge_gets_through_what_passes(pair: HubPair, kind: Any) -> None:
    plan = pair.plan(restore=[2, 3], max_shard_size="100KB")
    pair.hub.misbehave(kind, BLOBS, times=12)
    pair.hub.misbehave("status", BLOBS, times=6, status=429, headers={"Retry-After": "0"})
    execute(plan, pair.out)
    assert read_back(pair.out) == pair.mixed(2, 3)


def test_a_hub_that_fails_for_good_costs_what_was_not_finished_and_no_more(pair: HubPair) -> None:
    plan = pair.plan(restore=[2, 3], max_shard_size="100KB")
    pair.hub.misbehave("status", BLOBS, times=None, status=503, skip=6)
    with pytest.raises(HubError) as caught:
        execute(plan, pair.out, threads=1)
    kept = caught.value.__notes__[0]
    assert "pieces are finished and kept" in kept
    assert not pair.out.exists()
    pair.hub.behave()
    pair.hub.requests.clear()
    result = execute(plan, pair.out)
    assert result.resumed_pieces == int(kept.partition(" ")[0]) > 0
    assert pair.hub.served("^/blobs/") <= plan.read_bytes - (result.resumed_pieces - len(plan.shards)) * (1 << 15)
    assert read_back(pair.out) == pair.mixed(2, 3)


def test_a_stopped_merge_fetches_only_what_is_missing(pair: HubPair) -> None:
    plan = pair.plan(restore=[2, 3])
    with pytest.raises(Stop):
        execute(plan, pair.out, threads=1, progress=Recorder(10, stop))
    pair.hub.requests.clear()
    recorder = Recorder()
    result = execute(pair.plan(restore=[2, 3]), pair.out, progress=recorder)
    missing = plan.shards[0].file_bytes - result.resumed_pieces * (1 << 15)
    assert (recorder.started, result.resumed_pieces > 2) == ([("downloading and merging", missing)], True)
    assert pair.hub.served("^/blobs/") <= missing + 10_000
    assert read_back(pair.out) == pair.mixed(2, 3)
    assert leftovers(pair.out) == []


def test_a_killed_merge_leaves_nothing_by_its_name_and_goes_on(pair: HubPair) -> None:
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


def test_ctrl_c_does_not_wait_for_a_hub_that_asks_for_patience(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slrmerge.hub.failures.LONGEST_WAIT_S", 300.0)
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
    said = "".join([*(result.output for result in results), caplog.text, *map(repr, files_of(pair.out).values())])
    assert "secret" not in said
    assert {r.headers.get("authorization") for r in pair.hub.requests if r.host == "cdn"} == {None}


def test_a_hub_that_fails_while_it_is_asked_to_prove_a_merge_proves_nothing(pair: HubPair) -> None:
    run(pair.recipe_file(restore=[2, 3]), "--out", pair.out)
    for fault in ({"status": 503}, {"status": 403}):
        pair.hub.misbehave("status", f"GET /(blobs|{CHAT}/resolve)", times=None, **fault)
        assert run("verify", pair.out, "--full").exit_code == 14
        assert run("inspect", CHAT).exit_code == 14
        pair.hub.behave()


def test_what_cannot_be_compared_is_no_proof_when_all_is_asked_for(pair: HubPair) -> None:
    run(pair.recipe_file(pretrained="./pre", restore=[2, 3]), "--out", pair.out)
    (pair.folder / "pre").rename(pair.folder / "moved")
    assert run("verify", pair.out).exit_code == 0
    result = run("verify", pair.out, "--full")
    assert (result.exit_code, "is not at hand; see that both sources can be had" in result.stderr) == (10, True)


def test_a_tokenizer_that_is_damaged_in_the_cache_is_not_copied(pair: HubPair) -> None:
    snapshot_download(CHAT)
    (cached,) = Path(constants.HF_HUB_CACHE).glob("models--org--chat/snapshots/*/tokenizer.json")
    cached.write_text("[]")
    assert run(pair.recipe_file(restore=[2, 3]), "--out", pair.out).exit_code == 0
    assert (pair.out / "tokenizer.json").read_text() == "{}"


def test_a_side_file_that_is_not_the_sources_is_found_by_a_full_verification(
    pair: HubPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_download(CHAT)
    snapshot_download(BASE)
    (cached,) = Path(constants.HF_HUB_CACHE).glob("models--org--chat/snapshots/*/tokenizer.json")
    cached.write_text("[]")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # nobody to ask what it should be
    run(pair.recipe_file(restore=[2, 3]), "--out", pair.out)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    unchecked = json.loads((pair.out / "slrmerge.json").read_text())["sources"]["posttrained"]["unchecked"]
    assert unchecked.keys() >= {"tokenizer.json", "config.json", "model-00001-of-00002.safetensors"}
    assert set(unchecked.values()) == {None}
    result = run("verify", pair.out, "--full")
    assert result.exit_code == 10
    assert "tokenizer.json: is as it was written, but not what its sources give now" in result.stderr


def test_a_commit_that_leaves_the_weights_alone_leaves_them_in_the_cache(pair: HubPair) -> None:
    for repository in (BASE, CHAT):
        snapshot_download(repository)
        pair.hub.commit(repository, {"README.md": b"A better word."})
    pair.hub.requests.clear()
    assert run(pair.recipe_file(restore=[2, 3]), "--out", pair.out).exit_code == 0
    assert pair.hub.served("^/blobs/") == 0
    assert read_back(pair.out) == pair.mixed(2, 3)


def test_what_was_fetched_whole_is_there_without_a_network(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = pair.recipe_file(restore=[0, 5])
    assert run(recipe, "--out", pair.out, "--download", "full").exit_code == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run(recipe, "--out", pair.folder / "again").exit_code == 0
    assert shards_in(pair.out) == shards_in(pair.folder / "again")


def test_diff_compares_repositories_without_keeping_them(pair: HubPair) -> None:
    here, there = run("diff", pair.folder / "pre", pair.folder / "post", "--json"), run("diff", BASE, CHAT, "--json")
    assert (there.exit_code, there.stdout) == (0, here.stdout)
    assert scan_cache_dir().size_on_disk < 10_000
    assert run("diff", pair.recipe_file(restore=[0, 1]), "--json").stdout == here.stdout


def test_errors_of_the_api_are_slrmerges_own(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("pretrained: org/a\nposttrained: org/b\nrestore: [0, 1]\n")
    with pytest.raises(SlrmergeError) as caught:
        merge_checkpoints(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "out")
    assert (caught.value.exit_code, len(caught.value.problems)) == (14, 2)
    assert hub.requests
