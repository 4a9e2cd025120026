"""The cost of a run: time by activity, floating-point operations, tokens."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from upcycle import cost
from upcycle.chips import peak_flops
from upcycle.log_lines import PER_DEVICE
from upcycle.models import BatchSpec, Model


@dataclasses.dataclass
class Ledger:
    """The cost of a run, and the sunk cost of the dense checkpoint that it started from.

    Attributes:
      start_step: step of the first state.
      seconds: time in training steps of this run, including waiting for data (not compiling, evaluating or saving).
      data_seconds: the part of `seconds` in which no step was under way because the next batch was not ready.
      evaluation_seconds: time between steps in evaluators.
      checkpoint_seconds: time between steps in which a save blocked the run.
      flops: of this run's training steps, by `cost.py`.
      tokens: in the batches of these steps, padding included.
      sunk_seconds, sunk_flops: of the checkpoint it started from; 0 if unknown or from scratch.
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
        """Returns the cost for a line of the log. Core-days are estimated: those of its FLOPs on TPU v4."""
        derived = {
            'device_seconds': self.seconds * num_devices,
            'estimated_core_days': cost.core_days(self.flops, cost.TPU_V4_CORE, cost.UTILIZATION),
        }
        if self.sunk_flops:
            derived['percent_of_sunk_flops'] = 100.0 * self.flops / self.sunk_flops
        return dataclasses.asdict(self) | derived

    def start_from(self, step: int, metadata: Mapping[str, Any], flops: float | None = None) -> None:
        """Sets the sunk cost to a checkpoint's whole cost, or to `flops` if its metadata does not hold one."""
        spent = metadata.get('cost', {})
        self.start_step = step
        self.sunk_seconds = spent.get('seconds', 0.0) + spent.get('sunk_seconds', 0.0)
        self.sunk_flops = spent.get('flops', 0.0) + spent.get('sunk_flops', 0.0) or flops or 0.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What a training step does, for the figures of speed in the log.

    Attributes:
      unit: what a family counts, such as 'token'.
      units: of a step's batch, padding included.
      flops: of a step on all devices, by `cost.py`.
      devices: of the mesh.
      peak: FLOP/s of one device; None if unknown, as of a CPU.
    """

    unit: str
    units: int
    flops: float
    devices: int
    peak: float | None

    @classmethod
    def of(cls, model: Model, batch_spec: BatchSpec, mesh: Mesh) -> 'Work':
        """Returns that of a model's steps over such batches."""
        peak = peak_flops(mesh.devices.flat[0])
        return cls(model.unit, model.num_units(batch_spec), cost.step_flops(model, batch_spec), mesh.size, peak)

    def speed(self, steps: int, seconds: float, waiting: float) -> dict[str, float]:
        """Returns the speed of some steps for a line of the log.

        Args:
          steps: their number.
          seconds: that they took, including waiting for data.
          waiting: the part of `seconds` in which devices waited for data.

        Returns:
          `steps_per_second`; `device_busy`, the share of the time in which a step was under way; units a second and device; and
          `mfu`, the share of the peak that the model's FLOPs are, if the peak is known. Without time only the first, 0.
        """
        if seconds <= 0:
            return {'steps_per_second': 0.0}
        rate = steps / seconds
        figures = {
            'steps_per_second': rate,
            'device_busy': 1.0 - waiting / seconds,
            f'{self.unit}s{PER_DEVICE}': rate * self.units / self.devices,
        }
        return figures if self.peak is None else figures | {'mfu': rate * self.flops / (self.devices * self.peak)}

    def shown(self, speed: Mapping[str, float]) -> list[str]:
        """Returns parts of a progress line."""
        parts = []
        if (units := speed.get(f'{self.unit}s{PER_DEVICE}')) is not None:
            parts = [f'{units:,.{0 if units >= 100 else 1}f} {self.unit}s/s/device', f'busy {speed["device_busy"]:.0%}']
        return parts + ([f'MFU {speed["mfu"]:.1%}'] if 'mfu' in speed else [])


class Timer:
    """Adds the time between its calls to the ledger."""

    def __init__(self, ledger: Ledger, step: int, clock: Callable[[], float] = time.monotonic):
        self._ledger, self._clock = ledger, clock
        self._last = step, ledger.seconds, ledger.data_seconds
        self._since = clock()
        # Waits for the newest step: the main thread, waiting for data, would not learn when it finished.
        self._watcher = concurrent.futures.ThreadPoolExecutor(1)
        self._finished: concurrent.futures.Future[float] | None = None

    def __enter__(self) -> 'Timer':
        return self

    def __exit__(self, *_: object) -> None:
        self._watcher.shutdown(wait=False, cancel_futures=True)

    def under_way(self, metrics: Any) -> None:
        """Notes that a step has begun; it is finished when its metrics are ready."""
        self._finished = self._watcher.submit(lambda: jax.block_until_ready(metrics) and self._clock())

    def book(self, *accounts: str) -> None:
        """Adds the time since the last call to these fields of the ledger; without fields, drops it."""
        now = self._clock()
        for account in accounts:
            setattr(self._ledger, account, getattr(self._ledger, account) + now - self._since)
        self._since = now

    def book_data(self) -> None:
        """Adds the time since the last call, spent on a batch; the devices waited for it once no step was under way."""
        now = self._clock()
        if self._finished is None:
            self._ledger.data_seconds += now - self._since
        elif self._finished.done():
            self._ledger.data_seconds += max(0.0, now - max(self._since, self._finished.result()))
        self.book('seconds')

    def since_last(self, step: int) -> tuple[int, float, float]:
        """Returns the steps since the last call, their seconds, and how many of these devices waited for data."""
        now = step, self._ledger.seconds, self._ledger.data_seconds
        steps, seconds, waiting = (new - old for new, old in zip(now, self._last, strict=True))
        self._last = now
        return steps, seconds, waiting
