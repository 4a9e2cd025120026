"""The reader of both layouts of T5X, with our names and views of arrays that T5X stores in another form.

Stacked layers (`scan_layers=True`) are unstacked: `encoder/encoder/...` with layers along axis 1 becomes `encoder/layers_0/...`.
Separate heads of attention kernels are joined: (embed, heads, head_dim) becomes (embed, heads * head_dim). The optimizer state of
such arrays is left out. The step of a restored run has the dtype of its weights, and becomes int32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from upcycle import files, schema
from upcycle.checkpoints import arrays, json_files, views
from upcycle.checkpoints.t5x import tree
from upcycle.errors import UserError

INDEX_HASH = 'index_sha256'  # in our metadata

_STEPS = ('step', 'opt_state/count')
# Stacks of layers: `encoder/encoder/<p>`, or `encoder/encoder/subblock_1/<p>` if a block has a dense and a sparse layer.
_STACKED = re.compile(r'params/(encoder|decoder)/(?:encoder|decoder)/(?:subblock_(\d+)/)?(.*)')
_STACK_AXIS = 1
_ATTENTION_KERNEL = re.compile(r'/(?:self_|encoder_decoder_)?attention/(query|key|value|out)/kernel$')


class T5XReader(arrays.ArrayReader):
    """Leaves under our names, without T5X's placeholders for unused slots of the optimizer."""

    def __init__(self, path: epath.Path, sources: Mapping[tuple[str, ...], arrays.Source]):
        named = {name: source for keys, source in sources.items() for name in tree.our_names(keys)}
        if not any(name.startswith('params/') for name in named):
            raise UserError(f'{path} has no parameters below `target`, so it is not a T5X checkpoint.')
        if not any(name.startswith(tree.PARAM_STATES) for name in named):
            # Without an optimizer state, the step is not its clock.
            named.pop('opt_state/count', None)
        self._left_out: dict[str, str] = {}
        super().__init__(path, named)

    @functools.cached_property
    def metadata(self) -> Mapping[str, Any]:
        """The metadata that we wrote; {} for a checkpoint of T5X. `not_read`: arrays that are left out, and why."""
        self.leaves()
        ours = {name: value for name, value in self.notes.items() if name != INDEX_HASH}
        return {**ours, 'not_read': self._left_out} if self._left_out else ours

    @functools.cached_property
    def notes(self) -> dict[str, Any]:
        """The content of our file next to T5X's index; {} if there is no such file."""
        file = epath.Path(self.path) / tree.METADATA
        return json_files.checked_metadata(str(file), json_files.read_json(file)) if file.exists() else {}

    def _abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        every = self._views(super()._abstract())
        # `m` is used for all parameters or for none, which decides the case of a parameter of shape (1,).
        momentum = any(name.endswith('/m') and leaf.shape != (1,) for name, leaf in every.items())
        own_slots = ('m', 'v') if momentum else ('v',)

        def is_placeholder(name: str) -> bool:
            parameter, _, slot = name.removeprefix(tree.PARAM_STATES).rpartition('/')
            if not name.startswith(tree.PARAM_STATES) or slot not in tree.ADAFACTOR_SLOTS or every[name].shape != (1,):
                return False
            owner = every.get(f'params/{parameter}')
            return owner is not None and not (owner.shape == (1,) and slot in own_slots)

        every = {name: leaf for name, leaf in every.items() if not is_placeholder(name)}
        self._leave_out_unknown(every)
        for row, column in tree.swapped_statistics(every):
            for by_name in (self._sources, self._opened, every):
                if row in by_name:
                    by_name[row], by_name[column] = by_name[column], by_name[row]
        return every

    def _leave_out(self, every: dict[str, jax.ShapeDtypeStruct], names: Sequence[str], key: str, reason: str) -> None:
        """Removes leaves, and notes the reason. Without an optimizer state, its clock is removed as well."""
        if not names:
            return
        self._left_out[key] = f'{reason} (arrays: {len(names)})'
        for name in (*names, *(['opt_state/count'] if key.startswith('opt_state') else [])):
            every.pop(name, None)

    def _leave_out_unknown(self, every: dict[str, jax.ShapeDtypeStruct]) -> None:
        """Removes leaves that our models do not have: `flax_mutables`, and the state of optax or MultiOptimizer."""
        for top in sorted({name.split('/')[0] for name in every} - {'params', 'opt_state', 'step', 'rng'}):
            names = [name for name in every if name.split('/')[0] == top]
            self._leave_out(every, names, top, 'neither parameters nor an optimizer state')
        state = [name for name in every if name.startswith('opt_state/') and name != 'opt_state/count']
        owners = {name.removeprefix(tree.PARAM_STATES).rpartition('/')[0] for name in state}
        if not any(f'params/{owner}' in every for owner in owners):
            self._leave_out(every, state, 'opt_state', 'the state of another optimizer than Adafactor')

    def _views(self, stored: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """Adds views for arrays in another form: unstacks layers, joins heads, converts the step."""
        blocks: dict[str, set[str]] = {}
        for match in filter(None, map(_STACKED.match, stored)):
            blocks.setdefault(match[1], set()).add(match[2])
        every: dict[str, jax.ShapeDtypeStruct] = {}
        changed = False
        for name, leaf in stored.items():
            stack = _STACKED.match(name) if len(leaf.shape) > _STACK_AXIS else None
            if name not in _STEPS and not stack and _joined_heads_axis(name, leaf.shape) is None:
                every[name] = leaf
                continue
            # The stored array is not a leaf, and keeps T5X's name.
            theirs = '/'.join(tree.their_keys(name))
            for by_name in (self._sources, self._opened):
                if name in by_name:
                    by_name[theirs] = by_name.pop(name)
            source = _Stored(leaf.shape, leaf.dtype, functools.partial(self._read_stored, theirs))
            location = f'{theirs} of {self.path}'
            if name in _STEPS:
                made = {name: _whole_step(location, source)}
            elif stack:
                made = _layers(location, source, stack, len(blocks[stack[1]]))
            else:
                made = {name: _with_joined_heads(name, source)}
            if twice := made.keys() & (every.keys() | (stored.keys() - {name})):
                raise UserError(
                    f'{self.path} holds {min(twice)} twice, also as part of {theirs}, so it cannot be read.'
                )
            changed = changed or name not in _STEPS
            self._sources |= made
            every |= {ours: jax.ShapeDtypeStruct(view.shape, view.dtype) for ours, view in made.items()}
        if changed:
            state = [name for name in every if name.startswith(tree.PARAM_STATES)]
            reason = 'the optimizer state of stacked layers or of attention kernels with separate heads'
            self._leave_out(every, state, tree.PARAM_STATES.rstrip('/'), reason)
        return every

    def _read_stored(self, name: str, region: views.Region) -> np.ndarray:
        value = self._begin_read(name, region)()
        return value if self._is_fresh(name) else value.copy()


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A stored array of T5X as a `views.Lazy` array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[views.Region], np.ndarray]


