"""Training metrics between two lines of the log."""

import collections
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from upcycle.training.health import Health

# Steps that are dispatched before the host waits for one, so that the devices never wait for the host.
_STEPS_UNDER_WAY = 2


class Window:
    """Means of the training metrics since the last line of the log, over the steps that were not skipped.

    What has been added is fetched two steps later, so that steps are not held up; it is added up in order on the host, and saved
    with a checkpoint, so that a resumed run's lines are those of an uninterrupted one.

    Args:
      health: sees every step.
      values: as saved; None: a window begins.
    """

    def __init__(self, health: Health, values: dict[str, Any] | None = None):
        self.values: dict[str, Any] = values or {'count': 0, 'sums': {}}
        self._health = health
        self._pending: collections.deque[Any] = collections.deque()

    def add(self, metrics: Mapping[str, jax.Array]) -> None:
        """Takes one step's metrics, without waiting for them, but for those of earlier steps.

        Raises:
          NotFiniteError, Rollback: see `Health.see`.
        """
        self._pending.append(metrics)
        self._settle(_STEPS_UNDER_WAY)

    def settle(self) -> None:
        """Waits for the steps added so far; raises as `add` does."""
        self._settle(0)

    def taken_under_way(self) -> int | None:
        """The newest step that was under way when `add` or `settle` raised, and was not skipped; None: there is none."""
        steps = enumerate(self._pending, self._health.step + 1)
        return max((step for step, metrics in steps if not jax.device_get(metrics['skipped'])), default=None)

    def close(self) -> dict[str, Any]:
        """The means, none where every step was skipped; the window starts again."""
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
