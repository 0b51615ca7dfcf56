"""What this process may use, as the system says it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from firesteel import machine

GB = 10**9


def written(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system's files, with 20 GB available and no control group."""
    written(tmp_path / "proc", meminfo=f"MemTotal: 999 kB\nMemAvailable: {20 * GB // 1024} kB")
    written(tmp_path / "proc", cpuinfo="model name\t: Abacus 9000\nmodel name\t: Abacus 9000")
    written(tmp_path / "proc/self", cgroup="")
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 64 * GB // 4096}.get(name, 4096))
    return tmp_path


def test_without_a_container_all_that_is_available_is_free(system: Path) -> None:
    memory = machine.memory()
    assert (memory.limit, memory.free // 10**6) == (None, 20 * GB // 10**6)
    assert memory.total == 64 * GB // 4096 * 4096
    assert machine.processor().model == "Abacus 9000"
    assert machine.processor().quota is None


def test_a_container_leaves_its_limit_less_what_it_uses_and_cannot_let_go(system: Path) -> None:
    written(system / "proc/self", cgroup="0::/user/job")
    job = {
        "memory__max": 8 * GB,
        "memory__current": 5 * GB,
        "memory__stat": f"anon 1\ninactive_file {2 * GB}",
    }
    written(system / "cgroup/user/job", **job, cpu__max="150000 100000")
    written(
        system / "cgroup/user", memory__max=6 * GB, memory__current=5 * GB, memory__stat="inactive_file 0"
    )
    written(system / "cgroup", memory__max="max", memory__current=GB, cpu__max="max 100000")
    assert (machine.memory().limit, machine.memory().free) == (6 * GB, GB)
    written(system / "cgroup/user", memory__max="max")
    assert (machine.memory().limit, machine.memory().free) == (8 * GB, 5 * GB)
    assert machine.processor().quota == 1.5


def test_the_older_interface_is_read_too_and_its_no_limit_is_none(system: Path) -> None:
    written(system / "proc/self", cgroup="4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/docker/abc")
    # Inside a container the group itself is mounted at the top.
    group = {"memory__limit_in_bytes": 3 * GB, "memory__usage_in_bytes": 2 * GB}
    written(system / "cgroup/memory", **group, memory__stat=f"total_inactive_file {GB}")
    written(system / "cgroup/cpu,cpuacct", cpu__cfs_quota_us=50000, cpu__cfs_period_us=100000)
    assert (machine.memory().limit, machine.memory().free) == (3 * GB, 2 * GB)
    assert machine.processor().quota == 0.5
    written(system / "cgroup/memory", memory__limit_in_bytes=9223372036854771712)
    written(system / "cgroup/cpu,cpuacct", cpu__cfs_quota_us=-1)
    assert machine.memory().limit is None
    assert machine.processor().quota is None


def test_here_it_is_something_sensible(tmp_path: Path) -> None:
    memory, processor = machine.memory(), machine.processor()
    assert 2**28 < memory.free <= memory.total
    assert 1 <= processor.usable <= processor.cores
    assert machine.disk_free(tmp_path / "not/there/yet") > 2**20
