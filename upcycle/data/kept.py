"""Caches small data sources that are read repeatedly, such as evaluation data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from upcycle.data import WHOLE, DataSource, Share

LIMIT = 256 * 2**20
"""Default cache size, in bytes of host memory."""


class Kept:
    """Keeps the batches of a finite source in memory after the first full pass, unless they exceed `limit` bytes."""

    def __init__(self, source: DataSource, limit: int = LIMIT):
        self._source = source
        self._limit = limit
        self._kept: dict[tuple[int, Share], list[dict[str, np.ndarray]] | None] = {}

    def batches(self, start: int = 0, share: Share = WHOLE) -> Iterator[dict[str, np.ndarray]]:
        """Yields the batches of the source; see `DataSource.batches`. Do not modify them."""
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
