"""A repository as a checkpoint: pinned to a commit, its small files fetched into the Hub's cache, its weights not."""

import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from slrmerge.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint, Shard, Snapshot, open_folder, read_shard
from slrmerge.errors import CheckpointError, HubError, NoSpaceError, Problem
from slrmerge.hub.failures import patiently
from slrmerge.hub.file import HubFile, client
from slrmerge.progress import Progress, one_at_a_time
from slrmerge.repository import Repository

_FILES_AT_A_TIME = 4

_READ_TO_OPEN = frozenset({CONFIG_NAME, INDEX_NAME, "README.md", "adapter_config.json"})


def open_repository(repository: Repository) -> Checkpoint:
    """See `open_checkpoint`. Fetches what is small and read in any case; everything else stays on the Hub."""
    if constants.is_offline_mode():
        return open_cached(repository)
    snapshot = _pin(repository)
    folder = _folder(snapshot)
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
        list(pool.map(lambda name: snapshot.files[name].fetch(), snapshot.files.keys() & _READ_TO_OPEN))
    return open_folder(folder, snapshot=snapshot)


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


def _pin(repository: Repository) -> Snapshot:
    """The repository's newest commit at its revision, and what it holds there."""
    info = patiently(
        lambda: client().model_info(
            repository.name,
            revision=repository.revision,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        ),
        where=str(repository),
    )
    commit = info.sha or ""
    pinned = Repository(repository.name, commit)
    files = {
        entry.rfilename: HubFile(
            pinned,
            entry.rfilename,
            file_bytes=entry.size or 0,
            digest=f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git-sha1:{entry.blob_id}",
        )
        for entry in info.siblings or ()
    }
    return Snapshot(repository, commit, files)


def _folder(snapshot: Snapshot) -> Path:
    """Where the Hub's cache has, or would have, the files of a snapshot."""
    storage = repo_folder_name(repo_id=snapshot.repository.name, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / storage / "snapshots" / snapshot.commit


def _not_whole(repository: Repository) -> Problem:
    revision = f" --revision {repository.revision}" if repository.revision else ""
    remedy = f"fetch it where there is a network: hf download {repository.name}{revision}"
    offline = ", and HF_HUB_OFFLINE is set" if constants.is_offline_mode() else ""
    return Problem(str(repository), f"is not whole in the Hub's cache{offline}", remedy)


def fetch_shards(sides: Sequence[tuple[Checkpoint, Iterable[str]]], progress: Progress) -> list[Checkpoint]:
    """The checkpoints with the given ones of their shards on this disk, each found to be what the Hub says of it.

    Raises HubError, and NoSpaceError before anything is fetched that would not fit.
    """
    wanted = [
        (number, file) for number, (side, files) in enumerate(sides) for file in files if side.shards[file].remote
    ]
    total = sum(sides[number][0].shards[file].identity.file_bytes for number, file in wanted)
    _require_space(total)
    if wanted:
        progress.start("downloading", total)
    advance = one_at_a_time(progress.advance)

    def fetch(job: tuple[int, str]) -> Shard:
        number, file = job
        planned = sides[number][0].shards[file]
        assert planned.remote is not None
        fetched = read_shard(planned.remote.fetch(advance))
        if fetched.header_digest != planned.header_digest:
            raise HubError(Problem(str(planned.remote), "has another header than the Hub gave of it", "run again"))
        return fetched

    with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
        fetched = dict(zip(wanted, pool.map(fetch, wanted), strict=True))
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
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if needed > free:
        what = f"the download needs {needed / 1e9:,.2f} GB there, the disk has {free / 1e9:,.2f} GB free"
        raise NoSpaceError(Problem(str(cache), what, "set HF_HUB_CACHE to a folder on another disk"))
