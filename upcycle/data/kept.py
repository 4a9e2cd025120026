"""A source that is read again and again, as for evaluation: read once where it is small."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from upcycle.data import WHOLE, DataSource, Share

LIMIT = 256 * 2**20
"""Bytes of host memory."""


class Kept:
    """The batches of a finite source, kept in memory from the first whole pass on; above `limit` bytes they are made anew."""

    def __init__(self, source: DataSource, limit: int = LIMIT):
        self._source = source
        self._limit = limit
        self._kept: dict[tuple[int, Share], list[dict[str, np.ndarray]] | None] = {}

    def batches(self, start: int = 0, share: Share = WHOLE) -> Iterator[dict[str, np.ndarray]]:
        """Those of the source; see `DataSource.batches`. They are for reading only."""
        key = start, share
        if (kept := self._kept.get(key)) is not None:
            yield from kept
            return
        so_far: list[dict[str, np.ndarray]] = []
        size, fits = 0, key not in self._kept
        for batch in self._source.batches(start, share=share):
            size += sum(rows.nbytes for rows in batch.values())
            fits = fits and size <= self._limit
            if fits:
                so_far.append(batch)
            else:
                so_far.clear()
            yield batch
        self._kept[key] = so_far if fits else None
