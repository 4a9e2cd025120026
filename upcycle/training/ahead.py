"""Reading training batches ahead of their steps."""

from collections.abc import Iterator
from typing import Generic, TypeVar

from upcycle.training.ledger import Timer

Batch = TypeVar('Batch')


class Ahead(Generic[Batch]):
    """Holds the batch after the one in use, so that it is on the devices while the step before it runs.

    Nothing of this is saved: a resumed run reads from the batch of its first step.

    Args:
      batches: reads batches and places them on the devices.
      timer: books the time of reading.
    """

    def __init__(self, batches: Iterator[Batch], timer: Timer):
        self._batches, self._timer = batches, timer
        self._held: list[Batch] = []
        self._error: Exception | None = None

    def prepare(self) -> None:
        """Reads the next batch. An error is raised by `take`, since the steps before it can still be finished and saved."""
        if self._held or self._error is not None:
            return
        self._timer.book('seconds')
        try:
            self._held.append(next(self._batches))
        except Exception as error:
            self._error = error
        self._timer.book_data()

    def take(self) -> Batch:
        """Returns the next batch; reads it if `prepare` has not.

        Raises:
          Exception: that of reading the batch.
        """
        self.prepare()
        if self._error is not None:
            raise self._error
        return self._held.pop()
