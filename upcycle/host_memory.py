"""Where a model is trained on CPUs, what a step frees stays with the process, for the next step, in large pages.

The C library gives large arrays back to the system when they are freed, and the system clears every page that it hands out
again (docs/performance.md says what that costs, and what small pages cost).
"""

import contextlib
import ctypes
import glob
import os
import pathlib
import platform
import sys

# Of GPUs, and of TPUs by either of their drivers.
_ACCELERATORS = ('/dev/nvidia[0-9]*', '/dev/kfd', '/dev/accel[0-9]*', '/dev/vfio/[0-9]*')
# glibc's malloc.h: never a mapping of its own for an array, nothing given back, and one heap for all threads, since only the
# first has room for large arrays.
_OPTIONS = {'M_MMAP_MAX': (-4, 0), 'M_TRIM_THRESHOLD': (-1, -1), 'M_ARENA_MAX': (-8, 1)}
_HEAP = 0.75  # of the host's memory may be in large pages
_LARGE_PAGE = 2**21
_ABOVE = 2**24  # more than is free anywhere else at the start of a process
_MADV_HUGEPAGE = 14  # Linux's mman.h


def keep_freed_memory() -> bool:
    """Has the C library keep what is freed, where JAX will compute on this host's CPUs.

    Not once JAX has been imported, whose threads have heaps of their own. Whoever has set one of glibc's own variables
    (`MALLOC_ARENA_MAX`, ..., `GLIBC_TUNABLES`) is left alone.

    Returns:
      Whether it does so now.
    """
    set_by_hand = any(name.startswith('MALLOC_') or name == 'GLIBC_TUNABLES' for name in os.environ)
    if platform.libc_ver()[0] != 'glibc' or 'jax' in sys.modules or set_by_hand or not _on_cpus():
        return False
    libc = ctypes.CDLL(None)
    answers = [libc.mallopt(option, value) for option, value in _OPTIONS.values()]
    kept = answers == [1] * len(_OPTIONS)
    if kept and _address_space_is_free():
        _ask_for_large_pages(libc)
    return kept


def _address_space_is_free() -> bool:
    """Whether it costs nothing to have addresses without memory behind them."""
    import resource  # not on every system

    limits = (resource.getrlimit(which)[0] for which in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    strict = ''
    with contextlib.suppress(OSError):
        strict = pathlib.Path('/proc/sys/vm/overcommit_memory').read_text().strip()
    return all(limit == resource.RLIM_INFINITY for limit in limits) and strict in ('0', '1')


def _ask_for_large_pages(libc: ctypes.CDLL) -> None:
    """Tells Linux to back the heap with large pages, where its setting leaves that to the program (`madvise`, the usual one).

    The heap is grown once to what it may need; memory is only taken where it is used. A block above it, never used, keeps it so:
    protobuf has the C library give back the heap's end (`malloc_trim`), and what the heap then grows by is not marked.
    """
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = (ctypes.c_size_t,)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    size = int(_HEAP * os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))
    start, above = libc.malloc(size), libc.malloc(_ABOVE)
    if start is not None and above is not None:
        first = -(-start // _LARGE_PAGE) * _LARGE_PAGE
        libc.madvise(first, (start + size - first) // _LARGE_PAGE * _LARGE_PAGE, _MADV_HUGEPAGE)
    libc.free(start)


def _on_cpus() -> bool:
    platforms = os.environ.get('JAX_PLATFORMS')
    if platforms:
        return platforms == 'cpu'
    return not any(glob.glob(pattern) for pattern in _ACCELERATORS)
