"""What a trainer asks of its data: one protocol, for text and images alike.

Importing this package is cheap. `text.py` and `images.py` are what gin files import; TensorFlow and seqio are imported,
quietly and without accelerators (`tensorflow_quiet.py`), when a data source that needs them is first used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from upcycle.errors import UserError

if TYPE_CHECKING:
    import numpy as np

JSON: TypeAlias = dict[str, Any] | list[Any] | str | int | float | bool | None


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

    def batches(
        self, start: int = 0, *, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """This host's rows of global batches `start`, `start + 1`, ...

        Host h of P holds the contiguous rows h * B / P up to (h + 1) * B / P of a global batch of B rows. All hosts
        yield equally many batches; a finite source fills its last one with rows of zeros, whose loss weights are zero.
        """
        ...


def rows_per_host(batch_size: int, process_count: int) -> int:
    """Rows of a global batch that each host holds.

    Raises:
        UserError: if the batch does not divide among the hosts.
    """
    if batch_size % process_count:
        raise UserError(
            f'BATCH_SIZE = {batch_size} does not divide among {process_count} hosts: bind a multiple of them.'
        )
    return batch_size // process_count
