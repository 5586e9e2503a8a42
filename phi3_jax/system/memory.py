"""Memory: the main memory of this host as far as this process may have it."""

import os
import re
import resource
import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def total_memory() -> int:
    """Bytes of main memory that this process may use."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limit = _CGROUP / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        sizes.append(int(text))
    return min(sizes)


def free_memory() -> int:
    """Bytes of main memory that this process could still be given; 0 where the system does not say."""
    info = Path("/proc/meminfo")
    if info.is_file() and (line := re.search(r"MemAvailable:\s+(\d+) kB", info.read_text())):
        free = int(line[1]) * 1024
    elif "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return 0
    used = _CGROUP / "memory.current"
    if used.is_file():
        free = min(free, total_memory() - int(used.read_text()))
    return max(0, free)


def resident_peak() -> int:
    """The most bytes of main memory that this process has had so far."""
    status = Path("/proc/self/status")  # Linux's; its getrusage counts the process that started this one too
    if status.exists() and (line := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(line[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
