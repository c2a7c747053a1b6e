"""A merge is pushed as one commit, whole or not at all, and only by who may."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, close_session, snapshot_download

from slrmerge import Repository, load_recipe, merge_checkpoints, push, push_to_hub, verify_checkpoint
from slrmerge.errors import HubError, VerificationError
from tests.checkpoints import read_back
from tests.cli import run
from tests.hub.conftest import BASE, CHAT, HubPair, files_of
from tests.hub.server import HubServer, environment, use

MINE = "ann/hybrid"
TOKEN = "hf_ann"
ATTRIBUTES = ".gitattributes"


@pytest.fixture(autouse=True)
def token(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ann is logged in; Bob is somebody else."""
    pair.hub.tokens |= {TOKEN: "ann", "hf_bob": "bob"}
    use(monkeypatch, pair.hub, pair.folder / "cache", TOKEN)


@pytest.fixture
def merged(pair: HubPair) -> Path:
    merge_checkpoints(pair.recipe(restore=[2, 3]), pair.out)
    return pair.out


@pytest.fixture
def other(pair: HubPair) -> Path:
    """Another merge of the same pair."""
    merge_checkpoints(pair.recipe(restore=[4, 5]), pair.folder / "other")
    return pair.folder / "other"


def there(pair: HubPair, revision: str = "main") -> dict[str, bytes]:
    """The files of the repository that was pushed to, git's own aside."""
    return {name: data for name, data in pair.hub.files(MINE, revision).items() if name != ATTRIBUTES}


def test_a_push_is_one_commit_of_exactly_the_files_of_the_merge(pair: HubPair, merged: Path) -> None:
    pushed = push_to_hub(merged, Repository(MINE))
    assert there(pair) == files_of(merged)
    assert sorted(pushed.files) == sorted(files_of(merged))
    assert (pushed.commit, pushed.removed, pushed.was_there) == (pair.hub.head(MINE), (), False)
    assert len(pair.hub.log(MINE)) == 2  # the first is the Hub's own


def test_what_was_pushed_verifies_and_merges_again(pair: HubPair, merged: Path) -> None:
    push_to_hub(merged, Repository(MINE))
    fetched = Path(snapshot_download(MINE))
    assert verify_checkpoint(fetched, full=True).against_sources
    recipe = pair.recipe(pretrained=BASE, posttrained=MINE, restore=[0, 0])
    merge_checkpoints(recipe, pair.folder / "more")
    assert read_back(pair.folder / "more") == pair.mixed(0, 2, 3)


def test_shards_of_an_older_merge_go_with_the_same_commit_and_everything_else_stays(
    pair: HubPair, merged: Path
) -> None:
    push_to_hub(merged, Repository(MINE))
    pair.hub.commit(MINE, {"notes.md": b"mine", "gguf/model.gguf": b"mine too", "sub/model.safetensors": b"and this"})
    merge_checkpoints(pair.recipe(restore=[2, 3], max_shard_size="100KB"), pair.folder / "sharded")
    pushed = push_to_hub(pair.folder / "sharded", Repository(MINE))
    assert pushed.removed == ("model.safetensors",)
    others = {"notes.md": b"mine", "gguf/model.gguf": b"mine too", "sub/model.safetensors": b"and this"}
    assert there(pair) == files_of(pair.folder / "sharded") | others
    pushed = push_to_hub(merged, Repository(MINE))
    shards = (f"model-0000{number}-of-00004.safetensors" for number in range(1, 5))
    assert pushed.removed == (*shards, "model.safetensors.index.json")
    assert there(pair) == files_of(merged) | others
    assert len(pair.hub.log(MINE)) == 5


def test_a_push_again_sends_nothing_and_makes_no_commit(pair: HubPair, merged: Path) -> None:
    first = push_to_hub(merged, Repository(MINE))
    pair.hub.requests.clear()
    again = push_to_hub(merged, Repository(MINE))
    assert (again.commit, again.was_there) == (first.commit, True)
    assert {request.method for request in pair.hub.requests if request.host == "cdn"} == set()
    assert run("push", merged, MINE).stdout == f"nothing to push: {again.url} has it already\n"


