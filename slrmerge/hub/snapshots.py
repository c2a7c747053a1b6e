"""A repository as a checkpoint: pinned to a commit, its small files fetched into the Hub's cache, its weights not."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event

from huggingface_hub import RepoFile, RepoFolder, constants, try_to_load_from_cache

from slrmerge.checkpoint import (
    CHAT_TEMPLATE_FOLDERS,
    CONFIG_NAME,
    INDEX_NAME,
    Checkpoint,
    RemoteFile,
    Shard,
    Snapshot,
    open_folder,
    read_shard,
    waiting_threads,
)
from slrmerge.errors import CheckpointError, HubError, NoSpaceError, Problem
from slrmerge.files import free_bytes
from slrmerge.hub.failures import in_words, patiently
from slrmerge.hub.file import HubFile, cache_of, client
from slrmerge.progress import Progress, one_at_a_time
from slrmerge.repository import Repository

_FILES_AT_A_TIME = 4

_READ_TO_OPEN = frozenset({CONFIG_NAME, INDEX_NAME, "README.md", "adapter_config.json"})


def open_repository(repository: Repository) -> Checkpoint:
    """See `open_checkpoint`. Fetches what is small and read in any case; everything else stays on the Hub."""
    if constants.is_offline_mode():
        return open_cached(repository)
    snapshot = pin(repository)
    folder = cache_of(repository) / "snapshots" / snapshot.commit
    with in_words(str(repository)):
        folder.mkdir(parents=True, exist_ok=True)
        _name_commit(snapshot)
    with waiting_threads(_FILES_AT_A_TIME) as (pool, given_up):
        fetch = partial(_fetch_one, given_up=given_up)
        list(pool.map(fetch, (snapshot.files[name] for name in sorted(snapshot.files.keys() & _READ_TO_OPEN))))
    return open_folder(folder, snapshot=snapshot)


def _fetch_one(file: RemoteFile, *, given_up: Event) -> Path:
    return file.fetch(given_up=given_up)


def open_cached(repository: Repository) -> Checkpoint:
    """What the Hub's cache holds of a repository. Raises HubError unless that is all that is needed."""
    found = try_to_load_from_cache(repository.name, CONFIG_NAME, revision=repository.revision)
    if not isinstance(found, str):
        raise HubError(_not_whole(repository))
    folder = Path(found).parent
    try:
        return open_folder(folder, snapshot=Snapshot(repository, folder.name, {}))
    except CheckpointError as error:
        raise HubError(_not_whole(repository), *error.problems) from error


def pin(repository: Repository) -> Snapshot:
    """The newest commit at the repository's revision, and what it holds at the top and in folders of chat templates."""
    where = str(repository)
    timeout_s = constants.HF_HUB_ETAG_TIMEOUT
    info = patiently(
        lambda: client().model_info(repository.name, revision=repository.revision, timeout=timeout_s), where=where
    )
    pinned = Repository(repository.name, info.sha)
    if not re.fullmatch("[0-9a-f]{40}", info.sha or ""):
        raise HubError(Problem(where, "has no commit yet", "push something to it, or name another"))
    entries = _listed(pinned, None)
    for entry in list(entries):
        if isinstance(entry, RepoFolder) and entry.path in CHAT_TEMPLATE_FOLDERS:
            entries += _listed(pinned, entry.path)
    files = {entry.path: _hub_file(pinned, entry) for entry in entries if isinstance(entry, RepoFile)}
    return Snapshot(repository, pinned.revision or "", files)


def _listed(repository: Repository, folder: str | None) -> list[RepoFile | RepoFolder]:
    def ask() -> list[RepoFile | RepoFolder]:
        return list(client().list_repo_tree(repository.name, folder, revision=repository.revision))

    return patiently(ask, where=str(repository))


def _hub_file(repository: Repository, entry: RepoFile) -> HubFile:
    digest = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git-sha1:{entry.blob_id}"
    return HubFile(repository, entry.path, file_bytes=int(entry.size), digest=digest)


def _name_commit(snapshot: Snapshot) -> None:
    """Note in the Hub's cache which commit a branch is at, as its client does, so that it is known offline too."""
    revision = snapshot.repository.revision or constants.DEFAULT_REVISION
    if revision != snapshot.commit:
        ref = cache_of(snapshot.repository) / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(snapshot.commit)


def _not_whole(repository: Repository) -> Problem:
    revision = f" --revision {repository.revision}" if repository.revision else ""
    remedy = f"fetch it where there is a network: hf download {repository.name}{revision}"
    offline = ", and HF_HUB_OFFLINE is set" if constants.is_offline_mode() else ""
    return Problem(str(repository), f"is not whole in the Hub's cache{offline}", remedy)


def fetch_shards(
    sides: Sequence[tuple[Checkpoint, Iterable[str]]], progress: Progress, *, recheck: bool = False
) -> list[Checkpoint]:
    """The checkpoints with the given ones of their shards on this disk, those that were fetched found to be what the
    Hub says of them; with `recheck` those that were in its cache too.

    Raises HubError, and NoSpaceError before anything is fetched that would not fit.
    """
    wanted = {
        (number, file): side.snapshot.files[file]
        for number, (side, files) in enumerate(sides)
        for file in files
        if side.snapshot and file in side.snapshot.files and (recheck or side.shards[file].remote)
    }
    _require_space(sum(file.file_bytes for file in wanted.values() if file.here() is None))
    if wanted:
        progress.start("downloading", sum(file.file_bytes for file in wanted.values()))
    advance = one_at_a_time(progress.advance)

    def fetch(number: int, name: str) -> Shard:
        fetched = read_shard(wanted[number, name].fetch(advance, given_up=given_up))
        if fetched.header_digest != sides[number][0].shards[name].header_digest:
            where = str(wanted[number, name])
            raise HubError(Problem(where, "has another header than the Hub gave of it before", "run again"))
        return fetched

    with waiting_threads(_FILES_AT_A_TIME) as (pool, given_up):
        fetched = dict(zip(wanted, pool.map(lambda job: fetch(*job), wanted), strict=True))
    return [
        replace(
            side,
            shards={file: fetched.get((number, file), shard) for file, shard in side.shards.items()},
            checked=side.checked | {file for of, file in wanted if of == number},
        )
        for number, (side, _) in enumerate(sides)
    ]


def _require_space(needed: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    free = free_bytes(cache)
    if needed > free:
        what = f"the download needs {needed / 1e9:,.2f} GB there, the disk has {free / 1e9:,.2f} GB free"
        raise NoSpaceError(Problem(str(cache), what, "set HF_HUB_CACHE to a folder on another disk"))
