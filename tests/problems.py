"""What an operation refuses, asserted by codes; wording belongs in golden files."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest

from slrmerge.errors import SlrmergeError

E = TypeVar("E", bound=SlrmergeError)


@contextmanager
def refused(error: type[E], *codes: str) -> "Iterator[pytest.ExceptionInfo[E]]":
    """The block raises exactly this error, with problems of exactly these codes, in order; repeats may be written once.

    The exception is there for more: `.value.problems[0].where`, `.value.__notes__`.
    """
    with pytest.raises(error) as caught:
        yield caught
    assert type(caught.value) is error
    found = [problem.code for problem in caught.value.problems]
    assert found == list(codes) or list(dict.fromkeys(found)) == list(codes), str(caught.value)
