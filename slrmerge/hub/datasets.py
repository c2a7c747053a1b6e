"""A dataset on the Hub as rows, read by the `datasets` library at one commit."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.file_download import repo_folder_name
from yaml import YAMLError

from slrmerge.errors import DataError, HubError, Problem
from slrmerge.hub.failures import in_words, patiently
from slrmerge.repository import Repository


def load_rows(repository: Repository, *, subset: str | None, split: str) -> tuple[str | None, Iterable[dict[str, Any]]]:
    """The commit of a dataset and the rows of one split, fetched into the cache of `datasets`.

    Offline it is what that cache holds, of a commit that may not be known.

    Raises HubError for what the Hub does not give, DataError where there is no such subset or split.
    """
    from datasets import load_dataset_builder
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from datasets.utils.logging import CRITICAL, disable_progress_bar, set_verbosity

    disable_progress_bar()
    set_verbosity(CRITICAL)  # what matters is raised
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)  # a card need not say anything
    where = f"datasets/{repository}"
    offline = constants.is_offline_mode()
    commit = _cached_commit(repository) if offline else _commit(repository, where)
    with in_words(where):
        try:
            # By a name that is never a folder here.
            builder = load_dataset_builder(f"hf://datasets/{repository.name}", subset, revision=commit)
            if commit and builder.hash != commit:  # it takes whatever its cache has where the Hub fails
                raise HubError(Problem(where, f"was not to be had as of commit {commit}", "run again"))
            builder.download_and_prepare()
            rows = builder.as_dataset(split=split)
        except (ValueError, DatasetsError, EmptyDatasetError, YAMLError, StopIteration) as error:
            cause = (error.__cause__ if isinstance(error, DatasetGenerationError) else None) or error
            why = " ".join(str(cause).partition("\nExample of usage")[0].split()) or "no rows"
            remedy = "name what it has with --subset and --split"
            raise DataError(Problem(str(repository), f"cannot be used so ({why})", remedy)) from error
        except ConnectionError as error:
            if not offline:
                raise
            what = "is not in the cache of `datasets`, and HF_HUB_OFFLINE is set"
            raise HubError(Problem(where, what, "unset it")) from error
    return commit, rows


def _commit(repository: Repository, where: str) -> str | None:
    """The commit that is asked for, of a dataset that one may read and that is made of files."""
    api, timeout_s = HfApi(), constants.HF_HUB_ETAG_TIMEOUT

    def ask() -> Any:
        info = api.dataset_info(repository.name, revision=repository.revision, timeout=timeout_s)
        api.auth_check(repository.name, repo_type="dataset")
        return info

    info = patiently(ask, where=where)
    script = repository.name.rpartition("/")[2] + ".py"
    if any(file.rfilename == script for file in info.siblings or ()):
        what = "is made by a script of its own, which is not run"
        raise DataError(Problem(str(repository), what, "name one that is made of files"))
    commit: str | None = info.sha
    return commit


def _cached_commit(repository: Repository) -> str | None:
    """The commit that the Hub's cache knows the revision by; a revision that it does not know is taken for one."""
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository.name, repo_type="dataset"))
    ref = folder / "refs" / (repository.revision or constants.DEFAULT_REVISION)
    return ref.read_text().strip() if ref.is_file() else repository.revision
