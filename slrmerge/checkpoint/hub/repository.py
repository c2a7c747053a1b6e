"""A repository as a checkpoint: pinned to a commit, its small files in the Hub's cache, its weights read by ranges."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, Self

from huggingface_hub import RepoFile, RepoFolder, constants, try_to_load_from_cache

from slrmerge.checkpoint.adapter_config import AdapterFolder, is_adapter, read_adapter_folder
from slrmerge.checkpoint.files import LocalFile
from slrmerge.checkpoint.header import Shard, read_shard
from slrmerge.checkpoint.hub.errors import translate_hub_errors, translate_parse_errors, with_retries
from slrmerge.checkpoint.hub.file import HubFile, cache_folder, client, commit_of
from slrmerge.checkpoint.hub.session import limited_pages
from slrmerge.checkpoint.location import Repository
from slrmerge.checkpoint.quantized import QUANTIZATION_FILES
from slrmerge.checkpoint.safetensors import (
    SafetensorsCheckpoint,
    check_shards,
    open_folder,
    read_layout,
    read_local_shard,
    require_layers,
)
from slrmerge.checkpoint.side_files import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    CARD_NAME,
    CHAT_TEMPLATE_FOLDERS,
    CONFIG_NAME,
    INDEX_NAME,
    MODULES_NAME,
    is_tokenizer_file,
    list_left_out,
    module_folders,
    select_side_files,
)
from slrmerge.errors import CheckpointError, HubError, Problem, collect
from slrmerge.io.names import is_inside
from slrmerge.io.pieces import require_free_bytes
from slrmerge.io.progress import Progress
from slrmerge.io.threads import cancellable_pool

_HEADERS_AT_A_TIME = 8
_FILES_AT_A_TIME = 4

_MAX_ENTRIES = 100_000
_MAX_FOLDERS = 1_000
_MAX_NAME_BYTES = 255  # more than file systems take in a name
_DIGEST = re.compile("sha256:[0-9a-f]{64}|git-sha1:[0-9a-f]{40}")

_READ_TO_OPEN = frozenset({
    CONFIG_NAME, INDEX_NAME, CARD_NAME, MODULES_NAME, ADAPTER_CONFIG_NAME, *QUANTIZATION_FILES,
})  # fmt: skip


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit: `files` of the top level and of folders that belong to the model, by name.

    `folders` are all folders of the top level; their names end in `/`.
    """

    repository: Repository
    commit: str
    files: Mapping[str, HubFile]
    folders: tuple[str, ...] = ()

    @property
    def pinned(self) -> Repository:
        """The repository at exactly this commit."""
        return Repository(self.repository.name, self.commit)

    def __str__(self) -> str:
        return f"{self.repository.name}@{self.commit[:7]}"


