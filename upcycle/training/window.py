"""Training metrics between two lines of the log."""

import collections
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from upcycle.training.health import Health

# Steps dispatched ahead of the host, so that devices never wait for it.
_STEPS_UNDER_WAY = 2


class Window:
    """Means of the training metrics since the last line of the log, over the steps that were not skipped.

    Metrics are fetched two steps after they are added, so that steps do not wait. They are summed in order on the host and saved
    with a checkpoint, so that a resumed run logs the same lines as an uninterrupted one.

    Args:
      health: observes every step.
      values: as saved with a checkpoint; None: a new window.
    """

    def __init__(self, health: Health, values: dict[str, Any] | None = None):
        self.values: dict[str, Any] = values or {'count': 0, 'sums': {}}
        self._health = health
        self._pending: collections.deque[Any] = collections.deque()

    def add(self, metrics: Mapping[str, jax.Array]) -> None:
        """Adds the metrics of a step. Waits only for those of earlier steps.

        Raises:
          NotFiniteError, Rollback: see `Health.see`.
        """
        self._pending.append(metrics)
        self._settle(_STEPS_UNDER_WAY)

    def settle(self) -> None:
        """Waits for all steps added so far; raises as `add` does."""
        self._settle(0)

    def taken_under_way(self) -> int | None:
        """Returns the newest step that was under way when `add` or `settle` raised and was not skipped, or None."""
        steps = enumerate(self._pending, self._health.step + 1)
        return max((step for step, metrics in steps if not jax.device_get(metrics['skipped'])), default=None)

    def close(self) -> dict[str, Any]:
        """Returns the means, {} if every step was skipped, and starts a new window."""
        self.settle()
        count = self.values['count']
        means = {name: (np.asarray(value) / count).tolist() for name, value in self.values['sums'].items()}
        self.values = {'count': 0, 'sums': {}}
        return means

    def _settle(self, under_way: int) -> None:
        while len(self._pending) > under_way:
            metrics = jax.device_get(self._pending.popleft())
            if not self._health.see(metrics):
                continue
            sums = self.values['sums']
            for name, value in metrics.items():
                new = np.asarray(value, np.float64) + np.asarray(sums.get(name, 0.0))
                sums[name] = new.tolist()
            self.values['count'] += 1
