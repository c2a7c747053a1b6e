"""A small model hub on loopback: what the real client asks of one, and what goes wrong with one.

Tests run the real `huggingface_hub` client, not a mock of it: what it sends, follows, retries and raises is its own.
"""

import base64
import hashlib
import importlib.util
import json
import re
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote

import pytest
import yaml

from tests.checkpoint.hub.transport import Answer, Asked, Fault, Kind, Listener, Refusal, Request, ranged
from tests.checkpoint.hub.xet import read_back

LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".gguf")
LFS_SIZE = 1_000_000
GIT_ATTRIBUTES = b"".join(b"*%s filter=lfs diff=lfs merge=lfs -text\n" % suffix.encode() for suffix in LFS_SUFFIXES)
REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass
class Commit:
    """A tree and where it came from."""

    parent: str | None
    files: dict[str, bytes]
    sha: str


@dataclass
class Repo:
    """Commits, and the names of some; `uploaded` are the digests of the large files it was given."""

    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    uploaded: set[str] = field(default_factory=set)

    def at(self, revision: str) -> Commit:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def add(self, branch: str, files: dict[str, bytes], message: str) -> str:
        parent = self.branches.get(branch)
        digests = [f"{path} {git_oid(data)}" for path, data in sorted(files.items())]
        sha = hashlib.sha1("\n".join([str(len(self.commits)), str(parent), message, *digests]).encode()).hexdigest()
        self.commits[sha] = Commit(parent, files, sha)
        self.branches[branch] = sha
        self.uploaded |= {sha256(data) for path, data in files.items() if is_lfs(path, len(data))}
        return sha


def is_lfs(path: str, size: int) -> bool:
    """Whether a file is kept apart from the tree; an empty one never is, for the client uploads none such."""
    return size > LFS_SIZE or (size > 0 and path.endswith(LFS_SUFFIXES))


@lru_cache(64)
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@lru_cache(64)
def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(data: bytes) -> bytes:
    """What the tree has in place of a large file."""
    return f"version 1\noid sha256:{sha256(data)}\nsize {len(data)}\n".encode()


def tree_entry(path: str, data: bytes) -> dict[str, Any]:
    """A file as a listing of the tree has it."""
    if not is_lfs(path, len(data)):
        return {"path": path, "size": len(data), "oid": git_oid(data)}
    lfs = {"oid": sha256(data), "size": len(data), "pointerSize": len(pointer(data))}
    return {"path": path, "size": len(data), "oid": git_oid(pointer(data)), "lfs": lfs, "xetHash": sha256(data)[::-1]}


def sibling(path: str, data: bytes, in_full: bool) -> dict[str, Any]:
    """A file as the metadata of its repository has it."""
    if not in_full:
        return {"rfilename": path}
    entry = tree_entry(path, data)
    lfs = {"lfs": {**entry["lfs"], "sha256": entry["lfs"]["oid"]}} if "lfs" in entry else {}
    return {"rfilename": path, "size": entry["size"], "blobId": entry["oid"], **lfs}


def front_matter(card: str) -> Any:
    """The metadata of a model card, None without any; raises `yaml.YAMLError`."""
    found = re.match(r"\s*---\s*\n(.*?)\n?---\s*(\n|$)", card, re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


Route = Callable[..., Answer]
ROUTES: list[tuple[re.Pattern[str], Route]] = []


def route(pattern: str) -> Callable[[Route], Route]:
    """Answer "host METHOD /path" with a method of the hub; `{name}` is a part of the path; HEAD goes where GET does.

    `{repo}` is a model, org/name, or a dataset, datasets/org/name.
    """
    pattern = pattern.replace("/api/{repo}", "/api/(models/|(?=datasets/)){repo}")
    pattern = pattern.replace("{repo}", r"(?P<repo>(datasets/)?[^/]+/[^/]+?)")
    pattern = re.sub(r"\{(\w+)\.\.\.\}", r"(?P<\1>.+)", pattern)
    compiled = re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern))

    def register(function: Route) -> Route:
        ROUTES.append((compiled, function))
        return function

    return register


