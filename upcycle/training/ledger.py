"""What a run costs: time by activity, floating-point operations, tokens."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from upcycle import cost


@dataclasses.dataclass
class Ledger:
    """What the run has cost, and what the dense checkpoint that it started from had cost before.

    Attributes:
      start_step: step of the first state.
      seconds: spent in training steps of this run, waiting for their data included (not compiling, evaluating or saving).
      data_seconds: of these, waiting for the next batch while no step was under way.
      evaluation_seconds: between steps, in evaluations and other looks at the model.
      checkpoint_seconds: between steps, until a save let the run go on.
      flops: of this run's training steps, by `cost.py`.
      tokens: in the batches of these steps, padding included.
      sunk_seconds, sunk_flops: of the checkpoint it started from; 0 when unknown or from scratch.
    """

    start_step: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    sunk_seconds: float = 0.0
    sunk_flops: float = 0.0
    data_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    tokens: float = 0.0

    def for_the_log(self, num_devices: int) -> dict[str, float]:
        """What every line of the log says of the cost. Core-days are an estimate: what its FLOPs would take on TPU v4."""
        derived = {
            'device_seconds': self.seconds * num_devices,
            'estimated_core_days': cost.core_days(self.flops, cost.TPU_V4_CORE, cost.UTILIZATION),
        }
        if self.sunk_flops:
            derived['percent_of_sunk_flops'] = 100.0 * self.flops / self.sunk_flops
        return dataclasses.asdict(self) | derived

    def start_from(self, step: int, metadata: Mapping[str, Any], flops: float | None = None) -> None:
        """Books a dense checkpoint's whole cost as sunk; `flops`: of one that does not say what it had cost."""
        spent = metadata.get('cost', {})
        self.start_step = step
        self.sunk_seconds = spent.get('seconds', 0.0) + spent.get('sunk_seconds', 0.0)
        self.sunk_flops = spent.get('flops', 0.0) + spent.get('sunk_flops', 0.0) or flops or 0.0


class Timer:
    """Books the time between its calls in the ledger."""

    def __init__(self, ledger: Ledger, step: int, clock: Callable[[], float] = time.monotonic):
        self._ledger, self._clock = ledger, clock
        self._seconds, self._step = ledger.seconds, step
        self._since = clock()
        # Waits for the newest step, since only a thread learns when it was finished while this one waits for data.
        self._watcher = concurrent.futures.ThreadPoolExecutor(1)
        self._finished: concurrent.futures.Future[float] | None = None

    def __enter__(self) -> 'Timer':
        return self

    def __exit__(self, *_: object) -> None:
        self._watcher.shutdown(wait=False, cancel_futures=True)

    def under_way(self, metrics: Any) -> None:
        """A step has begun; it is finished when its metrics are there."""
        self._finished = self._watcher.submit(lambda: jax.block_until_ready(metrics) and self._clock())

    def book(self, *accounts: str) -> None:
        """The time since the last call, in each of these fields of the ledger; in none, it is forgotten."""
        now = self._clock()
        for account in accounts:
            setattr(self._ledger, account, getattr(self._ledger, account) + now - self._since)
        self._since = now

    def book_data(self) -> None:
        """The time since the last call was spent on a batch; it was waited for from when no step was under way any more."""
        now = self._clock()
        if self._finished is None:
            self._ledger.data_seconds += now - self._since
        elif self._finished.done():
            self._ledger.data_seconds += max(0.0, now - max(self._since, self._finished.result()))
        self.book('seconds')

    def rate(self, step: int) -> float:
        """Steps a second since the last call."""
        seconds = self._ledger.seconds - self._seconds
        steps = step - self._step
        self._seconds, self._step = self._ledger.seconds, step
        return steps / seconds if seconds > 0 else 0.0
