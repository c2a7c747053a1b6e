"""A merge is pushed as one commit, complete or not at all, by users with write access."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, close_session, snapshot_download

from slrmerge import Repository, merge, push, verify
from slrmerge.checkpoint.hub import session
from slrmerge.errors import HubError, OptionError, Problem, SourceChangedError, VerificationError
from slrmerge.io.pieces import digest_file
from slrmerge.merging import hub_commit
from slrmerge.merging import push as push_module
from tests.adapters import Q, lora_tensors, write_adapter
from tests.checkpoint.hub.conftest import BASE, CHAT, HubPair
from tests.checkpoint.hub.server import HubServer, environment, use
from tests.checkpoint.hub.test_hostile import answer_with
from tests.checkpoint.hub.transport import Answer, Asked
from tests.checkpoints import llama_tensors, read_back, write_checkpoint
from tests.cli import run
from tests.gguf_files import write_gguf
from tests.merging.faults import snapshot
from tests.merging.test_manifest import signed
from tests.problems import refused

MINE = "ann/hybrid"
TOKEN = "hf_ann"
ATTRIBUTES = ".gitattributes"
FIRST = "model-00001-of-00002.safetensors"


@pytest.fixture(autouse=True)
def token(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ann is logged in; Bob is another user."""
    pair.hub.tokens |= {TOKEN: "ann", "hf_bob": "bob"}
    use(monkeypatch, pair.hub, pair.folder / "cache", TOKEN)


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merges that tests copy: on every test's Hub the pair has the same commits."""
    return tmp_path_factory.mktemp("merges")


@pytest.fixture
def merged(pair: HubPair, merges: Path) -> Path:
    return merged_once(pair, merges / "merged", pair.out, 2, 3)


@pytest.fixture
def other(pair: HubPair, merges: Path) -> Path:
    """Another merge of the same pair."""
    return merged_once(pair, merges / "other", pair.folder / "other", 4, 5)


def merged_once(pair: HubPair, kept: Path, out: Path, *restore: int) -> Path:
    if not kept.exists():
        merge(pair.recipe(restore=[*restore]), kept)
    return Path(shutil.copytree(kept, out))


def there(pair: HubPair, revision: str = "main") -> dict[str, bytes]:
    """The files of the repository that was pushed to, git's own aside."""
    return {name: data for name, data in pair.hub.files(MINE, revision).items() if name != ATTRIBUTES}


def test_a_push_is_one_commit_of_exactly_the_files_of_the_merge(pair: HubPair, merged: Path) -> None:
    pushed = push(merged, MINE)
    assert there(pair) == snapshot(merged)
    assert sorted(pushed.files) == sorted(snapshot(merged))
    assert (pushed.commit, pushed.removed, pushed.unchanged) == (pair.hub.head(MINE), (), False)
    assert len(pair.hub.log(MINE)) == 2  # the first is the Hub's own


def uploads(pair: HubPair) -> set[str]:
    """The paths of the large files that were uploaded."""
    return {request.path for request in pair.hub.requests if request.host == "cdn" and request.method == "PUT"}


def test_unchanged_shards_are_copied_on_the_hub(pair: HubPair, other: Path) -> None:
    """Layers 4 and 5 are in the second of the post-trained side's shards; the first is the same file."""
    sizes = {path.name: path.stat().st_size for path in other.iterdir()}
    same = "model-00001-of-00002.safetensors"
    assert snapshot(other)[same] == pair.hub.files(CHAT)[same]
    pushed = push(other, MINE)
    assert there(pair) == snapshot(other)
    assert (pushed.copied_bytes, pushed.skipped_bytes) == (sizes[same], 0)
    assert pushed.uploaded_bytes == sum(sizes.values()) - sizes[same]
    assert len(uploads(pair)) == 1
    again = push(other, MINE)
    assert (again.uploaded_bytes, again.copied_bytes, again.skipped_bytes) == (0, 0, sum(sizes.values()))


