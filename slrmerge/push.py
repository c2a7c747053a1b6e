"""A finished merge → one commit on the Hub: verified first, and exactly the manifest's files.

Killed at any moment before the commit, the branch has not moved: large files wait beside it until a commit names them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slrmerge.checkpoint import INDEX_NAME
from slrmerge.errors import HubError
from slrmerge.manifest import read_manifest
from slrmerge.plan import MANIFEST_NAME
from slrmerge.progress import Progress, Silent
from slrmerge.repository import Repository
from slrmerge.verify import verify_checkpoint

_REMEDY = "push again: what was uploaded is kept, and what is there already is not sent twice"


@dataclass(frozen=True, slots=True)
class PushResult:
    """A commit on the Hub: the `files` it has of the merge, and the `removed` ones, shards of an older one.

    `was_there` says that the branch was the same already, so that no commit was made.
    """

    url: str
    commit: str
    files: tuple[str, ...]
    removed: tuple[str, ...]
    was_there: bool


def push_to_hub(
    folder: Path,
    repository: Repository,
    *,
    private: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> PushResult:
    """Verify the merge in `folder` and put it into `repository`, as one commit on the branch that its revision names.

    A repository that is not there is made, `private` or not; so is a branch. Files of the repository that are no part
    of a merge stay; shards that are none of this one go. Raises VerificationError, and HubError where the repository
    may not be written, or was changed by somebody else meanwhile.
    """
    progress = progress or Silent()
    require_access(repository)
    verify_checkpoint(folder, threads=threads, progress=progress)
    manifest = read_manifest(folder)
    files = (*manifest["files"], MANIFEST_NAME)
    parents = [manifest["sources"][side]["model"] for side in ("pretrained", "posttrained")]

    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    from slrmerge.hub.failures import in_words, patiently
    from slrmerge.hub.file import client

    api, where, branch = client(), str(repository), repository.revision
    patiently(lambda: api.create_repo(repository.name, private=private or None, exist_ok=True), where=where)
    if branch:
        patiently(lambda: api.create_branch(repository.name, branch=branch, exist_ok=True), where=where)
    before = patiently(lambda: api.model_info(repository.name, revision=branch), where=where)
    removed = tuple(sorted(_stale({entry.rfilename for entry in before.siblings or ()}, files)))
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files
    ]
    operations += [CommitOperationDelete(path_in_repo=name) for name in removed]
    progress.say(f"pushing {len(files)} files to {repository}")
    with in_words(where, remedy=_REMEDY):
        made = api.create_commit(
            repository.name,
            operations,
            commit_message=f"Merge of {' and '.join(parents)}",
            revision=branch,
            parent_commit=before.sha,
        )
    return PushResult(made.commit_url, made.oid, files, removed, was_there=made.oid == before.sha)


def require_access(repository: Repository) -> None:
    """Raise HubError where it can be told already that `repository` may not be written."""
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    from slrmerge.hub.failures import in_words, patiently
    from slrmerge.hub.file import client

    where = str(repository)
    with in_words(where):
        validate_repo_id(repository.name)
    patiently(client().whoami, where=where)
    try:
        patiently(lambda: client().auth_check(repository.name, write=True), where=where)
    except HubError as error:
        if not isinstance(error.__cause__, RepositoryNotFoundError):
            raise


def _stale(there: set[str], files: tuple[str, ...]) -> Iterator[str]:
    """What a loader would take for weights of this model, and is not."""
    for name in there - {*files}:
        if "/" not in name and (name.endswith(".safetensors") or name == INDEX_NAME):
            yield name