@dataclass(frozen=True, repr=False)
class HubRepository(SafetensorsCheckpoint):
    """A checkpoint on the Hub. `folder` is the snapshot's folder in the Hub's cache.

    `verified` names the weight files that were downloaded and match the Hub's digests. Offline the snapshot is empty.
    """

    snapshot: Snapshot = field(kw_only=True)
    verified: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return str(self.snapshot)

    @property
    def reference(self) -> str:
        return str(self.snapshot.pinned)

    @property
    def model_name(self) -> str:
        return self.snapshot.repository.name

    def provenance(self, files: Collection[str]) -> dict[str, Any]:
        """The commit, and the `files` that were not compared with the Hub's digests, with those digests."""
        known = self.snapshot.files
        return {
            "repository": self.snapshot.repository.name,
            "revision": self.snapshot.repository.revision,
            "commit": self.snapshot.commit,
            "unchecked": {
                file: known[file].digest if file in known else None for file in sorted({*files} - self.verified)
            },
        }

    def sha256(self, file: str) -> str | None:
        known = self.snapshot.files.get(file)
        return known.digest.removeprefix("sha256:") if known and known.digest.startswith("sha256:") else None

    def require_digests(self) -> None:
        if not self.snapshot.files:
            what = "is in the Hub's cache, but its digests are not, and HF_HUB_OFFLINE is set"
            raise HubError(Problem("offline", str(self), what, "unset it"))

    def download(self, progress: Progress, files: Collection[str] | None = None, *, recheck: bool = False) -> Self:
        wanted = {
            name: self.snapshot.files[name]
            for name, shard in self.shards.items()
            if (files is None or name in files)
            and name in self.snapshot.files
            and (recheck or isinstance(shard.file, HubFile))
        }
        require_space(sum(file.file_bytes for file in wanted.values() if file.cached_path() is None))
        if wanted:
            progress.start(f"downloading {self}", sum(file.file_bytes for file in wanted.values()))

        def fetch(name: str) -> Shard:
            shard = read_shard(LocalFile.at(wanted[name].fetch(progress.advance, cancelled)))
            if shard.header_digest != self.shards[name].header_digest:
                what = "has another header than the Hub sent before"
                raise HubError(Problem("header-changed", str(wanted[name]), what, "run again"))
            return shard

        with cancellable_pool(_FILES_AT_A_TIME) as (pool, cancelled):
            fetched = dict(zip(wanted, pool.map(fetch, wanted), strict=True))
        return replace(self, shards={**self.shards, **fetched}, verified=self.verified | frozenset(fetched))


def open_repository(repository: Repository) -> HubRepository | AdapterFolder:
    """Pin a repository to a commit; download config and index, and read the headers of its weights by range.

    An adapter is downloaded whole. With HF_HUB_OFFLINE set, open what the Hub's cache has. Raises HubError, and
    CheckpointError as `open_folder` does.
    """
    if constants.is_offline_mode():
        return open_cached(repository)
    snapshot = pin(repository)
    folder = cache_folder(repository) / "snapshots" / snapshot.commit
    with translate_hub_errors(str(repository)):
        folder.mkdir(parents=True, exist_ok=True)
        _write_ref(snapshot)
    with cancellable_pool(_FILES_AT_A_TIME) as (pool, cancelled):
        small = [snapshot.files[name] for name in sorted(snapshot.files.keys() & _READ_TO_OPEN)]
        list(pool.map(partial(HubFile.fetch, cancelled=cancelled), small))
    where = str(snapshot)
    if is_adapter(snapshot.files.keys()):
        return _download_adapter(snapshot, folder)
    layout = read_layout(folder, {name for name in snapshot.files if "/" not in name}, where=where)
    problems = list(layout.problems)
    with cancellable_pool(_HEADERS_AT_A_TIME) as (pool, cancelled):
        reads = [pool.submit(_read_shard, snapshot, file, cancelled) for file in layout.files]
        results = [collect(problems, read.result, None) for read in reads]
    shards = {file: shard for file, shard in zip(layout.files, results, strict=True) if shard}
    check_shards(layout, shards, problems, where=where)
    modules = module_folders(folder) if MODULES_NAME in snapshot.files else ()
    snapshot = _with_folders(snapshot, modules)
    side_files = {name: _with_cache_state(snapshot.files[name]) for name in select_side_files(snapshot.files, modules)}
    left_out = list_left_out([*snapshot.files, *snapshot.folders], {*shards, *side_files})
    checkpoint = HubRepository(folder, layout.config, shards, side_files, left_out, snapshot=snapshot)
    require_layers(checkpoint)
    return checkpoint