@pytest.mark.parametrize("refusal", ["by file", "by status", "source is gone"])
def test_shards_that_the_hub_does_not_copy_are_uploaded(pair: HubPair, other: Path, refusal: str) -> None:
    if refusal == "by file":
        pair.hub.copies_refused = True
    elif refusal == "by status":
        pair.hub.misbehave("status", "/lfs-files/duplicate", status=403)
    else:
        pair.hub.private.add(CHAT)
    pushed = push(other, MINE)
    assert there(pair) == snapshot(other)
    assert pushed.copied_bytes == 0
    assert pushed.uploaded_bytes == sum(path.stat().st_size for path in other.iterdir())
    assert len(uploads(pair)) == len(list(other.glob("*.safetensors")))


def test_a_pushed_merge_verifies_and_merges_again(pair: HubPair, merged: Path) -> None:
    push(merged, MINE)
    fetched = Path(snapshot_download(MINE))
    assert verify(fetched, full=True).against_sources
    recipe = pair.recipe(pretrained=BASE, posttrained=MINE, restore=[0, 0])
    merge(recipe, pair.folder / "more")
    assert read_back(pair.folder / "more") == pair.mixed(0, 2, 3)


def test_a_push_removes_shards_of_an_older_merge_and_nothing_else(pair: HubPair, merged: Path) -> None:
    push(merged, MINE)
    pair.hub.commit(MINE, {"notes.md": b"mine", "gguf/model.gguf": b"mine too", "sub/model.safetensors": b"and this"})
    merge(pair.recipe(restore=[2, 3], max_shard_size="100KB"), pair.folder / "sharded")
    pushed = push(pair.folder / "sharded", MINE)
    assert pushed.removed == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    others = {"notes.md": b"mine", "gguf/model.gguf": b"mine too", "sub/model.safetensors": b"and this"}
    assert there(pair) == snapshot(pair.folder / "sharded") | others
    pushed = push(merged, MINE)
    assert pushed.removed == tuple(f"model-0000{number}-of-00004.safetensors" for number in range(1, 5))
    assert there(pair) == snapshot(merged) | others
    assert len(pair.hub.log(MINE)) == 5


def test_a_push_removes_only_what_a_merge_can_have_written(pair: HubPair, merged: Path) -> None:
    mine = dict.fromkeys((ATTRIBUTES, "thesis.pdf", "notes.txt", "data.json", "train.py", "LICENSE.mine"), b"mine")
    older = {"vocab.json": b"old", "chat_templates/old.jinja": b"old", "slrmerge.yaml": b"old", "merges.txt": b"edited"}
    content = json.loads((merged / "slrmerge.json").read_bytes())
    content["files"] |= {name: {"bytes": len(data), "digest": "x"} for name, data in (mine | older).items()}
    content["files"]["merges.txt"]["bytes"] = 5
    push(merged, MINE)
    pair.hub.commit(MINE, mine | older | {"slrmerge.json": signed(content)})
    assert push(merged, MINE).removed == ("chat_templates/old.jinja", "vocab.json")
    expected = snapshot(merged) | mine | {"merges.txt": b"edited"}
    assert pair.hub.files(MINE) == expected


def test_the_folder_is_checked_before_a_token_is_needed(
    pair: HubPair, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, pair.hub, pair.folder / "cache", None)
    (merged / "slrmerge.json").unlink()
    pair.hub.requests.clear()
    with refused(VerificationError, "no-manifest"):
        push(merged, MINE)
    assert pair.hub.requests == []


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", FIRST, "slrmerge.json"])
def test_a_link_that_leads_out_of_the_folder_is_not_pushed(pair: HubPair, merged: Path, name: str) -> None:
    (merged / name).rename(pair.folder / "elsewhere")  # the same bytes: verify has nothing to object
    (merged / name).symlink_to(pair.folder / "elsewhere")
    pair.hub.requests.clear()
    with refused(VerificationError, "link-outside"):
        push(merged, MINE)
    assert pair.hub.requests == []


