"""The hub does what it says, to the real client."""

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
    get_token,
    hf_api,
    hf_hub_download,
    hf_hub_url,
    model_info,
    scan_cache_dir,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from tests.checkpoint.hub.server import GIT_ATTRIBUTES, HubServer, environment, use

REPO = "ann/model"
WEIGHTS = bytes(range(256)) * 40
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "sub/notes.txt": b"a note"}
TOKEN = "hf_ann"


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    """The client of Ann, who owns a model; Bob has a token as well."""
    hub.tokens |= {TOKEN: "ann", "hf_bob": "bob"}
    hub.commit(REPO, FILES)
    return HfApi(token=TOKEN)


def get(file: str, span: str | None = None) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {TOKEN}"} | ({"Range": f"bytes={span}"} if span else {})
    return get_session().get(hf_hub_url(REPO, file), headers=headers, timeout=5)


def test_regular_and_large_files_download(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    folder = Path(snapshot_download(REPO))
    assert folder.is_relative_to(tmp_path)
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    assert hub.served() == sum(map(len, FILES.values()))
    assert hub.served("^/blobs/") == len(WEIGHTS)


def test_a_range_follows_the_redirect_and_leaves_the_token_behind(hub: HubServer, api: HfApi) -> None:
    answer = get("model.safetensors", "100-199")
    assert (answer.status_code, answer.content) == (206, WEIGHTS[100:200])
    assert answer.headers["Content-Range"] == f"bytes 100-199/{len(WEIGHTS)}"
    at_hub, at_cdn = hub.requests
    assert (at_hub.host, at_hub.status, at_hub.headers["authorization"]) == ("hub", 302, f"Bearer {TOKEN}")
    assert (at_cdn.host, at_cdn.status, at_cdn.served_bytes) == ("cdn", 206, 100)
    assert "authorization" not in at_cdn.headers


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_range_beyond_the_end_is_cut_or_refused(api: HfApi, file: str) -> None:
    data = FILES[file]
    assert get(file, f"{len(data) - 1}-{len(data) + 9}").content == data[-1:]
    assert get(file, "-1").content == data[-1:]
    assert get(file, f"{len(data)}-").status_code == 416


def test_a_signed_range_is_good_for_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: HubServer) -> None:
    with HubServer(signs_ranges=True) as signing:
        use(monkeypatch, signing, tmp_path / "signing")
        signing.commit(REPO, FILES)
        answer = get("model.safetensors", "0-9")
        assert answer.content == WEIGHTS[:10]
        assert get_session().get(answer.url, headers={"Range": "bytes=0-10"}).status_code == 403
        assert get_session().get(answer.url).status_code == 403


def test_branches_tags_and_commits_are_revisions(hub: HubServer, api: HfApi) -> None:
    first = hub.head(REPO)
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="a/b")
    second = hub.commit(REPO, {"config.json": b"{1}", "sub/notes.txt": None})
    assert hub.log(REPO) == [second, first]
    for revision in (first, "v1", "a/b"):
        assert api.model_info(REPO, revision=revision).sha == first
        assert Path(hf_hub_download(REPO, "config.json", revision=revision)).read_bytes() == b"{}"
    assert [entry.path for entry in api.list_repo_tree(REPO, recursive=True)] == ["config.json", "model.safetensors"]
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches + refs.tags} == {
        "main": second,
        "a/b": first,
        "v1": first,
    }


def test_metadata_names_sizes_and_digests(api: HfApi) -> None:
    info = api.model_info(REPO, files_metadata=True)
    assert info.siblings is not None
    assert [(file.rfilename, file.size) for file in info.siblings] == [(path, len(FILES[path])) for path in FILES]
    assert [file.lfs is not None for file in info.siblings] == [False, True, False]
    tree = {file.path: file for file in api.list_repo_tree(REPO, recursive=True) if isinstance(file, RepoFile)}
    assert [(tree[file.rfilename].blob_id, tree[file.rfilename].lfs) for file in info.siblings] == [
        (file.blob_id, file.lfs) for file in info.siblings
    ]


def test_what_is_not_there_is_told_apart(api: HfApi) -> None:
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "nothing.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "config.json", revision="nowhere")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("ann/nothing", "config.json")


