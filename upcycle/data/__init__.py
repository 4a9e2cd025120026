"""What a trainer asks of its data: one protocol, for text and images alike.

Importing this package is cheap. `text.py` and `images.py` are what gin files import; TensorFlow and seqio are imported,
quietly and without accelerators (`tensorflow_quiet.py`), when a data source that needs them is first used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from upcycle.errors import UserError

if TYPE_CHECKING:
    import numpy as np

JSON: TypeAlias = dict[str, Any] | list[Any] | str | int | float | bool | None


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows of every global batch that a host reads.

    A batch is cut into `of` equal parts, as the mesh does it. Hosts that hold a part in common are one reader: all of them
    read the same rows. Every reader reads equally many parts.

    Attributes:
        index: number of the reader.
        count: of readers.
        parts: that it reads, ascending; they need not follow each other.
        of: parts of a batch.
    """

    index: int = 0
    count: int = 1
    parts: tuple[int, ...] = (0,)
    of: int = 1

    @classmethod
    def even(cls, index: int, count: int) -> Share:
        """Of `count` readers, each of which reads one part."""
        return cls(index, count, (index,), count)

    def rows(self, batch_size: int) -> list[range]:
        """Numbers of the rows in the global batch, ascending: runs of consecutive rows.

        Raises:
            UserError: if the batch does not divide.
        """
        if batch_size % self.of:
            raise UserError(
                f'BATCH_SIZE = {batch_size} does not divide into the {self.of} parts that the hosts read: bind a multiple of '
                'them.'
            )
        size = batch_size // self.of
        runs: list[range] = []
        for part in self.parts:
            first = runs.pop().start if runs and runs[-1].stop == part * size else part * size
            runs.append(range(first, (part + 1) * size))
        return runs


WHOLE = Share()
"""All rows, for the only reader."""


def require_lengths(task_feature_lengths: Mapping[str, int]) -> None:
    """Raises UserError unless TASK_FEATURE_LENGTHS has the lengths that an encoder-decoder needs."""
    if not {'inputs', 'targets'} <= task_feature_lengths.keys():
        raise UserError(
            f"TASK_FEATURE_LENGTHS = {dict(task_feature_lengths)!r} must name the lengths of both 'inputs' and 'targets'."
        )


@runtime_checkable
class DataSource(Protocol):
    """An endless or finite sequence of batches that any number of hosts can read from any position."""

    batch_size: int
    """Rows of a global batch, over all hosts."""

    def fingerprint(self) -> dict[str, JSON]:
        """What the batches are made of: task, split, corpus hash, lengths, seed, vocabulary, batch size, ...

        It is saved with every checkpoint. A resume whose fingerprint differs would train on other data than it says,
        and the trainer refuses it. It names nothing about the machine: no paths, no number of hosts.
        """
        ...

    def promise(self) -> str:
        """One sentence: which determinism holds."""
        ...

    def batch_spec(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The shape and dtype of every feature of a *global* batch."""
        ...

    def batches(self, start: int = 0, share: Share = WHOLE) -> Iterator[dict[str, np.ndarray]]:
        """The rows `share.rows(batch_size)` of global batches `start`, `start + 1`, ..., in that order.

        All shares yield equally many batches; a finite source fills its last one with rows of zeros, whose loss weights are
        zero. A random-access source gives the same global batches however they are shared. A stream is dealt to the
        `share.count` readers, so its batches depend on their number.
        """
        ...
