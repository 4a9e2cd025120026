"""The device that is checked."""

import dataclasses
import resource

import jax

from upcycle import platforms
from upcycle.compile import CHIPS

# Dense FLOP/s in bfloat16, by a part of the device's name: vendors' figures. TPUs are in `upcycle.compile.CHIPS`.
_GPUS = {
    'GB200': 2500e12, 'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12,
    'L4': 121e12, 'A10': 125e12, 'V100': 125e12,
}  # fmt: skip
_TPUS = {
    'v6 lite': 'v6e',
    'v6e': 'v6e',
    'v5 lite': 'v5e',
    'v5e': 'v5e',
    'v5p': 'v5p',
    'v5': 'v5p',
    'v4': 'v4',
    'v3': 'v3',
}


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
    kind = local[0].device_kind
    table = _TPUS if local[0].platform == 'tpu' else _GPUS
    found = next((value for part, value in table.items() if part in kind), None)
    peak = CHIPS[found].flops if isinstance(found, str) else found
    return Device(local[0].platform, kind, len(local), _statistic('bytes_limit'), peak)


def peak_bytes() -> int:
    """Returns the most memory that this process has held on its device, or on a CPU in all."""
    on_device = _statistic('peak_bytes_in_use')
    return on_device or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _statistic(name: str) -> int | None:
    return (jax.local_devices()[0].memory_stats() or {}).get(name)
