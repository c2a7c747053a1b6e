"""A finished merge → one commit on the Hub: verified first, and exactly the manifest's files."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

from slrmerge.checkpoint.files import LocalFile, OpenFile, unreadable
from slrmerge.checkpoint.location import Repository
from slrmerge.checkpoint.side_files import CARD_NAME, MANIFEST_NAME
from slrmerge.errors import (
    CheckpointError,
    HubError,
    OptionError,
    Problem,
    VerificationError,
    collect,
    raise_all,
    require_hub_settings,
    require_type,
)
from slrmerge.io.files import as_path
from slrmerge.io.options import checks_types
from slrmerge.io.progress import Progress
from slrmerge.merging.hub_commit import PushResult, commit_files
from slrmerge.merging.manifest import read_manifest
from slrmerge.merging.verify import verify

_SMALL_BYTES = 1 << 24
"""Files up to this size are read before the push, others by the Hub's client."""


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
        return commit_files(uploads, opened, target, manifest)


def parse_target(repository: str | Repository, revision: str | None = None) -> Repository:
    """The repository and branch to push to. Raises OptionError where `repository` is not organisation/name."""
    require_hub_settings()
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
    if any("\ud800" <= char <= "\udfff" for char in name):
        what, remedy = "has a name that is not UTF-8, which the Hub does not take", "rename its source, and merge again"
        raise CheckpointError(Problem("not-utf8", str(folder / name), what, remedy))
    try:
        return LocalFile.within(folder, name)
    except OSError as error:
        raise unreadable(folder / name, error) from error


@contextmanager
def _uploads(folder: Path, files: Mapping[str, LocalFile]) -> Iterator[tuple[dict[str, Path | bytes], list[OpenFile]]]:
    """What to upload: the bytes of small files, the paths of others, and those open. Raises SourceChangedError.

    The client opens a path again: where the system can, it is that of what is open here. So nothing can take the place
    of a file.
    """
    uploads: dict[str, Path | bytes] = {}
    large: list[OpenFile] = []
    with ExitStack() as kept:
        for name, file in files.items():
            opened = kept.enter_context(closing(file.open()))
            if file.file_bytes <= _SMALL_BYTES:
                content = bytearray(file.file_bytes)
                opened.stream(0, len(content)).readinto(memoryview(content))
                opened.close()
                uploads[name] = bytes(content)
                continue
            large.append(opened)
            descriptor = Path(f"/proc/self/fd/{opened.fd}")
            uploads[name] = descriptor if descriptor.exists() else folder / name
        yield uploads, large


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