class HubServer:
    """A hub and its content delivery, two ports of 127.0.0.1, from `with` to the end of it.

    With `signs_ranges`, the address of a large file is good for no other Range than it was asked for with. With `xet`,
    an empty folder, the client uploads large files through Xet, as it does by default; downloads never go there. With
    `copies_refused`, no large file is copied from one repository to another.
    """

    copies_refused = False

    def __init__(self, *, signs_ranges: bool = False, xet: Path | None = None) -> None:
        self.signs_ranges, self.xet = signs_ranges, xet
        self.requests: list[Request] = []
        self.connections: list[str] = []
        self.tokens: dict[str, str] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.closing = threading.Event()
        self._lock = threading.RLock()
        self._faults: list[Fault] = []
        self._repos: dict[str, Repo] = {}
        self._blobs: dict[str, bytes] = {}
        self._listeners = [Listener(self, "hub"), Listener(self, "cdn")]
        self.url, self.cdn_url = (f"http://127.0.0.1:{listener.server_address[1]}" for listener in self._listeners)

    def __enter__(self) -> Self:
        for listener in self._listeners:
            listener.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        for listener in self._listeners:
            listener.stop()

    def commit(
        self, repo: str, files: Mapping[str, bytes | None], *, branch: str = "main", message: str = "a commit"
    ) -> str:
        """Change files (None deletes one) of a repository, made if there is none: the new commit."""
        with self._lock:
            kept = self._repos.setdefault(repo, Repo())
            if branch not in kept.branches and "main" in kept.branches:
                kept.branches[branch] = kept.branches["main"]
            tree: dict[str, bytes | None] = {**(self.files(repo, branch) if branch in kept.branches else {}), **files}
            return self._commit(kept, branch, {path: data for path, data in tree.items() if data is not None}, message)

    def _commit(self, repo: Repo, branch: str, files: dict[str, bytes], message: str) -> str:
        self._blobs |= {sha256(data): data for path, data in files.items() if is_lfs(path, len(data))}
        return repo.add(branch, files, message)

    def tag(self, repo: str, name: str, revision: str = "main") -> None:
        self._repos[repo].tags[name] = self._repos[repo].at(revision).sha

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        with self._lock:
            return dict(self._repos[repo].at(revision).files)

    def head(self, repo: str, branch: str = "main") -> str:
        return self._repos[repo].branches[branch]

    def log(self, repo: str, branch: str = "main") -> list[str]:
        """The commits of a branch, newest first."""
        shas: list[str] = []
        sha: str | None = self.head(repo, branch)
        while sha is not None:
            shas.append(sha)
            sha = self._repos[repo].commits[sha].parent
        return shas

    def misbehave(self, kind: Kind, match: str, **options: Any) -> None:
        with self._lock:
            self._faults.append(Fault(kind, match, **options))

    def behave(self) -> None:
        with self._lock:
            self._faults.clear()

    def served(self, match: str = "") -> int:
        """Bytes that went out for files, or for GET requests whose path `match` is found in."""
        match = match or r"^/blobs/|/resolve/"
        return sum(r.served_bytes for r in list(self.requests) if r.method == "GET" and re.search(match, r.path))

    def take_fault(self, line: str, kinds: tuple[Kind, ...]) -> Fault | None:
        """The first fault of these kinds that is due for a request."""
        with self._lock:
            for fault in self._faults:
                if fault.kind in kinds and fault.times != 0 and re.search(fault.match, line):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times = fault.times and fault.times - 1
                    return fault
        return None

    def answer(self, host: str, asked: Asked) -> Answer:
        line = f"{host} {asked.method.replace('HEAD', 'GET')} {asked.path}"
        for pattern, function in ROUTES:
            if found := pattern.fullmatch(line):
                parts = {name: unquote(part) for name, part in found.groupdict().items() if part is not None}
                try:
                    with self._lock:
                        return function(self, asked, **parts)
                except Refusal as refusal:
                    return refusal.answer
        return Refusal(404, "Sorry, we can't find the page you are looking for.").answer

    def _repo(self, asked: Asked, name: str, need: Literal["to see", "to read", "to write"]) -> Repo:
        """A repository, if the token may see it and has the access that is needed."""
        user, owner = self.tokens.get(asked.token or ""), name.split("/")[-2]
        if name not in self._repos or (name in self.private and user != owner):
            status, message = (404, "Repository not found") if asked.token else (401, "Invalid username or password.")
            raise Refusal(status, message, "RepoNotFound")
        if need == "to read" and name in self.gated and user is None:
            status, message = (403, "ask for access") if asked.token else (401, "be authenticated to access it")
            kind = "dataset" if name.startswith("datasets/") else "model"
            name = name.removeprefix("datasets/")
            raise Refusal(status, f"Access to {kind} {name} is restricted. You must {message}.", "GatedRepo")
        if need == "to write":
            self._owned(asked, owner, "RepoNotFound")
        return self._repos[name]

    def _owned(self, asked: Asked, owner: str, code: str | None = None) -> None:
        user = self.tokens.get(asked.token or "")
        if user is None:
            raise Refusal(401, "Invalid username or password.", code)
        if user != owner:
            raise Refusal(403, f"You don't have the rights to write under the namespace {owner}")

    def _signature(self, digest: str, asked_range: str) -> str:
        signed = f"the signing key {digest} {asked_range if self.signs_ranges else ''}"
        return hashlib.sha256(signed.encode()).hexdigest()[:16]

    def _blob_url(self, digest: str, asked: Asked) -> str:
        signature = self._signature(digest, asked.headers.get("range", ""))
        return f"{self.cdn_url}/blobs/{digest}?signature={signature}"

    @route("hub GET /{repo}/resolve/{rev}/{file...}")
    def _resolve(self, asked: Asked, repo: str, rev: str, file: str) -> Answer:
        commit = self._repo(asked, repo, "to read").at(rev)
        headers = {"X-Repo-Commit": commit.sha}
        if file not in commit.files:
            refusal = Refusal(404, "Entry not found", "EntryNotFound").answer
            refusal.headers |= headers
            return refusal
        data = commit.files[file]
        if not is_lfs(file, len(data)):
            return ranged(asked, data, {**headers, "ETag": f'"{git_oid(data)}"'})
        etag = f'"{sha256(data)}"'
        headers |= {"ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": str(len(data)), "Accept-Ranges": "bytes"}
        return Answer(status=302, headers={**headers, "Location": self._blob_url(sha256(data), asked)})

    @route("cdn (GET|PUT) /blobs/{digest}")
    def _blob(self, asked: Asked, digest: str) -> Answer:
        if asked.query.get("signature") != [self._signature(digest, asked.headers.get("range", ""))]:
            raise Refusal(403, "Access denied")
        if asked.method != "PUT":
            if digest not in self._blobs:
                raise Refusal(404, "No such blob")
            return ranged(asked, self._blobs[digest], {"ETag": f'"{digest}"'})
        if sha256(asked.body) != digest:
            raise Refusal(400, "The content does not match its digest")
        self._blobs[digest] = asked.body
        return Answer()

    @route("hub GET /api/{repo}(/revision/{rev})?")
    def _info(self, asked: Asked, repo: str, rev: str = "main") -> Answer:
        commit = self._repo(asked, repo, "to see").at(rev)
        try:
            card = front_matter(commit.files.get("README.md", b"").decode())
        except (yaml.YAMLError, UnicodeDecodeError):
            card = None
        card = card if isinstance(card, dict) else {}
        name = repo.removeprefix("datasets/")
        return Answer.of(
            {"id": name, "modelId": name, "author": name.partition("/")[0], "sha": commit.sha}
            | {"private": repo in self.private, "gated": "manual" if repo in self.gated else False, "disabled": False}
            | {"tags": card.get("tags", []), "cardData": card, "downloads": 0, "likes": 0}
            | {"createdAt": "2025-01-01T00:00:00.000Z", "lastModified": "2025-01-01T00:00:00.000Z"}
            | {"siblings": [sibling(path, data, asked.flag("blobs")) for path, data in sorted(commit.files.items())]}
        )

    @route("hub GET /api/{repo}/tree/{rev}(/{folder...})?")
    def _tree(self, asked: Asked, repo: str, rev: str, folder: str = "") -> Answer:
        files = self._repo(asked, repo, "to see").at(rev).files
        start = f"{folder}/" if folder else ""
        below = [path for path in sorted(files) if path.startswith(start)]
        if asked.flag("recursive"):
            return Answer.of([{"type": "file", **tree_entry(path, files[path])} for path in below])
        here = [path for path in below if "/" not in path.removeprefix(start)]
        folders = sorted({start + path.removeprefix(start).partition("/")[0] for path in below} - {*here})
        return Answer.of(
            [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]
            + [{"type": "file", **tree_entry(path, files[path])} for path in here]
        )

    @route("hub POST /api/{repo}/paths-info/{rev}")
    def _paths_info(self, asked: Asked, repo: str, rev: str) -> Answer:
        files = self._repo(asked, repo, "to see").at(rev).files
        wanted = parse_qs(asked.body.decode())["paths"]
        return Answer.of([{"type": "file", **tree_entry(path, files[path])} for path in wanted if path in files])

    @route("hub POST /api/{repo}/lfs-files/duplicate")
    def _duplicate(self, asked: Asked, repo: str) -> Answer:
        kept, given = self._repo(asked, repo, "to read"), asked.json()
        target = self._repo(asked, given["target"]["name"], "to write")
        failed = []
        for file in given["files"]:
            if self.copies_refused or file["sha256"] not in kept.uploaded or file["xetHash"] != file["sha256"][::-1]:
                failed.append({"sha256": file["sha256"], "error": "another region"})
            else:
                target.uploaded.add(file["sha256"])
        return Answer.of({"success": not failed, "failed": failed})

    @route("hub GET /api/{repo}/refs")
    def _refs(self, asked: Asked, repo: str) -> Answer:
        kept = self._repo(asked, repo, "to see")

        def refs(kind: str, named: Mapping[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in named.items()]

        found = {"branches": refs("heads", kept.branches), "tags": refs("tags", kept.tags)}
        return Answer.of({**found, "converts": [], "pullRequests": []})

    @route("hub GET /api/whoami-v2")
    def _whoami(self, asked: Asked) -> Answer:
        user = self.tokens.get(asked.token or "")
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        access = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
        return Answer.of({"type": "user", "name": user, "fullname": user, "orgs": [], "auth": access})

    @route("hub GET /api/{repo}/auth-check(?P<write>/write)?")
    def _auth_check(self, asked: Asked, repo: str, write: str = "") -> Answer:
        self._repo(asked, repo, "to write" if write else "to read")
        return Answer.of({})

    @route("hub GET /api/agent-harnesses")
    def _agent_harnesses(self, asked: Asked) -> Answer:
        return Answer.of({"standardEnvVars": [], "harnesses": {}})

    @route("hub POST /api/repos/create")
    def _create(self, asked: Asked) -> Answer:
        given = asked.json()
        owner = given.get("organization") or self.tokens.get(asked.token or "", "")
        self._owned(asked, owner)
        repo = f"{owner}/{given['name']}"
        url = {"url": f"{self.url}/{repo}", "id": repo, "name": repo}
        if repo in self._repos:
            return Answer.of({**url, "error": "You already created this model repo"}, 409)
        if given.get("visibility") == "private" or given.get("private"):
            self.private.add(repo)
        self.commit(repo, {".gitattributes": GIT_ATTRIBUTES}, message="initial commit")
        return Answer.of(url)

    @route("hub POST /api/{repo}/(?P<kind>branch|tag)/{name}")
    def _create_ref(self, asked: Asked, repo: str, kind: str, name: str) -> Answer:
        kept = self._repo(asked, repo, "to write")
        given = asked.json()
        named, start = (kept.branches, given.get("startingPoint")) if kind == "branch" else (kept.tags, name)
        name = name if kind == "branch" else given["tag"]
        if name in named:
            raise Refusal(409, f"Reference already exists: {name}")
        named[name] = kept.at(start or "main").sha
        return Answer.of({})

    @route("hub POST /api/validate-yaml")
    def _validate_yaml(self, asked: Asked) -> Answer:
        errors, warnings = [], []
        try:
            card = front_matter(asked.json()["content"])
            if card is None:
                warnings.append("empty or missing yaml metadata in repo card")
            elif not isinstance(card, dict):
                errors.append("metadata must be a map")
            else:
                bases = card.get("base_model", [])
                for base in bases if isinstance(bases, list) else [bases]:
                    if not isinstance(base, str) or not REPO_ID.fullmatch(base):
                        errors.append(f'"base_model" with value "{base}" is not valid. Use a model id.')
        except yaml.YAMLError as error:
            errors.append(f"YAML metadata could not be read: {error}")
        found = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        return Answer.of(found, 400 if errors else 200)

    @route("hub POST /api/{repo}/preupload/{rev}")
    def _preupload(self, asked: Asked, repo: str, rev: str) -> Answer:
        files = self._repo(asked, repo, "to write").at(rev).files
        answers = []
        ignored = asked.json().get("gitIgnore", files.get(".gitignore", b"").decode()).split()
        for given in asked.json()["files"]:
            path, data = given["path"], files.get(given["path"])
            is_ignored = any(map(PurePosixPath(path).match, ignored))
            oid = None if data is None else sha256(data) if is_lfs(path, len(data)) else git_oid(data)
            mode = "lfs" if is_lfs(path, given["size"]) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": is_ignored, "oid": oid})
        return Answer.of({"files": answers})

    @route(r"hub POST /{repo}\.git/info/lfs/objects/batch")
    def _lfs_batch(self, asked: Asked, repo: str) -> Answer:
        uploaded = self._repo(asked, repo, "to write").uploaded
        objects = asked.json()["objects"]
        for item in (item for item in objects if item["oid"] not in uploaded):
            upload = {"href": self._blob_url(item["oid"], asked)}
            item["actions"] = {"upload": upload, "verify": {"href": f"{self.url}/{repo}.git/info/lfs/verify"}}
        return Answer.of({"transfer": "basic", "objects": objects})

    @route(r"hub POST /{repo}\.git/info/lfs/verify")
    def _lfs_verify(self, asked: Asked, repo: str) -> Answer:
        kept, given = self._repo(asked, repo, "to write"), asked.json()
        if len(self._blobs.get(given["oid"], b"")) != given["size"]:
            raise Refusal(404, "The object was not uploaded")
        kept.uploaded.add(given["oid"])
        return Answer.of({})

    @route("hub GET /api/{repo}/xet-write-token/{rev}")
    def _xet_token(self, asked: Asked, repo: str, rev: str) -> Answer:
        self._repo(asked, repo, "to write")
        if self.xet is None:
            raise Refusal(404, "No Xet here")
        return Answer.of({"casUrl": f"local://{self.xet}", "accessToken": "a token", "exp": 2**32})

    def _uploaded(self, repo: Repo, digest: str) -> bytes:
        if digest in repo.uploaded:
            return self._blobs[digest]
        data = read_back(self.xet, digest) if self.xet else None
        if data is None:
            raise Refusal(400, f"A large file was not uploaded: {digest}")
        return data

    @route("hub POST /api/{repo}/commit/{rev}")
    def _post_commit(self, asked: Asked, repo: str, rev: str) -> Answer:
        kept = self._repo(asked, repo, "to write")
        if rev not in kept.branches:
            raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        head, *changes = [json.loads(line) for line in asked.body.splitlines()]
        if head["value"].get("parentCommit", kept.branches[rev]) != kept.branches[rev]:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = self.files(repo, rev)
        for change in changes:
            path, value = change["value"]["path"], change["value"]
            if change["key"] == "file":
                files[path] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                files[path] = self._uploaded(kept, value["oid"])
            else:
                gone = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
                if not gone:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                for name in gone:
                    del files[name]
        sha = self._commit(kept, rev, files, head["value"]["summary"])
        return Answer.of({"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{repo}/commit/{sha}"})


def environment(hub: HubServer, cache: Path, token: str | None = None) -> dict[str, str]:
    """The variables that point a process's client at `hub` alone, with an own cache and this token or none."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(cache / "hub"),
        "HF_ASSETS_CACHE": str(cache / "assets"),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "HF_MODULES_CACHE": str(cache / "modules"),
        "HF_XET_CACHE": str(cache / "xet"),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_TOKEN": token or "",
        "HUGGING_FACE_HUB_TOKEN": "",
        "HF_OIDC_RESOURCE": "",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "" if token else "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_XET": "" if hub.xet else "1",
        "HF_HUB_OFFLINE": "",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "TRANSFORMERS_OFFLINE": "",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def use(monkeypatch: pytest.MonkeyPatch, hub: HubServer, cache: Path, token: str | None = None) -> None:
    """Point this process's client, and those of the processes it starts, at `hub` alone.

    The client reads its environment once, into constants: they are read again, and put wherever the old ones were. So
    does `datasets`, where it is imported.
    """
    from huggingface_hub import HfFileSystem, constants, hf_api
    from huggingface_hub.utils import _cache_assets, _cache_manager, _detect_agent, _git_credential, _http

    for name, value in environment(hub, cache, token).items():
        monkeypatch.setenv(name, value)
    _read_again(monkeypatch, constants, _cache_assets, _cache_manager, _git_credential)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(_http, "_HUB_ORIGINS", _http._HUB_ORIGINS | {_http._url_origin(hub.url)})
    monkeypatch.setattr(_detect_agent, "_registry", _detect_agent._EMPTY_REGISTRY)
    if "datasets" in sys.modules:
        from datasets import config

        _read_again(monkeypatch, config)
        monkeypatch.setattr(config, "USE_PARQUET_EXPORT", False)  # asks another host, and goes on without its answer
        HfFileSystem.clear_instance_cache()  # they keep what they saw, for as long as the process lives


def _read_again(monkeypatch: pytest.MonkeyPatch, constants: ModuleType, *copies: ModuleType) -> None:
    """Read a module of constants again, into itself and where they were imported to."""
    spec = importlib.util.spec_from_file_location("constants_read_again", constants.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    for name, old in list(vars(constants).items()):
        new = getattr(again, name, old)
        if name.isupper() and old != new:
            for module in (constants, *copies):
                if vars(module).get(name) is old:
                    monkeypatch.setattr(module, name, new)
