"""The rows and batches of packed documents as grain datasets: random access, shuffled and mixed by index.

Row i of a shuffled dataset is a pure function of (seed, i), so a run resumes at any row, and any number of hosts read the same
global batches. Importing this module imports grain.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from upcycle.data import draws
from upcycle.data.causal.packing import Rows

Batch = dict[str, np.ndarray]
# Batches read ahead of the caller, on threads.
_AHEAD = 2


class PackedRows(grain.MapDataset):
    """The rows of one corpus. Index i is row `i % len(self)` of epoch `i // len(self)`.

    Args:
      rows: the packing.
      seed: seed of the phases: each epoch cuts the stream elsewhere. None: all epochs begin at the first position.
    """

    def __init__(self, rows: Rows, seed: int | None):
        super().__init__()
        self._rows, self._seed = rows, seed

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice) -> Batch:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, row = divmod(index, len(self))
        return self._rows.read(row, self._phase(epoch))

    def _phase(self, epoch: int) -> int:
        if self._seed is None:
            return 0
        return int(draws.words(self._seed, draws.PHASE, epoch, 1, 1)[0, 0] % np.uint64(len(self._rows.stream)))


def dataset(
    corpora: Sequence[Rows], weights: Sequence[float], seed: int, *, shuffle: bool, repeat: bool
) -> grain.MapDataset:
    """The rows of a mixture.

    Args:
      corpora: the rows of each corpus.
      weights: their shares of the rows, which need not add up to 1.
      seed: seed of the orders and phases, each a function of the seed and the corpus's number.
      shuffle: draw an order of rows for every epoch of each corpus; with `repeat` also a phase.
      repeat: endless. False: every row at most once; a mixture ends with the first corpus that ends.
    """
    mixed = []
    for number, rows in enumerate(corpora):
        own = int(draws.words(seed, draws.PHASE, number, 1, 1)[0, 0])
        one: grain.MapDataset = PackedRows(rows, own if shuffle and repeat else None)
        if shuffle:
            one = one.shuffle(seed=own % 2**32)
        mixed.append(one.repeat() if repeat else one)
    return mixed[0] if len(mixed) == 1 else grain.MapDataset.mix(mixed, weights)


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Rows of batches `start` to `stop`, stacked; rows after the last one are zeros. A source for grain."""

    rows: grain.MapDataset
    batch_size: int
    own: tuple[int, ...]
    start: int
    stop: int

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)

    def __getitem__(self, index: int) -> Batch:
        first = (self.start + index) * self.batch_size
        found = [self.rows[first + row] for row in self.own if first + row < len(self.rows)]
        template = found[0] if found else self.rows[0]
        batch = {}
        for name, value in template.items():
            batch[name] = np.zeros((len(self.own), *value.shape), value.dtype)
            for i, row in enumerate(found):
                batch[name][i] = row[name]
        return batch


def batches(
    rows: grain.MapDataset, batch_size: int, own: Sequence[int], start: int, stop: int | None
) -> Iterator[Batch]:
    """Yields a reader's rows of global batches `start` to `stop`, read ahead.

    Args:
      rows: the dataset.
      batch_size: rows of a global batch.
      own: the reader's rows of each, ascending.
      start, stop: numbers of batches; None: endless.
    """
    source = _Batches(rows, batch_size, tuple(own), start, sys.maxsize if stop is None else stop)
    options = grain.ReadOptions(num_threads=_AHEAD, prefetch_buffer_size=_AHEAD)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))
