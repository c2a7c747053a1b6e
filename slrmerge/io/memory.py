"""This machine's memory."""

import os


def physical_memory_bytes() -> int:
    """This machine's memory, or a low guess where the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 8 << 30


def available_memory_bytes() -> int:
    """What programs can have without swapping, as Linux reports it; elsewhere half of the memory."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kilobytes = dict(line.split(":") for line in file)["MemAvailable"]
    except (OSError, KeyError):
        return physical_memory_bytes() // 2
    return int(kilobytes.split()[0]) << 10
