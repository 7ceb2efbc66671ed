"""Memory that a step of training frees stays with the process, for the next step.

By glibc's defaults each activation of several megabytes is mapped when it is made and unmapped when
it is freed, so that every step faults all of its pages in again (docs/results/allocator.json has
what that takes). Other C libraries (musl's, macOS's, Windows') have no such settings.
"""

import ctypes
import sys

# mallopt's parameters (malloc.h of glibc) and their values: no allocation has a mapping of its own,
# nothing is given back from the end of the heap, and that grows by so many bytes more than needed.
_SETTINGS = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 100 * 2**20)}


def keep_freed_memory() -> bool:
    """Let this process's ``malloc`` keep what is freed, for good; tell whether it now does.

    The same as starting Python with ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1
    MALLOC_TOP_PAD_=104857600``. No number that is computed changes.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return all(libc.mallopt(number, value) == 1 for number, value in _SETTINGS.values())
