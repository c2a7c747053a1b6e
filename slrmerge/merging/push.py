"""A finished merge → one commit on the Hub: verified first, and exactly the manifest's files.

Killed at any moment before the commit, the branch has not moved: large files are uploaded first, outside any branch.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from slrmerge.checkpoint.files import LocalFile, OpenFile, unreadable
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
from slrmerge.errors import HubError, OptionError, Problem, VerificationError, collect, raise_all, require_type
from slrmerge.io.files import as_path
from slrmerge.io.options import checks_types
from slrmerge.io.pieces import git_digest, translate_os_errors
from slrmerge.io.progress import Progress
from slrmerge.merging.finding import TRADEOFF_NAME
from slrmerge.merging.manifest import Manifest, SourceEntry, read_manifest
from slrmerge.merging.verify import verify

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationCopy

    from slrmerge.checkpoint.hub.repository import Snapshot

_REMEDY = "push again: uploaded files are kept, and files that are there already are not uploaded again"

_SMALL_BYTES = 1 << 24

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


@checks_types
def push(
    folder: str | os.PathLike[str],
    repository: str | Repository,
    *,
    private: bool = False,
    revision: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PushResult:
    """Verify the merge in `folder` and push it to `repository`, as one commit on the branch `revision`.

    Creates a missing repository, `private` or not, and a missing branch. Shards that the post-trained repository has
    are copied on the Hub where it permits that, and otherwise uploaded. The commit removes other shards of a model and
    tokenizer files of an older merge; everything else in the repository stays. Raises VerificationError, also where a
    link leads out of `folder`; SourceChangedError where a file changes after it was verified; HubError where the
    repository is not writable or was changed meanwhile.
    """
    folder, progress = as_path("folder", folder), progress or Progress()
    target = parse_target(repository, revision)
    manifest = read_manifest(folder)
    files = _own_files(folder, (*manifest.files, MANIFEST_NAME))
    require_access(target)
    verify(folder, threads=threads, progress=progress)

    from slrmerge.checkpoint.hub.errors import with_retries
    from slrmerge.checkpoint.hub.file import client
    from slrmerge.checkpoint.hub.session import RESPONSE_TIMEOUT_S

    _require_valid_card(folder)
    where = str(target)
    with_retries(lambda: client().create_repo(target.name, private=private or None, exist_ok=True), where=where)
    if private:
        info = with_retries(lambda: client().model_info(target.name, timeout=RESPONSE_TIMEOUT_S), where=where)
        if not info.private:
            what, remedy = "exists and is public", "make it private on the Hub, or push without the option private"
            raise HubError(Problem("repository-public", where, what, remedy))
    if branch := target.revision:
        with_retries(lambda: client().create_branch(target.name, branch=branch, exist_ok=True), where=where)
    progress.message(f"pushing {len(files)} files to {target}")
    with _uploads(folder, files) as (uploads, opened):
        return _commit(uploads, opened, target, manifest)


def _commit(
    uploads: Mapping[str, Path | bytes], opened: Iterable[OpenFile], target: Repository, manifest: Manifest
) -> PushResult:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import FileDuplicationError

    from slrmerge.checkpoint.hub.errors import is_refused, with_retries
    from slrmerge.checkpoint.hub.file import client
    from slrmerge.checkpoint.hub.repository import pin

    pre, post = manifest.sources["pretrained"], manifest.sources["posttrained"]
    before = pin(target)
    removed = tuple(sorted(_stale_files(before, uploads) - {*uploads}))
    additions = {name: CommitOperationAdd(name, upload) for name, upload in uploads.items()}
    skipped = {name for name, file in additions.items() if _is_there(file, before)}
    copies = _copies({name: file for name, file in additions.items() if name not in skipped}, post)
    deletions = [CommitOperationDelete(path_in_repo=name) for name in removed]

    def commit(copies: "Mapping[str, CommitOperationCopy]") -> "CommitInfo":
        client().preupload_lfs_files(
            target.name,
            [addition for name, addition in additions.items() if name not in copies],
            revision=target.revision,
            free_memory=False,
            gitignore_content=_NOTHING_IGNORED,
        )
        for file in opened:
            file.check_unchanged()
        return client().create_commit(
            target.name,
            [*(copies.get(name, addition) for name, addition in additions.items()), *deletions],
            commit_message=f"Merge of {pre.model} and {post.model}",
            revision=target.revision,
            parent_commit=before.commit,
        )

    # Only retried where the Hub surely made no commit: the answer to one that it made may have been lost.
    push_with = partial(with_retries, where=str(target), remedy=_REMEDY, statuses=(429, 503))
    try:
        made = push_with(lambda: commit(copies))
    except (FileDuplicationError, HubError) as error:
        if not copies or (isinstance(error, HubError) and not is_refused(error.__cause__)):
            raise
        copies = {}
        made = push_with(lambda: commit(copies))
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


def parse_target(repository: str | Repository, revision: str | None = None) -> Repository:
    """The repository and branch to push to. Raises OptionError where `repository` is not organisation/name."""
    require_type("repository", repository, (str, Repository), "write organisation/name")
    found = repository if isinstance(repository, Repository) else Repository.parse(repository)
    if found is None or (found.revision and revision):
        what = f"{repository} is not a repository" if found is None else "a revision is given twice"
        raise OptionError(Problem("invalid-repository", "repository", what, "write organisation/name"))
    return Repository(found.name, revision or found.revision)


def require_access(repository: Repository) -> None:
    """Raise HubError where `repository` is known not to be writable."""
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    from slrmerge.checkpoint.hub.errors import translate_hub_errors, with_retries
    from slrmerge.checkpoint.hub.file import client

    where = str(repository)
    with translate_hub_errors(where):
        validate_repo_id(repository.name)
    with_retries(client().whoami, where=where)
    try:
        with_retries(lambda: client().auth_check(repository.name, write=True), where=where)
    except HubError as error:
        if not isinstance(error.__cause__, RepositoryNotFoundError):
            raise


def _own_files(folder: Path, names: Iterable[str]) -> dict[str, LocalFile]:
    """The files as they are now. Raises VerificationError for links that lead out of the folder, and for no file."""
    problems: list[Problem] = []
    files = {name: collect(problems, partial(_own_file, folder, name), None) for name in names}
    raise_all(problems, VerificationError)
    return {name: file for name, file in files.items() if file}


def _own_file(folder: Path, name: str) -> LocalFile:
    try:
        return LocalFile.within(folder, name)
    except OSError as error:
        raise unreadable(folder / name, error) from error


@contextmanager
def _uploads(folder: Path, files: Mapping[str, LocalFile]) -> Iterator[tuple[dict[str, Path | bytes], list[OpenFile]]]:
    """What to upload: the bytes of small files, the paths of others, and those open. Raises SourceChangedError.

    The client opens a path again: where the system can, it is a link to what is open here, with the file's own name for
    progress bars. So nothing can take the place of a file.
    """
    with translate_os_errors(folder):
        links = TemporaryDirectory(prefix="slrmerge-")
    uploads: dict[str, Path | bytes] = {}
    large: list[OpenFile] = []
    with links, ExitStack() as kept:
        for name, file in files.items():
            opened = kept.enter_context(closing(file.open()))
            if file.file_bytes <= _SMALL_BYTES:
                content = bytearray(file.file_bytes)
                opened.stream(0, len(content)).readinto(memoryview(content))
                opened.close()
                uploads[name] = bytes(content)
                continue
            large.append(opened)
            path, descriptor = folder / name, Path(f"/proc/self/fd/{opened.fd}")
            if descriptor.exists():
                path = Path(links.name, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(descriptor)
            uploads[name] = path
        yield uploads, large


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


def _require_valid_card(folder: Path) -> None:
    """Raise HubError where the Hub would refuse the model card, before anything is uploaded."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    from slrmerge.checkpoint.hub.errors import with_retries

    path = folder / CARD_NAME

    def validate() -> str:
        try:
            card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
            card.validate(repo_type="model")
        except (FileNotFoundError, ValueError, TypeError, YAMLError, RecursionError) as error:  # a forged one too
            return " ".join(str(error).split())
        return ""

    if refusal := with_retries(validate, where=str(path)):
        what = f"is refused by the Hub ({refusal})"
        remedy = f"correct the front matter of the post-trained model's {CARD_NAME}, and merge again"
        raise HubError(Problem("card-refused", str(path), what, remedy))


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