def open_cached(repository: Repository) -> HubRepository | AdapterFolder:
    """Open what the Hub's cache has of a repository. Raises HubError where that is not the whole checkpoint."""
    try:
        with translate_hub_errors(str(repository)):
            found, adapter = (
                try_to_load_from_cache(repository.name, name, revision=repository.revision)
                for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME)
            )
    except UnicodeDecodeError as error:  # a file in `refs` that is not a commit
        raise HubError(_incomplete(repository)) from error
    if isinstance(adapter, str) and is_adapter({path.name for path in Path(adapter).parent.iterdir()}):
        return _read_adapter(Path(adapter).parent, repository)
    if not isinstance(found, str):
        raise HubError(_incomplete(repository))
    folder = Path(found).parent
    try:
        local = open_folder(folder)
    except CheckpointError as error:
        raise HubError(_incomplete(repository), *error.problems) from error
    snapshot = Snapshot(repository, folder.name, {})
    return HubRepository(local.folder, local.config, local.shards, local.side_files, local.left_out, snapshot=snapshot)


def _download_adapter(snapshot: Snapshot, folder: Path) -> AdapterFolder:
    """An adapter in the Hub's cache, with its tokenizer."""
    wanted = {
        ADAPTER_WEIGHTS_NAME,
        *filter(is_tokenizer_file, select_side_files(snapshot.files)),
    } & snapshot.files.keys()
    require_space(sum(snapshot.files[name].file_bytes for name in wanted if not snapshot.files[name].cached_path()))
    with cancellable_pool(_FILES_AT_A_TIME) as (pool, cancelled):
        list(pool.map(partial(HubFile.fetch, cancelled=cancelled), (snapshot.files[name] for name in sorted(wanted))))
    return _read_adapter(folder, snapshot.repository)


def _read_adapter(folder: Path, repository: Repository) -> AdapterFolder:
    pinned = Repository(repository.name, folder.name)
    provenance = {"repository": repository.name, "revision": repository.revision, "commit": folder.name}
    return read_adapter_folder(folder, reference=str(pinned), name=str(repository), provenance=provenance)


def pin(repository: Repository) -> Snapshot:
    """The newest commit of the repository's revision, and the files in it. Raises HubError."""
    where = str(repository)
    timeout_s = constants.HF_HUB_ETAG_TIMEOUT
    info = with_retries(
        lambda: client().model_info(repository.name, revision=repository.revision, timeout=timeout_s), where=where
    )
    pinned = Repository(repository.name, commit_of(info.sha, where=where))
    entries = _list_files(pinned, None)
    folders = tuple(f"{entry.path}/" for entry in entries if isinstance(entry, RepoFolder) and _is_usable(entry.path))
    snapshot = Snapshot(repository, pinned.revision or "", _usable_files(pinned, entries), folders)
    return _with_folders(snapshot, CHAT_TEMPLATE_FOLDERS)


def _with_folders(snapshot: Snapshot, folders: Iterable[str]) -> Snapshot:
    """The snapshot with the files in those of `folders` that it has, and in the folders in them."""
    files = dict(snapshot.files)
    left = [folder for folder in folders if f"{folder.partition('/')[0]}/" in snapshot.folders]
    listed = 0
    while left:
        folder = left.pop()
        entries = _list_files(snapshot.pinned, folder)
        files |= _usable_files(snapshot.pinned, entries)
        inner = (entry.path for entry in entries if isinstance(entry, RepoFolder) and _is_usable(entry.path))
        left += [path for path in inner if path.startswith(f"{folder}/")]  # a list that names itself would not end
        listed += 1
        if len(files) > _MAX_ENTRIES or listed > _MAX_FOLDERS:
            raise HubError(Problem("too-many-files", str(snapshot), f"lists more than {_MAX_ENTRIES:,} files"))
    return replace(snapshot, files=files)


def _usable_files(pinned: Repository, entries: Iterable[RepoFile | RepoFolder]) -> dict[str, HubFile]:
    return {
        entry.path: _hub_file(pinned, entry)
        for entry in entries
        if isinstance(entry, RepoFile) and _is_usable(entry.path)
    }


