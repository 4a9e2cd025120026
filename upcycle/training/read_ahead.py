"""Leaves of a checkpoint are read while earlier ones are placed, and looked at while later ones are read."""

import collections
import concurrent.futures
import math
from collections.abc import Callable, Collection, Iterable, Mapping

import jax
import numpy as np

from upcycle import hosts
from upcycle.checkpoints.arrays import count_not_finite, refuse_not_finite
from upcycle.surgery.make import Read
from upcycle.surgery.plan import Action, Plan

Request = tuple[str, jax.sharding.Sharding | None]

_LEAVES_AHEAD = 4  # each costs its memory; more than the cores gain nothing, but for object stores


class ReadAhead:
    """Reads leaves that will soon be asked for. Whatever else is asked for is read then.

    Args:
      read: reads one leaf.
      requests: in the order in which they will be asked for.
    """

    def __init__(self, read: Read, requests: Iterable[Request]):
        self._read = read
        self._coming = collections.deque(dict.fromkeys(requests))
        self._under_way: dict[Request, concurrent.futures.Future] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(_LEAVES_AHEAD)
        self._fill()

    def __call__(self, name: str, sharding: jax.sharding.Sharding | None) -> jax.Array | np.ndarray:
        """The leaf."""
        future = self._under_way.pop((name, sharding), None)
        self._fill()
        return self._read(name, sharding) if future is None else future.result()

    def __enter__(self) -> 'ReadAhead':
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _fill(self) -> None:
        while self._coming and len(self._under_way) < _LEAVES_AHEAD:
            request = self._coming.popleft()
            self._under_way[request] = self._pool.submit(self._read, *request)


class Examination:
    """Checks leaves in the background: none may hold NaN or infinity, and some are also checked whole, as for their hashes.

    A single process checks the leaves that `add` is given. Of several processes, each counts NaN and infinity in its own shards.
    A leaf to be checked whole is assigned to one process, which reads it again; a process holds one such leaf at a time. `result`
    is the same in all processes.

    Args:
      path: of the checkpoint, for messages.
      leaves: of the checkpoint.
      whole: the names of those to be looked at whole.
      look: at a whole leaf, by its name; gives its sha256, or nothing, and may refuse it. None where none is to be looked at.
      read: reads a leaf whole onto the host.
    """

    def __init__(
        self,
        path: str,
        leaves: Mapping[str, jax.ShapeDtypeStruct],
        whole: Collection[str],
        look: Callable[[str, np.ndarray], str | None] | None,
        read: Callable[[str], np.ndarray],
    ):
        self._path, self._leaves, self._whole, self._look_whole = path, leaves, frozenset(whole), look
        self._found: dict[str, tuple[int, str | None]] = {}
        self._waiting: collections.deque[tuple[str, concurrent.futures.Future]] = collections.deque()
        self._alone = jax.process_count() == 1
        self._pool = concurrent.futures.ThreadPoolExecutor(2)
        self._reader = concurrent.futures.ThreadPoolExecutor(1)
        sizes = {name: math.prod(leaves[name].shape) * leaves[name].dtype.itemsize for name in self._whole}
        dealt = () if self._alone else deal(sizes, jax.process_count())[jax.process_index()]
        self._dealt = [(name, self._reader.submit(lambda name: self._at(name, read(name)), name)) for name in dealt]

    def add(self, name: str, leaf: jax.Array | np.ndarray) -> None:
        """Begins with a leaf that was read. No more than a few wait.

        Raises:
          UserError: an earlier leaf is broken, and there is one process.
        """
        if name in self._whole and not self._alone:
            return
        while len(self._waiting) >= _LEAVES_AHEAD:
            self._settle()
        self._waiting.append((name, self._pool.submit(self._at, name, leaf)))

    def settle(self) -> None:
        """Waits until all leaves that were added have been looked at, so that nothing holds them any more."""
        while self._waiting:
            self._settle()

    def result(self) -> dict[str, str]:
        """The fingerprints, when all leaves have been looked at.

        Raises:
          UserError: a leaf is broken; the same in every process.
        """
        hosts.together(self._finish)
        names = sorted(self._leaves)
        counts = np.array([min(self._found.get(name, (0, None))[0], 2**31 - 1) for name in names], np.int32)
        digests = np.array(
            [list(bytes.fromhex(self._found.get(name, (0, None))[1] or _NONE)) for name in names], np.uint8
        )
        if not self._alone:
            # Each leaf has its fingerprint from one process, and its shards are counted by those that hold them.
            counts = hosts.gathered(counts).astype(np.int64).sum(axis=0)
            digests = hosts.gathered(digests).max(axis=0)
        for name, count in zip(names, counts, strict=True):
            refuse_not_finite(self._path, name, int(count))
        texts = {name: bytes(digest).hex() for name, digest in zip(names, digests, strict=True)}
        return {name: texts[name] for name in self._leaves if texts[name] != _NONE}

    def close(self) -> None:
        """Ends what is under way."""
        for pool in (self._pool, self._reader):
            pool.shutdown(cancel_futures=True)

    def _finish(self) -> None:
        self.settle()
        for name, future in self._dealt:
            self._found[name] = future.result()

    def _at(self, name: str, leaf: jax.Array | np.ndarray) -> tuple[int, str | None]:
        """What is found in a leaf: numbers that are not finite, and its fingerprint."""
        if name in self._whole:
            value = np.asarray(leaf)
            count = count_not_finite(value)
            return count, None if count else self._look_whole(name, value)
        if isinstance(leaf, jax.Array):
            own = [np.asarray(shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
        else:
            own = [leaf] if jax.process_index() == 0 else []
        return sum(map(count_not_finite, own)), None

    def _settle(self) -> None:
        name, future = self._waiting.popleft()
        self._found[name] = future.result()
        if self._alone:
            refuse_not_finite(self._path, name, self._found[name][0])


_NONE = '00' * 32  # a fingerprint that no leaf has


def deal(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Names dealt out so that each of `count` shares has about the same size: the largest first, each to the smallest share."""
    shares: list[list[str]] = [[] for _ in range(count)]
    totals = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        smallest = totals.index(min(totals))
        shares[smallest].append(name)
        totals[smallest] += sizes[name]
    return shares


def requests_of(plan: Plan, shardings: Mapping[str, jax.sharding.Sharding]) -> list[Request]:
    """What `surgery.place.execute` will ask for, about in its order.

    Left out are the leaves of a mean, of which devices have room for one at a time.
    """
    requests: list[Request] = []
    for row in plan.in_order():
        if row.action is not Action.MEAN:
            sharding = shardings[row.target] if row.action is Action.KEEP else None
            requests += [(name, sharding) for name in row.sources]
    return requests
