"""SHA-256 of a step's files, computed by all processes of a run, each for a share of the bytes.

Process 0 sends requests through the key-value store of JAX's coordination service, and a thread of every other process answers,
so that hashing runs in the background of training and uses no collectives. All processes must see one file system. Process 0
computes the hashes that do not arrive in time.
"""

from __future__ import annotations

import atexit
import collections
import concurrent.futures
import hashlib
import heapq
import json
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from etils import epath

from upcycle import hosts

SHARED_BYTES = 256 << 20  # below this, sending requests would take longer than hashing
_BLOCK_BYTES = 4 << 20
_FILES_AT_ONCE = 8  # threads: hashing releases the GIL, and object stores have a high latency
_KEY = 'upcycle/hash'
_MOST_FILES = 10_000  # in one message of the store
_POLL = 0.5
# Seconds for an answer, in addition to twice the time that process 0 needed for its share.
_LONGER = 30.0

_asked: collections.Counter[int] = collections.Counter()
_serving = False


def describe(folder: epath.Path, sizes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Hashes files. Only process 0 may call this, after every process has called `serve`.

    Args:
      folder: of the files.
      sizes: bytes of each file by its name; they balance the shares.

    Returns:
      By name, in the order of `sizes`: `bytes` and `sha256`, or `wrong`: the reason why it cannot be read.
    """
    store = hosts.store()
    if jax.process_count() == 1 or store is None or sum(sizes.values()) < SHARED_BYTES:
        return _describe_here(folder, sizes)
    mine, *others = deal(sizes, jax.process_count())
    waiting: dict[str, list[str]] = {}
    for process, share in enumerate(others, 1):
        for start in range(0, len(share), _MOST_FILES):
            key = f'{_KEY}/{process}/{_asked[process]}'
            _asked[process] += 1
            waiting[key] = share[start : start + _MOST_FILES]
            store.key_value_set(key, json.dumps([str(folder), waiting[key]]))
    start = time.monotonic()
    hashes = _describe_here(folder, mine)
    end = time.monotonic() + 2 * (time.monotonic() - start) + _LONGER
    for key, names in waiting.items():
        while (answer := hosts.lookup(store, f'{key}/answer')) is None and time.monotonic() < end:
            time.sleep(0.05)
        if answer is not None:
            hashes |= json.loads(answer)
            store.key_value_delete(key)
            continue
        # Requests are answered in order, so this one stays, but without files.
        store.key_value_set(key, json.dumps([str(folder), []]), allow_overwrite=True)
        hashes |= _describe_here(folder, names)
    return {name: hashes[name] for name in sizes}


def deal(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Splits names into shares of similar total size, greedily: the largest name first, to the smallest share."""
    shares: list[list[str]] = [[] for _ in range(count)]
    heap = [(0, index) for index in range(count)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        total, index = heapq.heappop(heap)
        shares[index].append(name)
        heapq.heappush(heap, (total + sizes[name], index))
    return shares


def serve() -> None:
    """Starts a thread that answers process 0. Does nothing on process 0, or if the thread runs already."""
    global _serving
    store = hosts.store()
    if _serving or jax.process_index() == 0 or store is None:
        return
    _serving = True
    over = threading.Event()

    def answer() -> None:
        number = 0
        while not over.wait(_POLL):
            key = f'{_KEY}/{jax.process_index()}/{number}'
            if (question := hosts.lookup(store, key)) is None:
                continue
            folder, names = json.loads(question)
            try:
                store.key_value_set(f'{key}/answer', json.dumps(_describe_here(epath.Path(folder), names)))
            except Exception:  # the service has ended
                return
            number += 1

    thread = threading.Thread(target=answer, name='hashing for process 0', daemon=True)
    thread.start()

    def stop() -> None:
        over.set()
        thread.join()

    atexit.register(stop)  # before JAX takes its client down


def _describe_here(folder: epath.Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        return dict(pool.map(lambda name: (name, _describe(folder / name)), names))


def _describe(file: epath.Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    try:
        with file.open('rb') as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                size += len(block)
    except FileNotFoundError:
        return {'wrong': 'is missing'}
    except OSError as error:
        return {'wrong': f'cannot be read ({error.strerror or error})'}
    return {'bytes': size, 'sha256': digest.hexdigest()}
