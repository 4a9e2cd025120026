"""Where a model is trained on CPUs, what a step frees stays with the process, for the next step.

The C library gives large arrays back to the system when they are freed, and the system clears every page that it hands out
again (docs/performance.md says what that costs).
"""

import ctypes
import glob
import os
import platform
import sys

# Of GPUs, and of TPUs by either of their drivers.
_ACCELERATORS = ('/dev/nvidia[0-9]*', '/dev/kfd', '/dev/accel[0-9]*', '/dev/vfio/[0-9]*')
# glibc's malloc.h: never a mapping of its own for an array, nothing given back, and one heap for all threads, since only the
# first has room for large arrays.
_OPTIONS = {'M_MMAP_MAX': (-4, 0), 'M_TRIM_THRESHOLD': (-1, 2**31 - 1), 'M_ARENA_MAX': (-8, 1)}


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
    mallopt = ctypes.CDLL(None).mallopt
    answers = [mallopt(option, value) for option, value in _OPTIONS.values()]
    return answers == [1] * len(_OPTIONS)


def _on_cpus() -> bool:
    platforms = os.environ.get('JAX_PLATFORMS')
    if platforms:
        return platforms == 'cpu'
    return not any(glob.glob(pattern) for pattern in _ACCELERATORS)