def test_a_branch_is_made_where_there_is_none(pair: HubPair, merged: Path, other: Path) -> None:
    push_to_hub(merged, Repository(MINE))
    before = pair.hub.head(MINE)
    result = run("push", other, MINE, "--revision", "late")
    assert result.exit_code == 0, result.stderr
    assert (there(pair, "late"), pair.hub.head(MINE)) == (files_of(other), before)


@pytest.mark.parametrize("private", [False, True])
def test_a_repository_is_made_private_when_asked(pair: HubPair, merged: Path, private: bool) -> None:
    assert run("push", merged, MINE, *(["--private"] if private else [])).exit_code == 0
    assert (MINE in pair.hub.private) == private


def test_a_merge_that_was_altered_is_not_pushed(pair: HubPair, merged: Path) -> None:
    pair.hub.requests.clear()
    (merged / "config.json").write_text("{}")
    with pytest.raises(VerificationError):
        push_to_hub(merged, Repository(MINE))
    assert [request for request in pair.hub.requests if request.method != "GET"] == []


def test_a_folder_that_is_no_merge_is_not_pushed(pair: HubPair) -> None:
    result = run("push", pair.folder / "post", MINE)
    assert (result.exit_code, result.stderr.splitlines()[1]) == (
        10,
        f"  {pair.folder / 'post'}/slrmerge.json: is not there; only folders that slrmerge wrote can be verified",
    )


def test_a_stray_file_is_not_pushed(pair: HubPair, merged: Path) -> None:
    (merged / "notes.txt.swp").write_text("mine")
    push_to_hub(merged, Repository(MINE))
    assert "notes.txt.swp" not in there(pair)


def refusal(folder: Path, repository: str = MINE, **options: bool) -> str:
    with pytest.raises(HubError) as caught:
        push_to_hub(folder, Repository(repository), **options)
    return str(caught.value)


def test_who_is_not_logged_in_is_told_how(pair: HubPair, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, pair.hub, pair.folder / "cache", None)
    assert refusal(merged) == f"{MINE}: needs a token; log in with `hf auth login`, or set HF_TOKEN"


