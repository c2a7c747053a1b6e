"""A finished merge → one commit on the Hub: verified first, and exactly the manifest's files.

Killed at any moment before the commit, the branch has not moved: large files wait beside it until a commit names them.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slrmerge.checkpoint import Snapshot
from slrmerge.errors import HubError, Problem, VerificationError
from slrmerge.manifest import read_manifest
from slrmerge.plan import CARD_NAME, MANIFEST_NAME
from slrmerge.progress import Progress, Silent
from slrmerge.repository import Repository
from slrmerge.verify import verify_checkpoint

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

_REMEDY = "push again: what was uploaded is kept, and what is there already is not sent twice"


@dataclass(frozen=True, slots=True)
class PushResult:
    """A commit on the Hub: the `files` it has of the merge, and the `removed` ones, of an older one.

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

    A repository that is not there is made, `private` or not; so is a branch. What an older merge left there goes, and
    so do other shards of a model; everything else stays. Raises VerificationError, and HubError where the repository
    may not be written, or was changed by somebody else meanwhile.
    """
    progress = progress or Silent()
    require_access(repository)
    verify_checkpoint(folder, threads=threads, progress=progress)
    manifest = read_manifest(folder)
    files = (*manifest["files"], MANIFEST_NAME)
    parents = [manifest["sources"][side]["model"] for side in ("pretrained", "posttrained")]

    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    from slrmerge.hub.failures import patiently
    from slrmerge.hub.file import ANSWER_S, client
    from slrmerge.hub.snapshots import pin

    _require_sound_card(folder)
    where, branch = str(repository), repository.revision
    patiently(lambda: client().create_repo(repository.name, private=private or None, exist_ok=True), where=where)
    if private and not patiently(lambda: client().model_info(repository.name, timeout=ANSWER_S), where=where).private:
        raise HubError(Problem(where, "is public already", "make it private on the Hub, or push without --private"))
    if branch:
        patiently(lambda: client().create_branch(repository.name, branch=branch, exist_ok=True), where=where)
    before = pin(repository)
    removed = tuple(sorted(_stale(before) - {*files}))
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files
    ]
    operations += [CommitOperationDelete(path_in_repo=name) for name in removed]
    progress.say(f"pushing {len(files)} files to {repository}")

    def commit() -> "CommitInfo":
        return client().create_commit(
            repository.name,
            operations,
            commit_message=f"Merge of {' and '.join(parents)}",
            revision=branch,
            parent_commit=before.commit,
        )

    # Only what the Hub surely did not do is tried again: a lost answer may be to a commit that was made.
    made = patiently(commit, where=where, remedy=_REMEDY, statuses=(429, 503))
    return PushResult(made.commit_url, made.oid, files, removed, was_there=made.oid == before.commit)


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


def _require_sound_card(folder: Path) -> None:
    """Raise HubError where the Hub would not take the model card, before anything is sent."""
    from huggingface_hub import ModelCard

    from slrmerge.hub.failures import patiently

    path = folder / CARD_NAME
    card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    refusal: list[str] = []

    def validate() -> None:
        try:
            card.validate(repo_type="model")
        except ValueError as error:
            refusal.append(" ".join(str(error).split()))

    patiently(validate, where=str(path))
    if refusal:
        remedy = f"mend the front matter of the post-trained model's {CARD_NAME}, and merge again"
        raise HubError(Problem(str(path), f"is not accepted by the Hub ({refusal[0]})", remedy))


def _stale(there: Snapshot) -> set[str]:
    """What an older merge left in a repository, and what a loader would take for weights of this one."""
    names = {name for name in there.files if _SHARD.fullmatch(name)}
    if MANIFEST_NAME in there.files:
        with suppress(VerificationError):
            names |= read_manifest(there.files[MANIFEST_NAME].fetch().parent)["files"].keys() & there.files.keys()
    return names


_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
