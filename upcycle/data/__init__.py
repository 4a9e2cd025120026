"""The protocol between a trainer and its data, for text and images.

Importing this package is cheap. Gin files import `text.py` and `images.py`. TensorFlow and seqio are imported by
`tensorflow_quiet.py`, without log lines or accelerators, when a data source first needs them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from upcycle.errors import UserError

JSON: TypeAlias = dict[str, Any] | list[Any] | str | int | float | bool | None


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows of each global batch that a host reads.

    A batch is cut into `of` equal parts, as on the mesh. Hosts that hold the same part are one reader and read the same
    rows. All readers read the same number of parts.

    Attributes:
      index: number of the reader.
      count: number of readers.
      parts: parts that the reader reads, ascending, not necessarily consecutive.
      of: number of parts of a batch.
    """

    index: int = 0
    count: int = 1
    parts: tuple[int, ...] = (0,)
    of: int = 1

    @classmethod
    def even(cls, index: int, count: int) -> Share:
        """The share of reader `index` of `count` readers that read one part each."""
        return cls(index, count, (index,), count)

    def rows(self, batch_size: int) -> list[range]:
        """Row numbers in the global batch, as ascending runs of consecutive rows.

        Raises:
          UserError: the batch size is not a multiple of the parts.
        """
        if batch_size % self.of:
            raise UserError(
                f'BATCH_SIZE = {batch_size} is not divisible by the {self.of} parts that the hosts read: set it to a '
                f'multiple of {self.of}.'
            )
        size = batch_size // self.of
        runs: list[range] = []
        for part in self.parts:
            first = runs.pop().start if runs and runs[-1].stop == part * size else part * size
            runs.append(range(first, (part + 1) * size))
        return runs


WHOLE = Share()
"""All rows, for a single reader."""


def require_lengths(task_feature_lengths: Mapping[str, int]) -> None:
    """Raises UserError unless TASK_FEATURE_LENGTHS has 'inputs' and 'targets', as an encoder-decoder needs."""
    if not {'inputs', 'targets'} <= task_feature_lengths.keys():
        raise UserError(f"TASK_FEATURE_LENGTHS = {dict(task_feature_lengths)!r} must have both 'inputs' and 'targets'.")


@runtime_checkable
class DataSource(Protocol):
    """An endless or finite sequence of batches that any number of hosts can read from any position.

    A source may also have `target_bytes(batch)`, for bits per byte; see `causal.Tokens`.
    """

    batch_size: int
    """Rows of a global batch, summed over all hosts."""

    def fingerprint(self) -> dict[str, JSON]:
        """The identity of the data: task, split, corpus hash, lengths, seed, vocabulary, batch size, ...

        It is saved with every checkpoint, and the trainer refuses to resume if it differs. It does not depend on the
        machine: it holds no paths and no number of hosts.
        """
        ...

    def promise(self) -> str:
        """One sentence that states which determinism holds."""
        ...

    def batch_spec(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of every feature of a *global* batch."""
        ...

    def batches(self, start: int = 0, share: Share = WHOLE) -> Iterator[dict[str, np.ndarray]]:
        """Yields the rows `share.rows(batch_size)` of global batches `start`, `start + 1`, ...

        All shares yield the same number of batches. A finite source pads its last batch with rows of zeros, whose loss
        weights are 0. A random-access source gives the same global batches for any number of readers; a stream is dealt
        out to `share.count` readers, so its batches depend on their number.
        """
        ...


def of_run(data: DataSource, first_step: int) -> tuple[DataSource, int]:
    """Returns the data of a run that starts from a checkpoint of that step, and the number of its first batch.

    A run's batches have the numbers of its steps, so that a continuation reads on where the dense run stopped. A stream, whose
    batches before a position must be read to reach it, is read from its beginning instead, with a seed of its first step.
    """
    if first_step == 0 or not getattr(data, 'streamed', False):
        return data, 0
    seed = int(np.random.SeedSequence([data.seed, first_step]).generate_state(1)[0] >> 1)
    return dataclasses.replace(data, seed=seed), first_step
