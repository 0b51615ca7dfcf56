"""What the process frees, it keeps; unless its owner has decided otherwise."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

BLOCKS = """
import os, resource
from firesteel.engine.memory import keep_freed_memory
done = keep_freed_memory()

import torch
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use(): torch.ones(64, 2**18)  # 64 MiB, more than glibc ever keeps by itself
for _ in range(10): use()
before = faults()
for _ in range(5): use()
print(done, faults() - before)
"""


def faults_of_five_blocks(**environment: str) -> tuple[bool, int]:
    """Whether the allocator was set, and the pages that were mapped anew for blocks that had been freed before."""
    command = [sys.executable, "-c", BLOCKS]
    clean = {"PATH": "/usr/bin:/bin", **environment}
    done, faults = subprocess.run(
        command, env=clean, capture_output=True, text=True, check=True
    ).stdout.split()
    return done == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc is what is set")
def test_memory_that_was_freed_is_used_again_without_asking_the_system() -> None:
    kept, faults = faults_of_five_blocks()
    left_alone, faults_before = faults_of_five_blocks(FIRESTEEL_KEEP_MEMORY="0")
    assert (kept, left_alone) == (True, False)
    assert faults < 100
    assert faults_before > faults + 100


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc is what is set")
def test_an_allocator_that_the_user_has_set_is_left_alone() -> None:
    assert faults_of_five_blocks(MALLOC_TOP_PAD_="0")[0] is False
