"""The commit of a push: what is uploaded, what the Hub copies, what it has already, and what an older merge left.

Killed at any moment before the commit, the branch has not moved: large files are uploaded first, outside any branch.
"""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from slrmerge.checkpoint.files import OpenFile
from slrmerge.checkpoint.location import Repository
from slrmerge.checkpoint.side_files import (
    ADAPTER_CONFIG_NAME,
    CARD_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    RECIPE_NAME,
    is_tokenizer_file,
    select_side_files,
)
from slrmerge.errors import HubError, VerificationError
from slrmerge.io.pieces import git_digest
from slrmerge.merging.finding import TRADEOFF_NAME
from slrmerge.merging.manifest import Manifest, SourceEntry, read_manifest

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    from slrmerge.checkpoint.hub.repository import Snapshot

_REMEDY = "push again: uploaded files are kept, and files that are there already are not uploaded again"

_NOTHING_IGNORED = "# nothing"
"""In place of a repository's .gitignore, after which the client would leave out files of the merge without a word."""

_WRITTEN = (RECIPE_NAME, "mergekit_config.yml", CARD_NAME, TRADEOFF_NAME, INDEX_NAME, ADAPTER_CONFIG_NAME)
"""What merges write beside weights and tokenizer."""

_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")


@dataclass(frozen=True, slots=True)
class PushResult:
    """A commit on the Hub, its `files`, and the `removed` files of an older merge.

    With `unchanged` the branch had the same files already, and no commit was made. Of the files' bytes some were
    uploaded, some copied by the Hub from the post-trained repository, and some skipped, since they were there already.
    """

    url: str
    commit: str
    files: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: bool
    uploaded_bytes: int
    copied_bytes: int
    skipped_bytes: int

    def __repr__(self) -> str:
        return f"<PushResult {self.url}: {len(self.files)} files>"


@dataclass(frozen=True, slots=True)
class _Commit:
    """A commit on top of `parent`, after which `opened` files must be what they were."""

    target: Repository
    parent: str
    message: str
    additions: "Mapping[str, CommitOperationAdd]"
    deletions: "tuple[CommitOperationDelete, ...]"
    opened: tuple[OpenFile, ...]

    def make(self, copies: "Mapping[str, CommitOperationCopy]") -> "CommitInfo":
        """Upload what is not among `copies`, and commit everything."""
        from slrmerge.checkpoint.hub.file import client

        client().preupload_lfs_files(
            self.target.name,
            [addition for name, addition in self.additions.items() if name not in copies],
            revision=self.target.revision,
            free_memory=False,
            gitignore_content=_NOTHING_IGNORED,
        )
        for file in self.opened:
            file.check_unchanged()
        return client().create_commit(
            self.target.name,
            [*(copies.get(name, addition) for name, addition in self.additions.items()), *self.deletions],
            commit_message=self.message,
            revision=self.target.revision,
            parent_commit=self.parent,
        )


def commit_files(
    uploads: Mapping[str, Path | bytes], opened: Iterable[OpenFile], target: Repository, manifest: Manifest
) -> PushResult:
    """Commit a merge's files, given as paths or bytes, to a repository that exists; `opened` are those with paths.

    Raises HubError, and SourceChangedError where one of `opened` changed.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import FileDuplicationError

    from slrmerge.checkpoint.hub.errors import is_refused, with_retries
    from slrmerge.checkpoint.hub.repository import pin

    pre, post = manifest.sources["pretrained"], manifest.sources["posttrained"]
    before = pin(target)
    removed = tuple(sorted(_stale_files(before, uploads) - {*uploads}))
    additions = {name: CommitOperationAdd(name, upload) for name, upload in uploads.items()}
    skipped = {name for name, file in additions.items() if _is_there(file, before)}
    copies = _copies({name: file for name, file in additions.items() if name not in skipped}, post)
    deletions = tuple(CommitOperationDelete(path_in_repo=name) for name in removed)
    message = f"Merge of {pre.model} and {post.model}"
    commit = _Commit(target, before.commit, message, additions, deletions, tuple(opened))
    # Only retried where the Hub surely made no commit: the answer to one that it made may have been lost.
    push_with = partial(with_retries, where=str(target), remedy=_REMEDY, statuses=(429, 503))
    try:
        made = push_with(lambda: commit.make(copies))
    except (FileDuplicationError, HubError) as error:
        if not copies or (isinstance(error, HubError) and not is_refused(error.__cause__)):
            raise
        copies = {}
        made = push_with(lambda: commit.make(copies))
    sizes = {name: file.upload_info.size for name, file in additions.items()}
    copied_bytes, skipped_bytes = (sum(sizes[name] for name in names) for names in (copies, skipped))
    return PushResult(
        made.commit_url,
        made.oid,
        tuple(uploads),
        removed,
        unchanged=made.oid == before.commit,
        uploaded_bytes=sum(sizes.values()) - copied_bytes - skipped_bytes,
        copied_bytes=copied_bytes,
        skipped_bytes=skipped_bytes,
    )


def _stale_files(snapshot: "Snapshot", files: Iterable[str]) -> set[str]:
    """What an older merge left in a repository, and what a loader would read as weights of this one, of `files`.

    Its manifest is the repository's: it is believed about files that a merge can have, of the size that it gives.
    """
    is_sharded = any(map(_SHARD.fullmatch, files))  # GGUF files stand beside other formats
    names = {name for name in snapshot.files if is_sharded and _SHARD.fullmatch(name)}
    if MANIFEST_NAME in snapshot.files:
        with suppress(VerificationError):
            older = read_manifest(snapshot.files[MANIFEST_NAME].fetch().parent).files
            shards = (name for name in older if name.endswith((".safetensors", ".gguf")))
            possible = {*_WRITTEN, *shards, *filter(is_tokenizer_file, select_side_files(older))}
            names |= {
                name
                for name, entry in older.items()
                if name in possible and name in snapshot.files and snapshot.files[name].file_bytes == entry.bytes
            }
    return names


def _is_there(file: "CommitOperationAdd", snapshot: "Snapshot") -> bool:
    """Whether a repository has a file already."""
    there = snapshot.files.get(file.path_in_repo)
    if there is None or there.digest.startswith("sha256:"):
        return there is not None and there.digest == f"sha256:{file.upload_info.sha256.hex()}"
    with file.as_file() as opened:
        return there.file_bytes == file.upload_info.size and there.digest == git_digest(opened)


def _copies(additions: "Mapping[str, CommitOperationAdd]", source: SourceEntry) -> "dict[str, CommitOperationCopy]":
    """Those of the shards to push that the repository of a source has, as operations that copy them from there."""
    from huggingface_hub import CommitOperationCopy, RepoFile

    from slrmerge.checkpoint.hub.errors import with_retries
    from slrmerge.checkpoint.hub.file import client

    shards = {name: file.upload_info.sha256.hex() for name, file in additions.items() if name in source.files}
    if not (source.repository and shards):
        return {}
    try:
        listed = with_retries(
            lambda: client().get_paths_info(source.repository, [*shards], revision=source.commit),
            where=source.repository,
        )
    except HubError:  # private, or no longer there
        return {}
    # The Hub copies what is in its Xet storage.
    there = {file.path: file.lfs.sha256 for file in listed if isinstance(file, RepoFile) and file.lfs and file.xet_hash}
    return {
        name: CommitOperationCopy(name, name, source.commit, src_repo_id=source.repository, src_repo_type="model")
        for name, sha256 in shards.items()
        if there.get(name) == sha256
    }