def test_a_name_that_is_not_utf8_is_refused_before_any_request(pair: HubPair) -> None:
    name = "LICENSE\udce9"
    (pair.folder / "post" / name).write_text("free")
    merge(pair.recipe_file(restore=[2, 3], posttrained="./post"), pair.out)
    pair.hub.requests.clear()
    with refused(VerificationError, "not-utf8"):
        push(pair.out, MINE)
    assert pair.hub.requests == []


@pytest.mark.parametrize("small_bytes", [0, 1 << 24])
@pytest.mark.parametrize("name", ["tokenizer.json", FIRST])
def test_what_takes_the_place_of_a_file_is_not_pushed(
    pair: HubPair, merged: Path, monkeypatch: pytest.MonkeyPatch, name: str, small_bytes: int
) -> None:
    secret = pair.folder / "secret"
    secret.write_bytes(b"x" * (merged / name).stat().st_size)

    def replace_by_link(*arguments: Any) -> Any:
        (merged / name).unlink()
        (merged / name).symlink_to(secret)
        return stale_files(*arguments)

    expected, stale_files = snapshot(merged), hub_commit._stale_files
    monkeypatch.setattr(push_module, "_SMALL_BYTES", small_bytes)
    monkeypatch.setattr(hub_commit, "_stale_files", replace_by_link)
    push(merged, MINE)
    assert there(pair) == expected


