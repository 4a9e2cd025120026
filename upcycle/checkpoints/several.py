"""Several checkpoints of one architecture as one: leaf `params/x` of checkpoint i is `params/x@i`."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from upcycle.checkpoints import Reader

if TYPE_CHECKING:
    import jax
    import numpy as np


class SeveralReader:
    """See `upcycle.checkpoints.Reader`. Its step is the largest, its cost the sum."""

    def __init__(self, readers: Sequence[Reader]):
        self.readers = tuple(readers)
        self.format = ', '.join(dict.fromkeys(reader.format for reader in readers))
        self.path = ', '.join(str(reader.path) for reader in readers)

    @property
    def step(self) -> int | None:
        """Of the checkpoint that was trained longest; None where none of them says."""
        return max((reader.step for reader in self.readers if reader.step is not None), default=None)

    @functools.cached_property
    def metadata(self) -> Mapping[str, Any]:
        """The first one's, with the cost of all.

        Steps of one run cost what the last of them did; what a common ancestor of several runs had cost is counted for each.
        """
        runs: dict[str, dict[str, float]] = {}
        for reader in self.readers:
            run = runs.setdefault(_run_of(reader), {})
            for name, value in reader.metadata.get('cost', {}).items():
                run[name] = max(value, run.get(name, 0.0))
        names = dict.fromkeys(name for run in runs.values() for name in run if name != 'start_step')
        total = {name: sum(run.get(name, 0.0) for run in runs.values()) for name in names}
        return {**self.readers[0].metadata, 'cost': total}

    def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `Reader`."""
        return {f'{name}@{i}': leaf for i, reader in enumerate(self.readers) for name, leaf in reader.leaves().items()}

    def read(
        self,
        name: str,
        sharding: jax.sharding.Sharding | None = None,
        dtype: Any = None,
        region: tuple[slice, ...] = (),
    ) -> jax.Array | np.ndarray:
        """See `Reader`."""
        name, _, index = name.rpartition('@')
        return self.readers[int(index)].read(name, sharding, dtype, region)


def _run_of(reader: Reader) -> str:
    """What the steps of one run have in common: their folder. A checkpoint that is not a step's folder is its own run.

    An exported or imported checkpoint counts as what it was made from, which it says.
    """
    origin = reader.metadata.get('source')
    path = str(origin.get('path', reader.path) if isinstance(origin, Mapping) else reader.path)
    folder, name = os.path.split(path)
    return folder if re.fullmatch(r'(checkpoint_)?\d+', name) else path


def readers_of(reader: Reader) -> tuple[Reader, ...]:
    """Of each checkpoint that a reader reads."""
    return reader.readers if isinstance(reader, SeveralReader) else (reader,)
