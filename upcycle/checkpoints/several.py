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

    from upcycle.checkpoints.views import Region


class SeveralReader:
    """See `upcycle.checkpoints.Reader`. The step is the maximum, the cost the sum."""

    def __init__(self, readers: Sequence[Reader]):
        self.readers = tuple(readers)
        self.format = ', '.join(dict.fromkeys(reader.format for reader in readers))
        self.path = ', '.join(str(reader.path) for reader in readers)

    @property
    def step(self) -> int | None:
        """The step of the checkpoint that was trained longest; None if unknown for all."""
        return max((reader.step for reader in self.readers if reader.step is not None), default=None)

    @functools.cached_property
    def metadata(self) -> Mapping[str, Any]:
        """The metadata of the first checkpoint, with the total cost.

        Several steps of one run count once, with the cost of the latest. The cost of a common ancestor counts for each run.
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
        self, name: str, sharding: jax.sharding.Sharding | None = None, dtype: Any = None, region: Region = ()
    ) -> jax.Array | np.ndarray:
        """See `Reader`."""
        name, _, index = name.rpartition('@')
        return self.readers[int(index)].read(name, sharding, dtype, region)


def _run_of(reader: Reader) -> str:
    """Identifies the run of a checkpoint: the folder of its steps, or the path of a checkpoint that is not a step.

    An exported or imported checkpoint belongs to the run of its source, which its metadata names.
    """
    origin = reader.metadata.get('source')
    path = str(origin.get('path', reader.path) if isinstance(origin, Mapping) else reader.path)
    folder, name = os.path.split(path)
    return folder if re.fullmatch(r'(checkpoint_)?\d+', name) else path


def readers_of(reader: Reader) -> tuple[Reader, ...]:
    """Returns the reader of each checkpoint behind a reader."""
    return reader.readers if isinstance(reader, SeveralReader) else (reader,)
