"""The memory that this process may use."""

from io import StringIO
from pathlib import Path

import pytest

from slrmerge.io import memory
from slrmerge.io.memory import available_memory_bytes, memory_bytes


def test_available_memory_is_a_part_of_the_memory() -> None:
    assert 0 < available_memory_bytes() < memory_bytes()


@pytest.mark.parametrize("content", ["MemTotal: 900 kB\n", None])
def test_half_of_the_memory_is_assumed_where_the_system_does_not_report_what_is_available(
    monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    def opened(*_: object, **__: object) -> StringIO:
        if content is None:
            raise FileNotFoundError
        return StringIO(content)

    monkeypatch.setattr("slrmerge.io.memory.open", opened, raising=False)
    assert available_memory_bytes() == memory_bytes() // 2


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    return tmp_path


STAT = "anon 5\n{0}active_file 100000\n{0}inactive_file 200000\n"


@pytest.mark.parametrize("place", ["user/job", "user", "."])
def test_a_control_group_limits_the_memory(groups: Path, place: str) -> None:
    (groups / "own").write_text("0::/user/job\n")
    (groups / "user" / "job").mkdir(parents=True)
    for folder in (groups, groups / "user", groups / "user" / "job"):
        (folder / "memory.max").write_text("1000000\n" if folder == groups / place else "max\n")
        (folder / "memory.current").write_text("500000\n")
        (folder / "memory.stat").write_text(STAT.format(""))
    assert (memory_bytes(), available_memory_bytes()) == (1_000_000, 800_000)


def test_a_control_group_of_version_1_limits_the_memory(groups: Path) -> None:
    (groups / "own").write_text("9:name=systemd:/\n4:cpu,memory:/docker/123\n3:cpuset:/\n")
    (groups / "memory").mkdir()  # in the container, its own group is the root
    (groups / "memory" / "memory.limit_in_bytes").write_text("1000000\n")
    (groups / "memory" / "memory.usage_in_bytes").write_text("500000\n")
    (groups / "memory" / "memory.stat").write_text(STAT.format("total_"))
    assert (memory_bytes(), available_memory_bytes()) == (1_000_000, 800_000)


@pytest.mark.parametrize("content", [None, "", "0::/\n", "0::/../elsewhere\n"])
def test_control_groups_without_a_limit_are_none(groups: Path, content: str | None) -> None:
    before = memory_bytes()
    if content is not None:
        (groups / "own").write_text(content)
    assert memory_bytes() == before
