"""The machine, as far as a process here may use it: cores, memory, disk. Limits of a container count; no torch."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 2**60  # what the older interface says for none is about 2**63


@dataclass(frozen=True)
class Processor:
    """Cores, and how many of them this process may use."""

    model: str
    cores: int
    usable: int
    """By its affinity."""
    quota: float | None
    """Cores' worth of time that a container gives; None = no limit."""


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory."""

    total: int
    available: int
    """Of the machine: free, or freed as soon as it is needed."""
    limit: int | None
    """Of the container; None = no limit."""
    free: int
    """That this process may still take: of the machine and of the container, the smaller."""


def processor() -> Processor:
    """Of this machine."""
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if platform.system() == "Linux" else cores
    return Processor(_processor_model(), cores, usable, _quota())


def memory() -> Memory:
    """As it is now."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = _available() or total
    groups = [(limit, limit - used) for limit, used in _memory_groups() if limit < min(total, _NO_LIMIT)]
    limit = min((limit for limit, _ in groups), default=None)
    free = min([available, *(max(0, left) for _, left in groups)])
    return Memory(total, available, limit, free)


def disk_free(path: Path) -> int:
    """Bytes that can be written at a path, which need not exist yet."""
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def _processor_model() -> str:
    for line in _lines(_PROC / "cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _available() -> int | None:
    for line in _lines(_PROC / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _quota() -> float | None:
    """In cores: the smallest of the groups that this process is in."""
    found = []
    for group in _groups("cpu"):
        newer = " ".join(_lines(group / "cpu.max")).split()
        older = [" ".join(_lines(group / f"cpu.cfs_{name}_us")) for name in ("quota", "period")]
        allowed, period = newer if len(newer) == 2 else older
        if allowed.isdigit() and period.isdigit() and int(period):
            found.append(int(allowed) / int(period))
    return min(found, default=None)


def _memory_groups() -> Iterator[tuple[int, int]]:
    """Limit and use of each group that has a limit. What a group has cached of files goes when memory is needed."""
    for group in _groups("memory"):
        for names in (
            ("max", "current", "inactive_file"),
            ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = (" ".join(_lines(group / f"memory.{name}")) for name in names[:2])
            if limit.isdigit() and used.isdigit():
                counts = dict(
                    line.split() for line in _lines(group / "memory.stat") if len(line.split()) == 2
                )
                yield int(limit), int(used) - int(counts.get(names[2], "0"))


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control groups, this process's own and those around it, of either interface of Linux."""
    for line in _lines(_PROC / "self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            mount = _CGROUPS
        elif controller in controllers.split(","):
            mount = _CGROUPS / controllers
            mount = mount if mount.is_dir() else _CGROUPS / controller
        else:
            continue
        # In a container the path may be that of the outside: what is mounted is then the group itself.
        inside = Path(path.lstrip("/"))
        yield from (mount / part for part in (inside, *inside.parents) if (mount / part).is_dir())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