def current_commit(repository: Repository) -> str:
    """The newest commit of the revision, noted in the Hub's cache; offline the one noted there. Raises HubError."""
    if not constants.is_offline_mode():
        snapshot = pin(repository)
        with translate_hub_errors(str(repository)):
            _write_ref(snapshot)
        return snapshot.commit
    commit = cached_commit(repository)
    if commit is None:
        raise HubError(_incomplete(repository))
    return commit


def cached_commit(repository: Repository, *, repo_type: str = "model") -> str | None:
    """The commit of the revision in the Hub's cache, for use offline; an unknown revision may be a commit itself."""
    ref = _ref_of(repository, repo_type=repo_type)
    return ref.read_text(errors="replace").strip() if ref.is_file() else repository.revision


def _ref_of(repository: Repository, *, repo_type: str = "model") -> Path:
    """The file in the Hub's cache that notes the commit of a revision. Raises HubError where that is elsewhere."""
    revision = repository.revision or constants.DEFAULT_REVISION
    if not is_inside(revision):
        raise HubError(Problem("revision-not-found", str(repository), "has no such revision"))
    return cache_folder(repository, repo_type=repo_type) / "refs" / revision


def _read_shard(snapshot: Snapshot, name: str, cancelled: Event) -> Shard:
    """The header of a shard: of a local copy where there is one, else by range."""
    if name not in snapshot.files:
        what, remedy = "is in the index but not in the repository", "name another revision, or tell its owner"
        raise CheckpointError(Problem("shard-missing", f"{snapshot}/{name}", what, remedy))
    file = snapshot.files[name]
    cached = file.cached_path()
    return read_local_shard(cached) if cached else read_shard(file, cancelled)


def _with_cache_state(file: HubFile) -> HubFile:
    return replace(file, is_cached=file.cached_path() is not None)


def _list_files(repository: Repository, folder: str | None) -> list[RepoFile | RepoFolder]:
    where = str(repository)
    with translate_hub_errors(where), translate_parse_errors(where), limited_pages():  # the client retries
        tree = client().list_repo_tree(repository.name, folder, revision=repository.revision)
        entries = list(islice(tree, _MAX_ENTRIES + 1))
    if len(entries) > _MAX_ENTRIES:
        raise HubError(Problem("too-many-files", where, f"lists more than {_MAX_ENTRIES:,} files"))
    return entries


def _is_usable(path: object) -> bool:
    """Whether a file can be one of a model's; files with other names are ignored."""
    return isinstance(path, str) and path.isprintable() and len(path.encode()) <= _MAX_NAME_BYTES and is_inside(path)


def _hub_file(repository: Repository, entry: RepoFile) -> HubFile:
    digest = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git-sha1:{entry.blob_id}"
    if not (type(entry.size) is int and 0 <= entry.size < 2**63 and _DIGEST.fullmatch(digest)):
        what, remedy = f"the Hub lists {entry.path} without a valid size and digest", "try again later"
        raise HubError(Problem("unexpected-response", str(repository), what, remedy))
    return HubFile(repository, entry.path, entry.size, digest)


def _write_ref(snapshot: Snapshot) -> None:
    """Note in the Hub's cache which commit a branch is at, as its client does, so that it is known offline too."""
    ref = _ref_of(snapshot.repository)
    if snapshot.repository.revision != snapshot.commit:
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(snapshot.commit)


def _incomplete(repository: Repository) -> Problem:
    revision = f" --revision {repository.revision}" if repository.revision else ""
    remedy = f"download it while online: hf download {repository.name}{revision}"
    offline = ", and HF_HUB_OFFLINE is set" if constants.is_offline_mode() else ""
    return Problem("not-cached", str(repository), f"is not completely in the Hub's cache{offline}", remedy)


def require_space(needed: int) -> None:
    """Raise NoSpaceError unless the disk of the Hub's cache has `needed` bytes free."""
    cache = Path(constants.HF_HUB_CACHE)
    require_free_bytes(cache, needed, "the download", "set HF_HUB_CACHE to a folder on another disk")
