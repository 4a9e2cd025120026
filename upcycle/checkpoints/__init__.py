"""Checkpoints of every format behind one lazy, read-only view: names and shapes first, then one leaf at a time.

A leaf's name is flat and the same whatever wrote it: `params/encoder/layers_0/mlp/wi_0/kernel`,
`opt_state/param_states/<parameter>/v_row`, `opt_state/count`, `step`. Importing this module is cheap; the formats' own
libraries load when a checkpoint is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from upcycle.errors import UserError

if TYPE_CHECKING:
    import jax
    import numpy as np
    from etils import epath

# A step's folder is `100` in our runs and `checkpoint_100` in T5X's.
_STEP = re.compile(r'(?:checkpoint_)?(\d+)')
# Orbax and T5X both write beside the final name and rename at the end, so these names are interrupted saves.
_UNFINISHED = re.compile(r'(?:checkpoint_)?\d+\.(?:orbax-checkpoint-tmp|tmp-).*')
_LOOKED_FOR = (
    '`state/_METADATA` (Orbax: ours or T5X), `checkpoint` (T5X legacy), '
    'or step folders `checkpoints/STEP`, `STEP`, `checkpoint_STEP`'
)


@runtime_checkable
class Reader(Protocol):
    """One step of a checkpoint. Opening it reads an index; no array is read before `read`.

    Attributes:
        format: 'upcycle', 't5x_legacy', 't5x_orbax', ...
        path: the step's folder.
        step: training steps taken when it was saved.
        metadata: the JSON saved beside our own checkpoints (family, configuration, sunk cost, receipt); {} for others.
    """

    format: str

    @property
    def path(self) -> str: ...

    @property
    def step(self) -> int: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Every leaf's name, shape and dtype as stored, from metadata alone."""
        ...

    def read(
        self, name: str, sharding: jax.sharding.Sharding | None = None, dtype: Any = None
    ) -> jax.Array | np.ndarray:
        """One leaf, and only that leaf: on the host, or with a `sharding` each device's part straight onto it.

        Raises:
            UserError: there is no such leaf, or its stored bytes are missing or damaged.
        """
        ...


def open_checkpoint(path: str | os.PathLike[str]) -> Reader:
    """Opens a checkpoint of any format that we read; the format is found, not named.

    Args:
        path: a step's folder, or a folder of steps (a run folder, its `checkpoints`, a T5X model directory), which
            means its newest finished step. `gs://` works.

    Raises:
        UserError: nothing is there, it holds no checkpoint, or only a save that never finished.
    """
    from upcycle.checkpoints import arrays

    folder = arrays.absolute(path)
    if not folder.exists():
        raise UserError(f'{folder} does not exist: name a checkpoint, or a folder that holds one.')
    if folder.name == 'checkpoint' and folder.is_file():
        folder = folder.parent
    if _UNFINISHED.fullmatch(folder.name):
        raise UserError(f'{folder} is a save that was interrupted: name a finished step beside it.')
    if reader := _open_step(folder):
        return reader
    steps = folder / 'checkpoints' if (folder / 'checkpoints').is_dir() else folder
    children = [child for child in steps.iterdir() if child.is_dir()] if steps.is_dir() else []
    numbered = [(int(match[1]), child) for child in children if (match := _STEP.fullmatch(child.name))]
    for _, child in sorted(numbered, reverse=True):
        if reader := _open_step(child):
            return reader
    if unfinished := sorted(child.name for child in children if _UNFINISHED.fullmatch(child.name)):
        raise UserError(f'{steps} holds only saves that were interrupted ({", ".join(unfinished)}): name another run.')
    raise UserError(f'{folder} holds no checkpoint that we read: looked for {_LOOKED_FOR}.')


def _open_step(folder: epath.Path) -> Reader | None:
    """The reader of one step's folder, or None where no finished checkpoint of a known format lies directly in it."""
    from upcycle.checkpoints import arrays, native, t5x

    if (folder / 'checkpoint').is_file():
        return t5x.LegacyReader(folder)
    if not arrays.is_finished(folder) or not (folder / 'state' / arrays.ORBAX_INDEX).exists():
        return None
    sources = arrays.orbax_arrays(folder / 'state')
    reader = t5x.OrbaxReader if any(keys[0] == 'target' for keys in sources) else native.NativeReader
    return reader(folder, sources)