def test_a_gated_repository_is_refused_without_a_known_token(hub: HubServer, api: HfApi) -> None:
    hub.gated.add(REPO)
    assert model_info(REPO).gated == "manual"
    for token, status in ((False, 401), ("hf_nobody", 403)):
        with pytest.raises(GatedRepoError) as refused:
            hf_hub_download(REPO, "config.json", token=token)
        assert refused.value.response.status_code == status
    with pytest.raises(GatedRepoError):
        api.auth_check(REPO, token=False)
    assert hf_hub_download(REPO, "config.json", token="hf_bob")


def test_a_private_repository_exists_for_its_owner_only(hub: HubServer, api: HfApi) -> None:
    hub.private.add(REPO)
    for token, status in ((False, 401), ("hf_bob", 404)):
        for ask in (api.model_info, api.auth_check):
            with pytest.raises(RepositoryNotFoundError) as refused:
                ask(REPO, token=token)
            assert refused.value.response.status_code == status
    assert api.model_info(REPO).private
    assert hf_hub_download(REPO, "model.safetensors", token=TOKEN)


def test_a_commit_adds_changes_and_deletes_at_once(hub: HubServer, api: HfApi) -> None:
    assert api.create_repo("ann/new").repo_id == api.create_repo("ann/new", exist_ok=True).repo_id == "ann/new"
    first = hub.head("ann/new")
    added = {"README.md": b"---\nbase_model: [ann/model]\n---\nWords\n", "model.safetensors": WEIGHTS, "none.bin": b""}
    additions = [CommitOperationAdd(path, data) for path, data in added.items()]
    done = api.create_commit("ann/new", additions, commit_message="all of it", parent_commit=first)
    assert hub.files("ann/new") == {".gitattributes": GIT_ATTRIBUTES, **added}
    assert hub.log("ann/new") == [done.oid, first]
    assert not any("authorization" in request.headers for request in hub.requests if request.host == "cdn")
    api.create_commit("ann/new", [CommitOperationDelete("none.bin")], commit_message="less")
    assert "none.bin" not in hub.files("ann/new")
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_commit("ann/new", [CommitOperationDelete("README.md")], commit_message="x", parent_commit=first)
    assert refused.value.response.status_code == 412
    assert "README.md" in hub.files("ann/new")


def test_large_files_are_uploaded_through_xet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: HubServer) -> None:
    (tmp_path / "file").write_bytes(WEIGHTS)
    with HubServer(xet=tmp_path / "xet") as server:
        use(monkeypatch, server, tmp_path / "its", TOKEN)
        server.tokens[TOKEN] = "ann"
        server.commit(REPO, FILES)
        data = {"a.safetensors": WEIGHTS[1:] * 30, "b.safetensors": b"\0" + WEIGHTS}
        additions = [CommitOperationAdd(path, content) for path, content in data.items()]
        additions.append(CommitOperationAdd("c.safetensors", tmp_path / "file"))
        HfApi().create_commit(REPO, additions, commit_message="through Xet")
        assert server.files(REPO) == {**FILES, **data, "c.safetensors": WEIGHTS}
        assert not any(request.method == "PUT" for request in server.requests)
        assert Path(hf_hub_download(REPO, "a.safetensors")).read_bytes() == data["a.safetensors"]


def test_a_large_file_that_was_not_uploaded_is_not_committed(hub: HubServer, api: HfApi) -> None:
    before, addition = hub.head(REPO), CommitOperationAdd("other.safetensors", WEIGHTS + b"\0")
    addition._is_uploaded = True
    addition._upload_mode, addition._should_ignore, addition._remote_oid = "lfs", False, None
    with pytest.raises(HfHubHTTPError, match="not uploaded"):
        api.create_commit(REPO, [addition], commit_message="half")
    assert hub.head(REPO) == before


def test_only_the_owner_writes(hub: HubServer, api: HfApi) -> None:
    api.auth_check(REPO, write=True)
    for token, status in ((False, 401), ("hf_bob", 403)):
        for ask in (
            lambda token: api.auth_check(REPO, write=True, token=token),
            lambda token: api.create_repo("ann/new", token=token),
            lambda token: api.upload_file(path_or_fileobj=b"", path_in_repo="a.txt", repo_id=REPO, token=token),
        ):
            with pytest.raises(HfHubHTTPError) as refused:
                ask(token)
            assert refused.value.response.status_code == status
    assert hub.files(REPO) == FILES


