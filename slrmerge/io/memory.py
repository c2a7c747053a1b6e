"""The memory that this process may use."""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def memory_bytes() -> int:
    """This machine's memory, or less where a container is limited; a low guess where the system does not report it."""
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        physical = 8 << 30
    return min([physical, *(limit for limit, _ in _control_groups())])


def available_memory_bytes() -> int:
    """What programs can have without swapping, as Linux reports it; elsewhere half of the memory."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kilobytes = dict(line.split(":") for line in file)["MemAvailable"]
    except (OSError, KeyError):
        return memory_bytes() // 2
    available = int(kilobytes.split()[0]) << 10
    return max(min([available, *(limit - used for limit, used in _control_groups())]), 0)


def peak_memory_bytes() -> int:
    """The most memory that this process has had so far; a usual amount where the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return 1 << 29
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _control_groups() -> Iterator[tuple[int, int]]:
    """The limit of each of Linux's control groups that this process is in, and what the group uses without caches."""
    with suppress(OSError):
        for line in _OWN_GROUPS.read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # version 2
                root, limit, used, prefix = _GROUPS, "memory.max", "memory.current", ""
            elif "memory" in controllers.split(","):
                root, limit, used, prefix = (
                    _GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
                )  # fmt: skip
            else:
                continue
            group = root / path.strip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(root):  # in a container the group may be known by its name outside
                    with suppress(OSError, ValueError, KeyError):  # without a limit
                        limit_bytes = int((folder / limit).read_text("utf-8"))
                        stat = dict(entry.split() for entry in (folder / "memory.stat").read_text("utf-8").splitlines())
                        cached = int(stat[f"{prefix}active_file"]) + int(stat[f"{prefix}inactive_file"])
                        yield limit_bytes, int((folder / used).read_text("utf-8")) - cached