def test_a_large_file_that_is_rewritten_while_it_is_uploaded_is_not_committed(
    pair: HubPair, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = pair.hub.answer

    def answer(host: str, asked: Asked) -> Answer:
        if host == "cdn":
            (merged / FIRST).touch()  # other bytes could also fail as an upload, depending on when they are written
        return honest(host, asked)

    monkeypatch.setattr(push_module, "_SMALL_BYTES", 0)
    monkeypatch.setattr(pair.hub, "answer", answer)
    with refused(SourceChangedError, "source-changed"):
        push(merged, MINE)
    assert there(pair) == {}


def test_a_push_needs_no_temporary_folder(pair: HubPair, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a kill would leave behind."""
    monkeypatch.setattr(push_module, "_SMALL_BYTES", 0)
    monkeypatch.setattr("tempfile.tempdir", str(pair.folder / "missing"))
    push(merged, MINE)
    assert there(pair) == snapshot(merged)


def test_a_repository_that_ignores_files_gets_all_files_of_a_merge(pair: HubPair, merged: Path) -> None:
    pair.hub.commit(MINE, {".gitignore": b"*.json\n*.safetensors\n"})
    push(merged, MINE)
    assert there(pair).keys() - {".gitignore"} == snapshot(merged).keys()


@pytest.mark.parametrize("name", ["tokenizer.json", FIRST, "slrmerge.json"])
def test_a_file_that_changes_after_it_was_verified_is_not_pushed(
    pair: HubPair, merged: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    content = (merged / name).read_bytes()
    monkeypatch.setattr(push_module, "_require_valid_card", lambda _: (merged / name).write_bytes(content[::-1]))
    with refused(SourceChangedError, "source-changed"):
        push(merged, MINE)
    assert not any("/commit/" in request.path for request in pair.hub.requests)


def test_a_repeated_push_uploads_nothing_and_makes_no_commit(pair: HubPair, merged: Path) -> None:
    first = push(merged, MINE)
    pair.hub.requests.clear()
    again = push(merged, MINE)
    assert (again.commit, again.unchanged) == (first.commit, True)
    assert {request.method for request in pair.hub.requests if request.host == "cdn"} == set()


@pytest.mark.parametrize("target", [(MINE, "late"), (f"{MINE}@late", None), (Repository(MINE, "late"), None)])
def test_a_missing_branch_is_created(
    pair: HubPair, merged: Path, other: Path, target: tuple[str | Repository, str | None]
) -> None:
    push(merged, MINE)
    before = pair.hub.head(MINE)
    push(other, target[0], revision=target[1])
    assert (there(pair, "late"), pair.hub.head(MINE)) == (snapshot(other), before)


@pytest.mark.parametrize("private", [False, True])
def test_a_repository_is_created_private_on_request(pair: HubPair, merged: Path, private: bool) -> None:
    push(str(merged), MINE, private=private)
    assert (MINE in pair.hub.private) == private


def test_an_altered_merge_is_not_pushed(pair: HubPair, merged: Path) -> None:
    pair.hub.requests.clear()
    (merged / "config.json").write_text("{}")
    with pytest.raises(VerificationError):
        push(merged, MINE)
    assert [request for request in pair.hub.requests if request.method != "GET"] == []


def test_a_folder_that_is_not_a_merge_is_not_pushed(pair: HubPair) -> None:
    with pytest.raises(VerificationError):
        push(pair.folder / "post", MINE)


def test_a_stray_file_is_not_pushed(pair: HubPair, merged: Path) -> None:
    (merged / "notes.txt.swp").write_text("mine")
    push(merged, MINE)
    assert "notes.txt.swp" not in there(pair)


def refusal(code: str, folder: Path, repository: str = MINE, **options: bool) -> Problem:
    """The only problem with a push, which has this code."""
    with refused(HubError, code) as caught:
        push(folder, repository, **options)
    (problem,) = caught.value.problems
    return problem


def test_a_push_requires_a_token(pair: HubPair, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, pair.hub, pair.folder / "cache", None)
    assert refusal("not-logged-in", merged).where == MINE


def test_an_unknown_token_is_refused(pair: HubPair, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, pair.hub, pair.folder / "cache", "hf_unknown")
    refusal("invalid-token", merged)


def test_a_token_of_another_user_is_refused(pair: HubPair, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(merged, MINE)
    use(monkeypatch, pair.hub, pair.folder / "cache", "hf_bob")
    assert f"{pair.hub.url}/{MINE}" in refusal("forbidden", merged).remedy


@pytest.mark.parametrize("name", ["ann/-odd", "ann/odd--name", "ann/" + "x" * 100])
def test_an_impossible_repository_name_is_refused_before_any_request(pair: HubPair, merged: Path, name: str) -> None:
    pair.hub.requests.clear()
    with pytest.raises((HubError, OptionError)) as caught:
        push(merged, name)
    assert [problem.code for problem in caught.value.problems] == ["invalid-repository"]
    assert pair.hub.requests == []


def test_a_push_requires_a_network(pair: HubPair, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refusal("offline", merged)


def test_a_commit_that_was_pushed_meanwhile_is_not_overwritten(pair: HubPair, merged: Path, other: Path) -> None:
    push(merged, MINE)
    pair.hub.misbehave("status", "POST /api/models/ann/hybrid/commit", status=412)
    before = pair.hub.head(MINE)
    refusal("changed-meanwhile", other)
    assert pair.hub.head(MINE) == before


def test_the_hub_refuses_a_commit_on_top_of_another_parent(
    pair: HubPair, merged: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(merged, MINE)

    def meanwhile(*_: object) -> set[str]:
        pair.hub.commit(MINE, {"notes.md": b"theirs"})
        return set()

    monkeypatch.setattr("slrmerge.merging.hub_commit._stale_files", meanwhile)
    refusal("changed-meanwhile", other)
    assert there(pair)["notes.md"] == b"theirs"
    assert there(pair)[FIRST] == (merged / FIRST).read_bytes()


@pytest.mark.parametrize(
    "match",
    ["POST /ann/hybrid.git/info/lfs/objects/batch", "PUT /", "POST /api/models/ann/hybrid/commit"],
)
def test_a_failed_push_leaves_the_branch_and_can_be_repeated(
    pair: HubPair, merged: Path, other: Path, match: str
) -> None:
    push(merged, MINE)
    before = pair.hub.head(MINE)
    pair.hub.misbehave("status", match, times=None, status=403)
    refusal("forbidden", other)
    assert pair.hub.head(MINE) == before
    pair.hub.behave()
    push(other, MINE)
    assert there(pair) == snapshot(other)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (Answer(b" " * 100_001), "invalid-response"),
        (Answer(gzip.compress(b" " * 10_000_000), headers={"Content-Encoding": "gzip"}), "invalid-response"),
        (Answer(b" ", header_pace_s=0.05), "hub-timeout"),
    ],
)
def test_the_answer_to_an_upload_is_limited(
    pair: HubPair, merged: Path, answer: Answer, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "MAX_ANSWER_BYTES", 100_000)
    monkeypatch.setattr(session, "RESPONSE_TIMEOUT_S", 0.3)
    answer_with(monkeypatch, pair.hub, "PUT /", lambda _: answer)
    with refused(HubError, code):
        push(merged, MINE)


def test_a_push_killed_before_its_commit_leaves_the_branch(pair: HubPair, merged: Path, other: Path) -> None:
    push(merged, MINE)
    before = pair.hub.head(MINE)
    pair.hub.misbehave("hang", "POST /api/models/ann/hybrid/commit", times=None)
    env = os.environ | environment(pair.hub, pair.folder / "cache", TOKEN)
    with subprocess.Popen([sys.executable, "-m", "slrmerge", "push", other, MINE], env=env) as child:
        deadline = time.monotonic() + 60
        while not any("/commit/" in request.path for request in pair.hub.requests[-1:]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.kill()
    assert pair.hub.head(MINE) == before
    pair.hub.behave()
    push(other, MINE)
    assert there(pair) == snapshot(other)


def test_the_hub_and_its_client_accept_the_model_card(pair: HubPair, merged: Path) -> None:
    card = ModelCard.load(merged / "README.md")
    card.validate()
    data = card.data.to_dict()
    assert data["base_model"] == [BASE, CHAT]
    assert (data["base_model_relation"], data["library_name"], data["license"]) == ("merge", "transformers", "mit")
    assert data["tags"] == ["merge", "slrmerge", "selective-layer-restoration"]


def test_a_card_that_the_hub_refuses_is_reported_before_anything_is_uploaded(pair: HubPair) -> None:
    card = (pair.folder / "post" / "README.md").read_text().replace("mit", "[a: b")
    (pair.folder / "post" / "README.md").write_text(card)
    recipe = pair.recipe_file(pretrained="./pre", posttrained="./post", restore=[2, 3])
    merge(recipe, pair.out)
    pair.hub.misbehave("status", "POST /api/validate-yaml", status=400)
    pair.hub.requests.clear()
    assert refusal("card-refused", pair.out).where == f"{pair.out}/README.md"
    assert [r.path for r in pair.hub.requests if r.method in ("POST", "PUT")] == ["/api/validate-yaml"]


@pytest.mark.parametrize("card", [b"caf\xe9", b"---\na: \0\n---\n", b"---\n1: [\n---\n", b"---\n1: 1\n---\n"])
def test_a_forged_card_is_refused(pair: HubPair, merged: Path, card: bytes) -> None:
    path, manifest = merged / "README.md", merged / "slrmerge.json"
    path.write_bytes(card)
    content, (file_bytes, digest) = json.loads(manifest.read_bytes()), digest_file(path)
    content["files"]["README.md"] = {"bytes": file_bytes, "digest": digest}
    manifest.write_bytes(signed(content))
    refusal("card-refused", merged)


def test_a_private_push_to_a_public_repository_is_refused(pair: HubPair, merged: Path, other: Path) -> None:
    push(merged, MINE)
    before = pair.hub.head(MINE)
    refusal("repository-public", other, private=True)
    assert pair.hub.head(MINE) == before


def write_lora_merge(pair: HubPair, out: Path, name: str) -> None:
    base = llama_tensors("base")
    write_checkpoint(out.with_name(f"{name}-base"), base)
    factors = lora_tensors(base, [f"model.layers.{layer}.{Q}" for layer in range(4)])
    lora = write_adapter(out.with_name(name), factors, base_model_name_or_path=str(out.with_name(f"{name}-base")))
    merge({"posttrained": str(lora), "restore": [1, 2]}, out, output="adapter")


def write_gguf_merge(pair: HubPair, out: Path, name: str) -> None:
    folder = out.parent / name
    sides = {side: str(write_gguf(folder / f"{name}-{side}.gguf", side)) for side in ("pretrained", "posttrained")}
    merge({**sides, "restore": [1, 2]}, out)


def write_model_merge(pair: HubPair, out: Path, name: str) -> None:
    merge(pair.recipe(restore=[2, 3], max_shard_size="10KB"), out)


WRITERS = {"adapter": write_lora_merge, "GGUF": write_gguf_merge, "model": write_model_merge}


@pytest.mark.parametrize(
    ("older", "newer", "left"),
    [
        ("adapter", "model", set()),
        ("model", "adapter", {"config.json"}),
        ("GGUF", "GGUF", set()),
        ("model", "GGUF", {"config.json"}),
    ],
)
def test_weights_of_an_older_merge_of_another_kind_do_not_stay(
    pair: HubPair, older: str, newer: str, left: set[str]
) -> None:
    WRITERS[older](pair, pair.folder / "older-merge", "older")
    push(pair.folder / "older-merge", MINE)
    WRITERS[newer](pair, pair.folder / "newer-merge", "newer")
    push(pair.folder / "newer-merge", MINE)
    stays = there(pair).keys() - (snapshot(pair.folder / "newer-merge") or {}).keys()
    weights = (".safetensors", ".gguf", ".index.json", "adapter_config.json")
    assert [name for name in stays if name.endswith(weights)] == []
    assert left <= stays


def test_a_push_removes_files_of_an_older_merge_but_no_other_files(pair: HubPair, merged: Path) -> None:
    pair.hub.commit(CHAT, {"chat_template.jinja": b"{{ old }}"})
    merge(pair.recipe(restore=[4, 5]), pair.folder / "old")
    push(pair.folder / "old", MINE)
    others = {"adapter_model.safetensors": b"theirs", "value_head.safetensors": b"theirs too"}
    pair.hub.commit(MINE, others)
    assert push(merged, MINE).removed == ("chat_template.jinja",)
    assert there(pair) == snapshot(merged) | others


@pytest.mark.parametrize("status", [429, 503])
def test_a_commit_that_was_not_made_is_retried(pair: HubPair, merged: Path, status: int) -> None:
    pair.hub.misbehave("status", "POST /api/models/ann/hybrid/commit", status=status, times=2)
    push(merged, MINE)
    assert there(pair) == snapshot(merged)


def test_a_commit_whose_response_was_lost_is_found_by_the_next_push(pair: HubPair, merged: Path) -> None:
    pair.hub.misbehave("cut", "POST /api/models/ann/hybrid/commit")
    assert refusal("hub-unreachable", merged).remedy.startswith("push again")
    assert push(merged, MINE).unchanged
    assert there(pair) == snapshot(merged)


@pytest.mark.parametrize("sides", [("./pre", "./post"), ("./pre", CHAT), (BASE, "./post")])
def test_the_card_of_a_pushed_merge_names_repositories_but_no_folders(pair: HubPair, sides: tuple[str, str]) -> None:
    recipe = pair.recipe(pretrained=sides[0], posttrained=sides[1], restore=[2, 3])
    merge(recipe, pair.out)
    push(pair.out, MINE)
    data = ModelCard.load(pair.out / "README.md").data.to_dict()
    assert data.get("base_model", []) == [side for side in sides if side in (BASE, CHAT)]


def test_one_command_merges_and_pushes(pair: HubPair) -> None:
    recipe = pair.recipe_file(restore=[2, 3])
    result = run(recipe, "--out", pair.out, "--push-to-hub", MINE, "--private")
    assert result.exit_code == 0, result.stderr
    assert f"{pair.hub.url}/{MINE}/commit/{pair.hub.head(MINE)}" in result.stdout
    assert MINE in pair.hub.private
    assert there(pair) == snapshot(pair.out)
    assert f'model="{MINE}"' in (pair.out / "README.md").read_text()
    again = run(recipe, "--out", pair.folder / "again", "--push-to-hub", MINE, "--revision", "two", "--json")
    assert json.loads(again.stdout)["pushed"]["commit"] == pair.hub.head(MINE, "two")
    assert again.stderr == ""


def test_missing_write_access_is_reported_before_the_merge(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, pair.hub, pair.folder / "cache", None)
    result = run(pair.recipe_file(restore=[2, 3]), "--out", pair.out, "--push-to-hub", MINE)
    assert (result.exit_code, pair.out.exists()) == (14, False)


def test_a_push_that_fails_after_the_merge_keeps_the_merge(pair: HubPair) -> None:
    pair.hub.misbehave("status", "POST /api/repos/create", times=None, status=403)
    result = run(pair.recipe_file(restore=[2, 3]), "--out", pair.out, "--push-to-hub", MINE)
    assert result.exit_code == 14
    assert str(pair.out) in result.stderr
    assert read_back(pair.out) == pair.mixed(2, 3)


@pytest.mark.parametrize("option", [["--private"], ["--revision", "x"]])
def test_options_of_a_push_require_one(pair: HubPair, option: list[str]) -> None:
    result = run(pair.recipe_file(restore=[2, 3]), "--out", pair.out, *option)
    assert (result.exit_code, option[0] in result.stderr, pair.out.exists()) == (2, True, False)


@pytest.mark.parametrize("name", ["hybrid", "a/b/c", ""])
def test_a_target_that_is_not_a_repository_is_refused(merged: Path, name: str) -> None:
    with refused(OptionError, "invalid-repository"):
        push(merged, name)
    assert run("push", merged, name).exit_code == 2


def test_a_revision_given_twice_is_refused(merged: Path) -> None:
    with pytest.raises(OptionError):
        push(merged, f"{MINE}@main", revision="late")


def test_the_token_is_never_shown_and_goes_to_the_hub_only(
    pair: HubPair, merged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    result = run("push", merged, MINE)
    assert TOKEN not in result.output + caplog.text
    assert {r.headers.get("authorization") for r in pair.hub.requests if r.host == "cdn"} == {None}


@pytest.mark.parametrize("small_bytes", [0, 1 << 24])
def test_a_push_uploads_through_xet_by_default(
    pair: HubPair, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_bytes: int
) -> None:
    monkeypatch.setattr(push_module, "_SMALL_BYTES", small_bytes)
    xet = tmp_path / "xet"
    xet.mkdir()
    with HubServer(xet=xet) as hub:
        hub.tokens[TOKEN] = "ann"
        use(monkeypatch, hub, tmp_path / "other-cache", TOKEN)
        push(merged, MINE)
        close_session()
        found = {name: data for name, data in hub.files(MINE).items() if name != ATTRIBUTES}
        assert found == snapshot(merged)
        assert not any(request.method == "PUT" for request in hub.requests)


def test_gguf_files_are_pushed_beside_the_safetensors_of_a_repository(pair: HubPair, tmp_path: Path) -> None:
    pair.hub.commit(MINE, {"model.safetensors": b"another format", "config.json": b"{}"})
    sides = {side: str(write_gguf(tmp_path / f"{side}.gguf", side)) for side in ("pretrained", "posttrained")}
    merge({**sides, "restore": [1, 2]}, tmp_path / "gguf")
    pushed = push(tmp_path / "gguf", MINE)
    assert pushed.removed == ()
    assert there(pair) == snapshot(tmp_path / "gguf") | {"model.safetensors": b"another format", "config.json": b"{}"}
