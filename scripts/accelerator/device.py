"""The device that is checked."""

import dataclasses
import resource

import jax

from upcycle import platforms
from upcycle.chips import peak_flops


class LeftOutError(Exception):
    """A row does not apply to this device; the message says why."""


@dataclasses.dataclass(frozen=True)
class Device:
    """One of the devices, and how many there are.

    Attributes:
      platform: 'cpu', 'gpu' or 'tpu'.
      kind: the vendor's name.
      count: devices of this process.
      memory: bytes that JAX may use; None if it does not say, as on CPUs.
      peak: FLOP/s in bfloat16; None if unknown.
    """

    platform: str
    kind: str
    count: int
    memory: int | None
    peak: float | None

    @property
    def toy(self) -> bool:
        """Whether models have toy sizes: on CPUs, where times mean nothing."""
        return self.platform == 'cpu'


def this_device() -> Device:
    """Describes the first device of this process."""
    platforms.devices()
    local = jax.local_devices()
    return Device(local[0].platform, local[0].device_kind, len(local), _statistic('bytes_limit'), peak_flops(local[0]))


def peak_bytes() -> int:
    """Returns the most memory that this process has held on its device, or on a CPU in all."""
    on_device = _statistic('peak_bytes_in_use')
    return on_device or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _statistic(name: str) -> int | None:
    return (jax.local_devices()[0].memory_stats() or {}).get(name)
