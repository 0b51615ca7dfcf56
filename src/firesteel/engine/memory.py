"""The C library's allocator, told to keep what is freed.

A pass allocates and frees the same hundreds of megabytes again and again. glibc gives such blocks back to the
system at once, and the next pass pays for every page anew: on a CPU a tenth of a step (benchmarks/RESULTS.md).
Kept, the process stays as large as it was at its peak, as GPU allocators do; the peak itself does not grow.
"""

from __future__ import annotations

import ctypes
import os
import platform

# From glibc's malloc.h. One arena: only the main one grows beyond 64 MiB blocks.
_ARENA_MAX, _MMAP_MAX, _TOP_PAD, _TRIM_THRESHOLD = -8, -4, -2, -1
_NEVER = -1
_TOP_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Set this process's allocator so, and say whether that was done.

    Left alone are other C libraries, a process whose environment sets the allocator itself (`MALLOC_…`), and one
    with `FIRESTEEL_KEEP_MEMORY=0`. Threads that have allocated already keep their arenas.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if chosen or os.environ.get("FIRESTEEL_KEEP_MEMORY") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TOP_PAD, _TOP_PAD_BYTES), (_TRIM_THRESHOLD, _NEVER))
    return all(library.mallopt(name, value) for name, value in settings)
