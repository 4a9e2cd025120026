"""The journal of a write on a local disk, from which the same command continues after a cut."""

from __future__ import annotations

import concurrent.futures
import json
import os
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from upcycle.errors import UserError

FILE = 'journal.jsonl'
Part = tuple[str, int]  # a leaf, and its first row

_SECONDS_BETWEEN_SYNCS = 5.0


class Journal:
    """The parts that are safe from a crash of the machine: first what is being written from what, then a line for each part.

    Args:
        folder: that is being written.
        identity: what is being written from what, as JSON.

    Attributes:
        done: the parts that an earlier attempt at the same has noted.

    Raises:
        UserError: the folder is the beginning of another write.
    """

    def __init__(self, folder: epath.Path, identity: Mapping[str, Any]):
        self._path = folder / FILE
        self._identity = json.loads(json.dumps(dict(identity)))
        self.done: set[Part] = set()
        if folder.exists():
            lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
            # A torn last line is a part that is written again.
            read = [json.loads(line) for line in lines if line.endswith('\n')]
            if read and read[0] != self._identity:
                raise UserError(
                    f'{folder} is the beginning of another write ({_differences(read[0], self._identity)}): delete it, or name '
                    'another --to.'
                )
            self.done = {(name, start) for name, start in read[1:]}
        self._file: Any = None
        self._written: list[Part] = []  # and not yet known to be safe
        self._syncing: tuple[concurrent.futures.Future, list[Part]] | None = None
        self._synced = time.monotonic()
        self._pool = concurrent.futures.ThreadPoolExecutor(1)

    def open(self) -> None:
        """Begins the file, in a folder that this process has claimed."""
        with self._path.open('w') as file:
            file.write(''.join(json.dumps(line) + '\n' for line in [self._identity, *sorted(self.done)]))
        self._file = self._path.open('a')

    def add(self, part: Part) -> None:
        """Takes a part that is written; it is noted once a sync in the background has made it safe."""
        self._written.append(part)
        if time.monotonic() - self._synced > _SECONDS_BETWEEN_SYNCS:
            self._note()

    def forget(self) -> None:
        """Notes no more of what was written: it is being removed."""
        self._written.clear()

    def close(self) -> None:
        """Waits until every part is safe and noted."""
        if not self._file.closed:
            self._note(wait=True)
            self._file.close()
        self._pool.shutdown()

    def remove(self) -> None:
        """Deletes the file, when the checkpoint is whole."""
        self._path.unlink()

    def _note(self, *, wait: bool = False) -> None:
        while self._syncing is not None or (wait and self._written):
            if self._syncing is None:
                self._begin_sync()
            future, safe = self._syncing
            if not (wait or future.done()):
                return
            future.result()
            self._file.write(''.join(json.dumps(part) + '\n' for part in safe))
            self._file.flush()
            self._syncing = None
        if self._written:
            self._begin_sync()

    def _begin_sync(self) -> None:
        # All files at once: syncing them one by one is slow for small ones.
        self._syncing, self._written = (self._pool.submit(os.sync), self._written), []
        self._synced = time.monotonic()


def _differences(old: Any, new: Any) -> str:
    names = sorted({*old, *new}) if isinstance(old, dict) else []
    changed = [
        f'{name} is {old.get(name)} there and {new.get(name)} here' for name in names if old.get(name) != new.get(name)
    ]
    return '; '.join(changed) or 'its journal is of another version'