@pytest.mark.parametrize(
    ("card", "problem"),
    [
        ("---\nbase_model: ../folder\n---\n", "base_model"),
        ("---\n- a list\n---\n", "map"),
        ("---\na: [\n---\n", "could not be read"),
    ],
)
def test_a_bad_card_is_refused(api: HfApi, card: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=REPO)


def test_a_range_can_be_ignored_or_wrong_or_corrupt(hub: HubServer, api: HfApi) -> None:
    hub.misbehave("ignore_range", "/blobs/")
    hub.misbehave("wrong_range", "/blobs/")
    hub.misbehave("corrupt", "/blobs/", times=None)
    ignored, wrong, corrupt = (get("model.safetensors", "0-9") for _ in range(3))
    assert (ignored.status_code, ignored.content) == (200, WEIGHTS)
    assert (wrong.status_code, wrong.content) == (206, WEIGHTS[1:11])
    assert wrong.headers["Content-Range"].startswith("bytes 1-10/")
    assert (corrupt.status_code, corrupt.content) == (206, bytes([0, 1, 2, 3, 4, 5 ^ 1, 6, 7, 8, 9]))
    hub.behave()
    assert get("model.safetensors", "0-9").content == WEIGHTS[:10]


def test_an_answer_can_be_cut(hub: HubServer, api: HfApi) -> None:
    hub.misbehave("cut", "GET /blobs/", skip=1)
    assert get("model.safetensors").content == WEIGHTS
    with pytest.raises(httpx2.RemoteProtocolError):
        get("model.safetensors")
    assert hub.requests[-1].served_bytes == len(WEIGHTS) // 2


def test_an_answer_can_be_an_error(hub: HubServer, api: HfApi) -> None:
    hub.misbehave("status", "HEAD .*config.json", status=429, headers={"Retry-After": "0"})
    answer = get_session().head(hf_hub_url(REPO, "config.json"))
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "0")
    assert hf_hub_download(REPO, "config.json")


def test_an_answer_can_stay_away(hub: HubServer, api: HfApi) -> None:
    hub.misbehave("reset", "config.json")
    with pytest.raises(httpx2.RemoteProtocolError):
        get("config.json")
    hub.misbehave("hang", "config.json")
    with pytest.raises(httpx2.ReadTimeout):
        get_session().get(hf_hub_url(REPO, "config.json"), timeout=0.1)
    assert [request.status for request in hub.requests] == [0, 0]


def test_a_hub_with_a_hanging_connection_closes_at_once() -> None:
    with HubServer() as server, httpx2.Client() as client:
        server.misbehave("hang", "/")
        with pytest.raises(httpx2.ReadTimeout):
            client.get(server.url, timeout=0.05)
        start = time.monotonic()
    assert time.monotonic() - start < 1


def test_the_client_of_this_process_is_put_back(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    def now() -> tuple[str, str, str, str | None]:
        return constants.ENDPOINT, constants.HF_HUB_CACHE, hf_api.api.endpoint, get_token()

    before = now()
    with pytest.MonkeyPatch.context() as patch, HubServer() as other:
        use(patch, other, tmp_path / "other", TOKEN)
        assert now() == (other.url, str(tmp_path / "other" / "hub"), other.url, TOKEN)
        assert hf_hub_url(REPO, "x").startswith(other.url)
    assert now() == before
    hf_hub_download(REPO, "config.json")
    assert [repo.repo_id for repo in scan_cache_dir().repos] == [REPO]


def test_another_process_is_pointed_at_the_hub(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    code = f"import huggingface_hub as h; print(h.whoami()['name'], h.hf_hub_download({REPO!r}, 'model.safetensors'))"
    variables = os.environ | environment(hub, tmp_path / "its", TOKEN)
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    name, path = done.stdout.split()
    assert name == "ann"
    assert Path(path).is_relative_to(tmp_path / "its")
    assert Path(path).read_bytes() == WEIGHTS
