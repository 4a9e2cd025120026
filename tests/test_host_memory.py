"""What is freed on a machine with CPUs only stays with the process, in large pages."""

import os
import pathlib
import platform
import resource
import subprocess
import sys

import pytest

# Pages that ten arrays of 64 MiB take from the system, one after the other, by how often it had to hand out a page.
PROGRAM = """
import resource
from upcycle.host_memory import keep_freed_memory
kept = keep_freed_memory()
import numpy as np
from concurrent.futures import ThreadPoolExecutor
def touch(_=None):
    np.ones(2**23)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
with ThreadPoolExecutor(1) as pool:
    list(pool.map(touch, range(1)))
    before = faults()
    for _ in range(5):
        touch()
        list(pool.map(touch, range(1)))
    print(kept, faults() - before)
"""
# Resident memory for which large pages are requested (`hg` of proc_pid_smaps(5)), in kB, once 256 MiB are filled by arrays for
# which NumPy requests none itself. How many of them Linux grants depends on how much memory it finds in one piece. Protobuf
# trims the heap.
LARGE_PAGES = """
import ctypes
import re
from upcycle.host_memory import keep_freed_memory
keep_freed_memory()
ctypes.CDLL(None).malloc_trim(0)
import numpy as np
held = [np.ones(2**16) for _ in range(512)]
mappings = re.findall(r'^Rss: +(\\d+) kB$.*?^VmFlags: (.*?)$', open('/proc/self/smaps').read(), re.DOTALL | re.MULTILINE)
print(sum(int(resident) for resident, flags in mappings if 'hg' in flags.split()))
"""
ARRAYS, PAGES = 10, 2**26 // os.sysconf('SC_PAGE_SIZE')


def printed(program, limits=(), **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(('MALLOC_', 'GLIBC_'))}
    command = [sys.executable, '-c', program]
    command = ['sh', '-c', 'ulimit "$1" "$2"; shift 2; exec "$@"', 'sh', *limits, *command] if limits else command
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True).stdout


def run(**variables):
    kept, faults = printed(PROGRAM, **variables).split()
    return kept == 'True', int(faults)


def _left_to_the_program():
    """Whether the system asks programs where they want large pages, and addresses are not rationed."""
    setting = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
    rationed = pathlib.Path('/proc/sys/vm/overcommit_memory')
    return (
        setting.exists()
        and '[madvise]' in setting.read_text()
        and rationed.read_text().strip() != '2'
        and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    )


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc is told')
def test_arrays_take_the_place_of_those_before():
    kept, faults = run(JAX_PLATFORMS='cpu')
    assert kept
    assert faults < PAGES / 4


@pytest.mark.skipif(not _left_to_the_program(), reason='large pages are not left to the program here')
def test_arrays_lie_in_large_pages():
    assert int(printed(LARGE_PAGES, JAX_PLATFORMS='cpu')) > 2**17
    # Where addresses are rationed, they are not taken for what may never be used.
    assert int(printed(LARGE_PAGES, ('-v', str(2**25)), JAX_PLATFORMS='cpu')) < 2**15


def test_accelerators_and_those_who_know_better_are_left_alone():
    assert run(JAX_PLATFORMS='tpu,cpu')[0] is False
    assert run(JAX_PLATFORMS='cpu', MALLOC_ARENA_MAX='8')[0] is False
    assert run(JAX_PLATFORMS='cpu', GLIBC_TUNABLES='glibc.malloc.check=0')[0] is False
