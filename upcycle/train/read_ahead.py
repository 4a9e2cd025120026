"""Leaves of a checkpoint are read while earlier ones are placed, and looked at while later ones are read."""

import collections
import concurrent.futures
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from upcycle.checkpoints.arrays import require_finite
from upcycle.surgery.execute import Read, sha256_of
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
    """Looks at leaves behind: none may hold NaN or infinity; and their fingerprints, for a receipt.

    No more than a few leaves wait for it.

    Args:
      path: of the checkpoint, for messages.
    """

    def __init__(self, path: str):
        self._path = path
        self._found: dict[str, str] = {}
        self._waiting: collections.deque[tuple[str, concurrent.futures.Future]] = collections.deque()
        self._pool = concurrent.futures.ThreadPoolExecutor(2)

    def add(self, name: str, leaf: jax.Array | np.ndarray, *, fingerprint: bool) -> None:
        """Begins with a leaf.

        Raises:
          UserError: an earlier leaf is broken.
        """
        if len(self._waiting) >= _LEAVES_AHEAD:
            self._settle()
        self._waiting.append((name, self._pool.submit(self._look, name, leaf, fingerprint)))

    def result(self) -> dict[str, str]:
        """The fingerprints, when all leaves have been looked at.

        Raises:
          UserError: a leaf is broken.
        """
        while self._waiting:
            self._settle()
        self._pool.shutdown()
        return self._found

    def _look(self, name: str, leaf: jax.Array | np.ndarray, fingerprint: bool) -> str | None:
        require_finite(self._path, name, np.asarray(leaf))
        return sha256_of(name, leaf) if fingerprint else None

    def _settle(self) -> None:
        name, future = self._waiting.popleft()
        if (found := future.result()) is not None:
            self._found[name] = found


def requests_of(plan: Plan, shardings: Mapping[str, jax.sharding.Sharding]) -> list[Request]:
    """What `surgery.execute` will ask for, about in its order.

    Left out are the leaves of a mean, of which devices have room for one at a time.
    """
    requests: list[Request] = []
    for row in plan.in_order():
        if row.action is not Action.MEAN:
            sharding = shardings[row.target] if row.action is Action.KEEP else None
            requests += [(name, sharding) for name in row.sources]
    return requests
