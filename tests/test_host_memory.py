"""What is freed on a machine with CPUs only stays with the process."""

import os
import platform
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
ARRAYS, PAGES = 10, 2**26 // os.sysconf('SC_PAGE_SIZE')


def run(**variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(('MALLOC_', 'GLIBC_'))}
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM], env=environment | variables, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept == 'True', int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc is told')
def test_arrays_take_the_place_of_those_before():
    kept, faults = run(JAX_PLATFORMS='cpu')
    assert kept
    assert faults < PAGES / 4


def test_accelerators_and_those_who_know_better_are_left_alone():
    assert run(JAX_PLATFORMS='tpu,cpu')[0] is False
    assert run(JAX_PLATFORMS='cpu', MALLOC_ARENA_MAX='8')[0] is False
    assert run(JAX_PLATFORMS='cpu', GLIBC_TUNABLES='glibc.malloc.check=0')[0] is False
