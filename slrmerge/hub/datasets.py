"""A dataset on the Hub as rows, read by the `datasets` library."""

from collections.abc import Iterator
from typing import Any

from slrmerge.errors import DataError, HubError, Problem, first_line
from slrmerge.hub.failures import in_words
from slrmerge.repository import Repository


def load_rows(repository: Repository, *, subset: str | None, split: str) -> Iterator[dict[str, Any]]:
    """The rows of one split of a dataset, fetched into the cache of `datasets`.

    Raises HubError for what the Hub does not give, DataError where there is no such subset or split.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from datasets.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()  # what matters is raised
    try:
        with in_words(str(repository)):
            try:
                rows = load_dataset(repository.name, subset, split=split, revision=repository.revision)
            except (ValueError, DatasetsError) as error:
                if isinstance(error, DatasetNotFoundError):
                    raise
                remedy = "name what it has with --subset and --split"
                raise DataError(Problem(str(repository), f"cannot be used so ({first_line(error)})", remedy)) from error
    except DatasetNotFoundError as error:
        what = "is no file here, and no dataset on the Hub that one may read"
        raise HubError(Problem(str(repository), what, "check the name")) from error
    yield from rows