def _whole_step(location: str, source: views.Lazy) -> views.Lazy:
    if math.prod(source.shape) != 1:
        raise _no_step(location, f'{source.dtype}{list(source.shape)}')
    return views.Computed((), np.dtype(np.int32), (source,), functools.partial(_step, location))


def _layers(location: str, source: views.Lazy, stack: re.Match[str], subblocks: int) -> dict[str, views.Lazy]:
    """Returns the layers of a stack by our names.

    Args:
      location: name of the array, for messages.
      source: all layers.
      stack: the match of its name.
      subblocks: layers per block.
    """
    if not schema.fits(blocks := source.shape[_STACK_AXIS], schema.Depth):
        raise files.damaged(location, f'a stack of {blocks} layers is too large')
    layers: dict[str, views.Lazy] = {}
    for block in range(blocks):
        name = f'params/{stack[1]}/layers_{block * subblocks + int(stack[2] or 0)}/{stack[3]}'
        layers[name] = _with_joined_heads(name, views.Layer(source, _STACK_AXIS, block))
    return layers


def _joined_heads_axis(name: str, shape: tuple[int, ...]) -> int | None:
    """Returns the axis of an attention kernel to join with the next one; None for other arrays and joined heads.

    T5X's scalable_t5 and flaxformer's `split_head_kernel` have (embed, heads, head_dim) and (heads, head_dim, embed).
    """
    match = _ATTENTION_KERNEL.search(name)
    if match is None or len(shape) != 3 or 0 in shape:
        return None
    return 0 if match[1] == 'out' else 1


def _with_joined_heads(name: str, array: views.Lazy) -> views.Lazy:
    axis = _joined_heads_axis(name, array.shape)
    return array if axis is None else views.JoinedAxes(array, axis)


def _step(location: str, value: np.ndarray) -> np.ndarray:
    """Converts a step, which restored runs of T5X store in the dtype of their weights; raises UserError if it is not one."""
    number = value.item()
    is_real = jax.dtypes.issubdtype(value.dtype, np.integer) or jax.dtypes.issubdtype(value.dtype, np.floating)
    # The comparison is false for NaN.
    if not is_real or not 0 <= number < 2**31 or number != int(number):
        raise _no_step(location, f'{value.dtype} {number}')
    return np.asarray(int(number), np.int32)


def _no_step(location: str, shown: str) -> UserError:
    return files.damaged(location, f'{shown} is not a whole number from 0 to {2**31 - 1}')
