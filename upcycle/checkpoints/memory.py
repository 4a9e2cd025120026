"""A reader of parameters in memory."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from upcycle import partitioning
from upcycle.checkpoints.views import Region


class MemoryReader:
    """See `upcycle.checkpoints.Reader`. Results share no memory with the arrays on the devices.

    Args:
      leaves: arrays by their names in a checkpoint ('params/...'). `jax.ShapeDtypeStruct`s suffice for a plan.
      step: training steps taken; None if unknown.
    """

    format = 'memory'
    path = 'memory'
    metadata: Mapping[str, Any] = {}

    def __init__(self, leaves: Mapping[str, Any], step: int | None = None):
        self._leaves, self.step = leaves, step

    def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `Reader`."""
        return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in self._leaves.items()}

    def read(
        self, name: str, sharding: jax.sharding.Sharding | None = None, dtype: Any = None, region: Region = ()
    ) -> jax.Array | np.ndarray:
        """See `Reader`."""
        leaf = self._leaves[name]
        if sharding is not None and isinstance(leaf, jax.Array):
            made = jax.device_put(leaf, sharding, may_alias=False)
        else:
            host = partitioning.whole_on_host(leaf)
            made = host[region] if sharding is None else partitioning.put_whole(host, sharding)
        return made if dtype is None else made.astype(dtype)