def test_a_token_of_somebody_else_is_refused(pair: HubPair, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_to_hub(merged, Repository(MINE))
    use(monkeypatch, pair.hub, pair.folder / "cache", "hf_bob")
    assert refusal(merged) == (
        f"{MINE}: is not for your token (403: You don't have the rights to write under the namespace ann); "
        f"give it a token with the right to do this; see {pair.hub.url}/{MINE}"
    )


@pytest.mark.parametrize("name", ["ann/-odd", "ann/odd--name", "ann/" + "x" * 100])
def test_a_name_that_no_repository_can_have_is_refused_before_anything_is_asked(
    pair: HubPair, merged: Path, name: str
) -> None:
    pair.hub.requests.clear()
    said = refusal(merged, name)
    assert said.startswith(f"{name}: is no name of a repository (")
    assert said.endswith("; write organisation/name")
    assert pair.hub.requests == []


def test_without_a_network_nothing_is_pushed(pair: HubPair, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refusal(merged) == f"{MINE}: cannot be reached while HF_HUB_OFFLINE is set; unset it"


def test_what_somebody_else_pushed_meanwhile_is_not_overwritten(pair: HubPair, merged: Path, other: Path) -> None:
    push_to_hub(merged, Repository(MINE))
    pair.hub.misbehave("status", "POST /api/models/ann/hybrid/commit", status=412)
    before = pair.hub.head(MINE)
    assert refusal(other) == (
        f"{MINE}: was changed by somebody else meanwhile (412); look at what they did, and run again"
    )
    assert pair.hub.head(MINE) == before


def test_a_commit_on_top_of_another_than_was_looked_at_is_refused_by_the_hub(
    pair: HubPair, merged: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_to_hub(merged, Repository(MINE))

    def meanwhile(there: object) -> set[str]:
        pair.hub.commit(MINE, {"notes.md": b"theirs"})
        return set()

    monkeypatch.setattr(push, "_stale", meanwhile)
    assert "was changed by somebody else meanwhile (412)" in refusal(other)
    assert there(pair)["notes.md"] == b"theirs"
    assert there(pair)["model.safetensors"] == (merged / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "match",
    ["POST /ann/hybrid.git/info/lfs/objects/batch", "PUT /", "POST /api/models/ann/hybrid/commit"],
)
def test_a_push_that_fails_leaves_the_branch_and_goes_through_when_tried_again(
    pair: HubPair, merged: Path, other: Path, match: str
) -> None:
    push_to_hub(merged, Repository(MINE))
    before = pair.hub.head(MINE)
    pair.hub.misbehave("status", match, times=None, status=403)
    assert "403" in refusal(other)
    assert pair.hub.head(MINE) == before
    pair.hub.behave()
    push_to_hub(other, Repository(MINE))
    assert there(pair) == files_of(other)


def test_a_push_killed_before_its_commit_leaves_the_branch_where_it_was(
    pair: HubPair, merged: Path, other: Path
) -> None:
    push_to_hub(merged, Repository(MINE))
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
    push_to_hub(other, Repository(MINE))
    assert there(pair) == files_of(other)


def test_the_card_is_one_that_the_hub_and_its_client_understand(pair: HubPair, merged: Path) -> None:
    card = ModelCard.load(merged / "README.md")
    card.validate()
    data = card.data.to_dict()
    assert data["base_model"] == [BASE, CHAT]
    assert (data["base_model_relation"], data["library_name"], data["license"]) == ("merge", "transformers", "mit")
    assert data["tags"] == ["merge", "slrmerge", "selective-layer-restoration"]


def test_a_card_that_the_hub_would_not_take_is_refused_before_anything_is_sent(pair: HubPair) -> None:
    card = (pair.folder / "post" / "README.md").read_text().replace("mit", "[a: b")
    (pair.folder / "post" / "README.md").write_text(card)
    recipe = pair.recipe_file(pretrained="./pre", posttrained="./post", restore=[2, 3])
    merge_checkpoints(load_recipe(recipe), pair.out)
    pair.hub.misbehave("status", "POST /api/validate-yaml", status=400)
    pair.hub.requests.clear()
    assert f"{pair.out}/README.md: " in refusal(pair.out)
    assert [r.path for r in pair.hub.requests if r.method in ("POST", "PUT")] == ["/api/validate-yaml"]


def test_private_is_not_taken_lightly(pair: HubPair, merged: Path, other: Path) -> None:
    push_to_hub(merged, Repository(MINE))
    before = pair.hub.head(MINE)
    assert refusal(other, private=True) == (
        f"{MINE}: is public already; make it private on the Hub, or push without --private"
    )
    assert pair.hub.head(MINE) == before


def test_what_an_older_merge_left_goes_and_what_others_put_there_stays(pair: HubPair, merged: Path) -> None:
    pair.hub.commit(CHAT, {"chat_template.jinja": b"{{ old }}"})
    merge_checkpoints(pair.recipe(restore=[4, 5]), pair.folder / "old")
    push_to_hub(pair.folder / "old", Repository(MINE))
    others = {"adapter_model.safetensors": b"theirs", "value_head.safetensors": b"theirs too"}
    pair.hub.commit(MINE, others)
    assert push_to_hub(merged, Repository(MINE)).removed == ("chat_template.jinja",)
    assert there(pair) == files_of(merged) | others


@pytest.mark.parametrize("status", [429, 503])
def test_a_commit_that_was_not_made_is_tried_again(pair: HubPair, merged: Path, status: int) -> None:
    pair.hub.misbehave("status", "POST /api/models/ann/hybrid/commit", status=status, times=2)
    push_to_hub(merged, Repository(MINE))
    assert there(pair) == files_of(merged)


def test_a_commit_whose_answer_was_lost_is_there_when_pushed_again(pair: HubPair, merged: Path) -> None:
    pair.hub.misbehave("cut", "POST /api/models/ann/hybrid/commit")
    assert "push again: what was uploaded is kept" in refusal(merged)
    assert push_to_hub(merged, Repository(MINE)).was_there
    assert there(pair) == files_of(merged)


@pytest.mark.parametrize("sides", [("./pre", "./post"), ("./pre", CHAT), (BASE, "./post")])
def test_a_merge_of_folders_is_pushed_with_a_card_that_names_no_folder_as_a_model(
    pair: HubPair, sides: tuple[str, str]
) -> None:
    recipe = pair.recipe(pretrained=sides[0], posttrained=sides[1], restore=[2, 3])
    merge_checkpoints(recipe, pair.out)
    push_to_hub(pair.out, Repository(MINE))
    data = ModelCard.load(pair.out / "README.md").data.to_dict()
    assert data.get("base_model", []) == [side for side in sides if side in (BASE, CHAT)]


def test_a_merge_may_be_pushed_by_the_same_command(pair: HubPair) -> None:
    recipe = pair.recipe_file(restore=[2, 3])
    result = run(recipe, "--out", pair.out, "--push-to-hub", MINE, "--private")
    assert (result.exit_code, result.stderr) == (0, f"pushing 6 files to {MINE}\n")
    url = f"{pair.hub.url}/{MINE}/commit/{pair.hub.head(MINE)}"
    assert result.stdout.splitlines()[-1] == f"pushed 6 files: {url}"
    assert there(pair) == files_of(pair.out)
    assert f'model="{MINE}"' in (pair.out / "README.md").read_text()
    again = run(recipe, "--out", pair.folder / "again", "--push-to-hub", MINE, "--revision", "two", "--json")
    assert json.loads(again.stdout)["pushed"]["commit"] == pair.hub.head(MINE, "two")
    assert again.stderr == ""


def test_who_may_not_push_is_told_before_anything_is_merged(pair: HubPair, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, pair.hub, pair.folder / "cache", None)
    result = run(pair.recipe_file(restore=[2, 3]), "--out", pair.out, "--push-to-hub", MINE)
    assert (result.exit_code, pair.out.exists()) == (14, False)


def test_a_push_that_fails_after_a_merge_says_that_the_merge_is_there(pair: HubPair) -> None:
    pair.hub.misbehave("status", "POST /api/repos/create", times=None, status=403)
    result = run(pair.recipe_file(restore=[2, 3]), "--out", pair.out, "--push-to-hub", MINE)
    assert result.exit_code == 14
    assert result.stderr.splitlines()[-1] == (
        f"  the merge is complete in {pair.out}; `slrmerge push` pushes it without merging again"
    )
    assert read_back(pair.out) == pair.mixed(2, 3)


@pytest.mark.parametrize("option", [["--private"], ["--revision", "x"]])
def test_options_of_a_push_need_one(pair: HubPair, option: list[str]) -> None:
    result = run(pair.recipe_file(restore=[2, 3]), "--out", pair.out, *option)
    assert result.exit_code == 2
    assert f"{option[0]} goes with --push-to-hub" in result.stderr


@pytest.mark.parametrize("name", ["hybrid", "a/b/c", "ann/hybrid@main", ""])
def test_what_is_no_repository_is_a_usage_error(merged: Path, name: str) -> None:
    result = run("push", merged, name)
    assert (result.exit_code, f"{name!r} is not organisation/name" in result.stderr) == (2, True)


def test_a_token_that_pushes_is_shown_nowhere_and_goes_to_the_hub_only(
    pair: HubPair, merged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    result = run("push", merged, MINE)
    assert TOKEN not in result.output + caplog.text
    assert {r.headers.get("authorization") for r in pair.hub.requests if r.host == "cdn"} == {None}


def test_a_push_goes_through_xet_as_it_does_by_default(
    pair: HubPair, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xet = tmp_path / "xet"
    xet.mkdir()
    with HubServer(xet=xet) as hub:
        hub.tokens[TOKEN] = "ann"
        use(monkeypatch, hub, tmp_path / "other-cache", TOKEN)
        push_to_hub(merged, Repository(MINE))
        close_session()
        found = {name: data for name, data in hub.files(MINE).items() if name != ATTRIBUTES}
        assert found == files_of(merged)
        assert not any(request.method == "PUT" for request in hub.requests)
