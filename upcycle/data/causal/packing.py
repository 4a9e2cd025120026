"""Packs documents into rows of one length. A row is a pure function of its number; nothing is read in order.

The documents of a split, each with its BOS if there is one, form one stream of input positions; a row is a range of it. The
target of a position is the next token of its document, or EOS after the last one.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from upcycle.data.causal.shards import Arrays, Corpus


class Specials(NamedTuple):
    """The tokens that are added to a document: before its first and after its last token; None: none."""

    bos_id: int | None
    eos_id: int | None


@dataclasses.dataclass(frozen=True)
class Stream:
    """The input positions of a corpus.

    Attributes:
      corpus: the documents.
      specials: added to each document.
    """

    corpus: Corpus
    specials: Specials

    @property
    def _bos(self) -> int:
        return int(self.specials.bos_id is not None)

    @functools.cached_property
    def _starts(self) -> list[int]:
        """The first position of each shard, and the end of the last."""
        sizes = [len(shard.tokens) + self._bos * len(shard.ends) for shard in self.corpus.shards]
        return [0, *np.cumsum(sizes, dtype=np.int64).tolist()]

    def __len__(self) -> int:
        """The number of positions."""
        return self._starts[-1]

    def ends(self) -> np.ndarray:
        """int64 [documents]: the position after each document. In memory: 8 bytes per document."""
        parts = [
            start + shard.ends + self._bos * np.arange(1, len(shard.ends) + 1)
            for start, shard in zip(self._starts, self.corpus.shards, strict=False)
        ]
        return np.concatenate(parts or [np.zeros(0, np.int64)])

    def read(self, start: int, count: int, length: int) -> dict[str, np.ndarray]:
        """Reads a row.

        Args:
          start: its first position; positions after the last one begin again at 0.
          count: number of positions, at most `len(self)`.
          length: of the row; what is left is padding.

        Returns:
          `tokens`, `targets`, `segment_ids` (1, 2, ...; 0: padding), int32 [length], and `loss_weights`, float32 [length].
        """
        row = {name: np.zeros(length, np.int32) for name in ('tokens', 'targets', 'segment_ids')}
        row['loss_weights'] = np.zeros(length, np.float32)
        done = segment = 0
        for shard, first, last in self._ranges(start, count):
            part = slice(done, done + last - first)
            tokens, targets, weights, documents = self._read(shard, first, last)
            row['tokens'][part], row['targets'][part], row['loss_weights'][part] = tokens, targets, weights
            row['segment_ids'][part] = segment + 1 + documents
            done, segment = part.stop, segment + 1 + int(documents[-1])
        return row

    def _ranges(self, start: int, count: int) -> Iterator[tuple[Arrays, int, int]]:
        """The shards, and the ranges of positions in them, of a range of the stream."""
        while count > 0:
            start %= len(self)
            number = bisect.bisect_right(self._starts, start) - 1
            first = start - self._starts[number]
            last = min(first + count, self._starts[number + 1] - self._starts[number])
            yield self.corpus.shards[number], first, last
            start, count = start + last - first, count - (last - first)

    def _read(self, shard: Arrays, first: int, last: int) -> tuple[np.ndarray, ...]:
        """Tokens, targets, weights, and the number of each position's document, counted from the first one's."""
        bos, ends = self._bos, shard.ends

        def end_of(document: int) -> int:
            return int(ends[document]) + bos * (document + 1)

        document = bisect.bisect_right(range(len(ends)), first, key=end_of)
        stop = document + 1
        while end_of(stop - 1) < last:
            stop = min(2 * stop - document, len(ends))
        end_d = ends[document:stop] + bos * np.arange(document + 1, stop + 1)
        begin_d = np.append(end_of(document - 1) if document else 0, end_d[:-1])
        position = np.arange(first, last)
        d = np.searchsorted(end_d, position, side='right')
        # Of a document's tokens; a BOS is before the first.
        index = position - bos * (document + d + 1)
        low, high = max(int(index[0]), 0), min(int(index[-1]) + 2, len(shard.tokens))
        raw = np.asarray(shard.tokens[low:high]).astype(np.int32)
        tokens, targets = raw[np.clip(index - low, 0, len(raw) - 1)], raw[np.clip(index + 1 - low, 0, len(raw) - 1)]
        weights = np.ones(last - first, np.float32)
        if shard.loss is not None:
            loss = np.asarray(shard.loss[low:high])
            weights = loss[np.clip(index + 1 - low, 0, len(loss) - 1)].astype(np.float32)
        if bos:
            tokens[position == begin_d[d]] = self.specials.bos_id
        is_last = position + 1 == end_d[d]
        has_eos = self.specials.eos_id is not None
        targets[is_last], weights[is_last] = (self.specials.eos_id, 1.0) if has_eos else (0, 0.0)
        return tokens, targets, weights, d


class Rows:
    """The rows of a stream: `len` of them per epoch, each (first position, number of positions).

    Args:
      stream: the stream.
      length: positions per row.
      whole: how documents are cut. False: the stream is cut every `length` positions, and a document that is cut continues as a
        new segment of the next row. True: a row ends with the last document that fits, and the rest is padding; only documents
        longer than a row are cut.
      cover: whether an epoch has every position, in a last row with padding.
    """

    def __init__(self, stream: Stream, length: int, *, whole: bool, cover: bool):
        self.stream, self.length = stream, length
        self._starts = _whole_documents(stream.ends(), length) if whole else None
        if self._starts is not None:
            self._count = len(self._starts) - 1
        else:
            self._count = -(-len(stream) // length) if cover else len(stream) // length

    def __len__(self) -> int:
        return self._count

    def read(self, row: int, phase: int = 0) -> dict[str, np.ndarray]:
        """Reads a row; see `Stream.read`.

        Args:
          row: its number in the epoch.
          phase: position at which the stream begins in this epoch; ignored where documents are whole.
        """
        if self._starts is not None:
            start = int(self._starts[row])
            return self.stream.read(start, int(self._starts[row + 1]) - start, self.length)
        start = row * self.length
        return self.stream.read(start + phase, min(self.length, len(self.stream) - start), self.length)


def _whole_documents(ends: np.ndarray, length: int) -> np.ndarray:
    """int64 [rows + 1]: the first position of each row, and the end of the last.

    Documents fill a row in their order; the next document that does not fit begins the next row.
    """
    starts: Sequence[int] = [0]
    last = int(ends[-1]) if len(ends) else 0
    while starts[-1] < last:
        limit = starts[-1] + length
        fitting = int(np.searchsorted(ends, limit, side='right'))
        end = int(ends[fitting - 1]) if fitting else 0
        starts.append(end if end > starts[-1] else limit)
    return np.array(starts, np.int64)
