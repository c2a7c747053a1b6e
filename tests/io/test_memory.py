"""This machine's memory."""

from io import StringIO

import pytest

from slrmerge.io.memory import available_memory_bytes, physical_memory_bytes


def test_available_memory_is_a_part_of_the_memory() -> None:
    assert 0 < available_memory_bytes() < physical_memory_bytes()


@pytest.mark.parametrize("content", ["MemTotal: 900 kB\n", None])
def test_half_of_the_memory_is_assumed_where_the_system_does_not_report_what_is_available(
    monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    def opened(*_: object, **__: object) -> StringIO:
        if content is None:
            raise FileNotFoundError
        return StringIO(content)

    monkeypatch.setattr("slrmerge.io.memory.open", opened, raising=False)
    assert available_memory_bytes() == physical_memory_bytes() // 2
