"""The journal of a write to a local disk, from which the same command continues after an interruption."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from upcycle.errors import UserError

FILE = 'journal.jsonl'
Part = tuple[str, int]  # name of the leaf, first row

_SECONDS_BETWEEN_SYNCS = 5.0


class Journal:
    """A file with the identity of the write, then a line for each part that would survive a crash of the machine.

    If the disk refuses a line, the part is written again by the next attempt.

    Args:
      folder: the folder that is written.
      identity: JSON that identifies source and result.

    Attributes:
      done: the parts recorded by an earlier attempt.

    Raises:
      UserError: the folder holds another interrupted write.
    """

    def __init__(self, folder: epath.Path, identity: Mapping[str, Any]):
        self._path = folder / FILE
        self._identity = json.loads(json.dumps(dict(identity)))
        self.done: set[Part] = set()
        if folder.exists():
            lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
            # The part of a torn last line is written again.
            read = [json.loads(line) for line in lines if line.endswith('\n')]
            if read and read[0] != self._identity:
                raise UserError(
                    f'{folder} holds another interrupted write ({_differences(read[0], self._identity)}): delete it, or name '
                    'another --to.'
                )
            self.done = {(name, start) for name, start in read[1:]}
        self._file: Any = None
        self._written: list[Part] = []  # not yet known to be on disk
        self._recording: concurrent.futures.Future | None = None
        self._synced = time.monotonic()
        self._pool = concurrent.futures.ThreadPoolExecutor(1)

    def open(self) -> None:
        """Opens the file; this process must have claimed the folder."""
        with self._path.open('w') as file:
            file.write(''.join(json.dumps(line) + '\n' for line in [self._identity, *sorted(self.done)]))
        self._file = self._path.open('a')

    def add(self, part: Part) -> None:
        """Adds a written part, which is recorded after a background sync."""
        self._written.append(part)
        is_idle = self._recording is None or self._recording.done()
        if is_idle and time.monotonic() - self._synced > _SECONDS_BETWEEN_SYNCS:
            self._record()

    def forget(self) -> None:
        """Drops parts that are not recorded yet, because they are being removed."""
        self._written.clear()

    def close(self) -> None:
        """Waits until every part is on disk and recorded."""
        if not self._file.closed:
            if self._written:
                self._record()
            if self._recording is not None:
                self._recording.result()
            with contextlib.suppress(OSError):
                self._file.close()
        self._pool.shutdown()

    def remove(self) -> None:
        """Deletes the file of a complete checkpoint."""
        self._path.unlink()

    def _record(self) -> None:
        """Begins to record the written parts, after the end of an earlier recording."""
        if self._recording is not None:
            self._recording.result()
        parts, self._written = self._written, []

        def sync_and_record() -> None:
            os.sync()  # of the whole system: syncing small files one by one is slow
            with contextlib.suppress(OSError):
                self._file.write(''.join(json.dumps(part) + '\n' for part in parts))
                self._file.flush()

        self._recording = self._pool.submit(sync_and_record)
        self._synced = time.monotonic()


def _differences(old: Any, new: Any) -> str:
    names = sorted({*old, *new}) if isinstance(old, dict) else []
    changed = [f'{name} is {old.get(name)}, now {new.get(name)}' for name in names if old.get(name) != new.get(name)]
    return '; '.join(changed) or 'by another version of upcycle'
