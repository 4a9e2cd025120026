"""The accelerators that are known by name, with their vendors' figures."""

import dataclasses
import re
from typing import Any

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip.

    Attributes:
      flops: FLOP/s in bfloat16.
      memory: usable bytes.
      memory_bandwidth: bytes/s.
      network_bandwidth: bytes/s sent over all links, one way.
      cores: on a chip; the paper counts core-days.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    network_bandwidth: float
    cores: int


# cloud.google.com/tpu/docs, system architecture: looked up for v5e and v5p, from memory for the others. v4's usable memory is as
# its compiler reports.
CHIPS = {
    'v2': Chip(45e12, 16 * GiB, 700e9, 248e9, 2),
    'v3': Chip(123e12, 32 * GiB, 900e9, 328e9, 2),
    'v4': Chip(275e12, 30.75 * GiB, 1228e9, 300e9, 2),
    'v5e': Chip(197e12, 16 * GiB, 819e9, 200e9, 1),
    'v5p': Chip(459e12, 95 * GiB, 2765e9, 600e9, 2),
    'v6e': Chip(918e12, 32 * GiB, 1640e9, 448e9, 1),
}
# JAX's names of TPUs.
_TPUS = {
    'TPU v2': 'v2',
    'TPU v3': 'v3',
    'TPU v4': 'v4',
    'TPU v5 lite': 'v5e',
    'TPU v5e': 'v5e',
    'TPU v5': 'v5p',
    'TPU v5p': 'v5p',
    'TPU v6 lite': 'v6e',
    'TPU v6e': 'v6e',
}
# Words in the names of GPUs, and FLOP/s in bfloat16 without sparsity. From memory of the data sheets.
_GPUS = {
    'GB200': 2500e12,
    'B200': 2250e12,
    'GH200': 989e12,
    'H200 NVL': 835e12,
    'H200': 989e12,
    'H100 NVL': 835e12,
    'H100 PCIe': 756e12,
    'H100': 989e12,
    'A100': 312e12,
    'L40S': 362e12,
    'L4': 121e12,
    'A10': 125e12,
}


def peak_flops(device: Any) -> float | None:
    """Returns the FLOP/s in bfloat16 of a JAX device at its peak; None for a CPU, a part of a GPU, and unknown names.

    On some TPUs a device is a core, half of a chip.
    """
    kind = device.device_kind
    if device.platform == 'tpu':
        chip = CHIPS.get(_TPUS.get(kind, ''))
        return None if chip is None else chip.flops * min(device.num_cores / chip.cores, 1.0)
    if device.platform != 'gpu' or re.search(r'\bMIG\b', kind):
        return None
    return next((flops for words, flops in _GPUS.items() if re.search(rf'\b{words}\b', kind)), None)
