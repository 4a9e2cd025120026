"""Reading and checking leaves of a checkpoint ahead of use."""

import collections
import concurrent.futures
from collections.abc import Callable, Collection, Iterable, Mapping

import jax
import numpy as np

from upcycle import cost, hosts
from upcycle.checkpoints.arrays import count_not_finite, refuse_not_finite
from upcycle.checkpoints.hashing import deal
from upcycle.surgery.make import Read
from upcycle.surgery.plan import Action, Plan

Request = tuple[str, jax.sharding.Sharding | None]

_LEAVES_AHEAD = 4  # each is held in memory; more than the number of cores helps only with object stores


class ReadAhead:
    """Reads leaves in the background before they are requested. A leaf that was not announced is read on request.

    Args:
      read: reads one leaf.
      requests: the announced requests, in order.
    """

    def __init__(self, read: Read, requests: Iterable[Request]):
        self._read = read
        self._coming = collections.deque(dict.fromkeys(requests))
        self._under_way: dict[Request, concurrent.futures.Future] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(_LEAVES_AHEAD)
        self._fill()

    def __call__(self, name: str, sharding: jax.sharding.Sharding | None) -> jax.Array | np.ndarray:
        """Returns the leaf."""
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
    """Checks leaves: none may hold NaN or infinity, and some are also examined whole, such as for their hashes.

    A single process checks the leaves given to `check`. With several processes, each counts NaN and infinity in its own shards,
    and a leaf to be examined whole is assigned to one process, which reads it again in the background, one at a time.

    Args:
      path: of the checkpoint, for messages.
      leaves: of the checkpoint.
      whole: the names of the leaves to examine whole.
      examine: takes the name and a whole leaf; returns its sha256 or None, and may refuse it. None if `whole` is empty.
      read: reads a leaf whole onto the host.
    """

    def __init__(
        self,
        path: str,
        leaves: Mapping[str, jax.ShapeDtypeStruct],
        whole: Collection[str],
        examine: Callable[[str, np.ndarray], str | None] | None,
        read: Callable[[str], np.ndarray],
    ):
        self._path, self._leaves, self._whole, self._examine = path, leaves, frozenset(whole), examine
        self._results: dict[str, tuple[int, str | None]] = {}
        self._alone = jax.process_count() == 1
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        sizes = {name: cost.num_bytes(leaves[name]) for name in self._whole}
        dealt = () if self._alone else deal(sizes, jax.process_count())[jax.process_index()]
        self._dealt = [self._pool.submit(lambda name: self._check(name, read(name)), name) for name in dealt]

    def check(self, name: str, leaf: jax.Array | np.ndarray) -> None:
        """Checks a leaf that was read; may be called in several threads.

        Raises:
          UserError: the leaf is damaged (with several processes, `result` raises it).
        """
        if self._alone or name not in self._whole:
            self._check(name, leaf)
            if self._alone:
                refuse_not_finite(self._path, name, self._results[name][0])

    def result(self) -> dict[str, str]:
        """Waits for all leaves and returns the hashes.

        Raises:
          UserError: a leaf is damaged; the same in every process.
        """
        hosts.together(lambda: [future.result() for future in self._dealt])
        names = sorted(self._leaves)
        results = [self._results.get(name, (0, None)) for name in names]
        counts = np.array([min(count, 2**31 - 1) for count, _ in results], np.int32)
        digests = np.array([list(bytes.fromhex(digest or _NONE)) for _, digest in results], np.uint8)
        if not self._alone:
            # One process hashes a leaf; the processes that hold its shards count.
            counts = hosts.gathered(counts).astype(np.int64).sum(axis=0)
            digests = hosts.gathered(digests).max(axis=0)
        for name, count in zip(names, counts, strict=True):
            refuse_not_finite(self._path, name, int(count))
        texts = {name: bytes(digest).hex() for name, digest in zip(names, digests, strict=True)}
        return {name: texts[name] for name in self._leaves if texts[name] != _NONE}

    def close(self) -> None:
        """Stops the background thread."""
        self._pool.shutdown(cancel_futures=True)

    def _check(self, name: str, leaf: jax.Array | np.ndarray) -> None:
        """Stores the number of values of a leaf that are not finite, and its hash."""
        if name in self._whole:
            value = np.asarray(leaf)
            count = count_not_finite(value)
            self._results[name] = count, None if count else self._examine(name, value)
            return
        if isinstance(leaf, jax.Array):
            own = [np.asarray(shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
        else:
            own = [leaf] if jax.process_index() == 0 else []
        self._results[name] = sum(map(count_not_finite, own)), None


_NONE = '00' * 32  # stands for no hash


def requests_of(plan: Plan, shardings: Mapping[str, jax.sharding.Sharding]) -> list[Request]:
    """Returns the requests of `surgery.place.execute`, roughly in order.

    Excludes the leaves of a mean: devices have room for one of them at a time.
    """
    requests: list[Request] = []
    for row in plan.in_order():
        if row.action is not Action.MEAN:
            sharding = shardings[row.target] if row.action is Action.KEEP else None
            requests += [(name, sharding) for name in row.sources]
    return requests
