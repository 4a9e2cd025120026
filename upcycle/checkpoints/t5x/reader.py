"""The reader of both of T5X's layouts: our names, and views of arrays that lie otherwise there.

Stacked layers (`scan_layers=True`) are taken apart: `encoder/encoder/...` with layers along axis 1 is `encoder/layers_0/...`.
Attention kernels with heads apart are joined: (embed, heads, head_dim) is (embed, heads * head_dim). Such layouts have another
optimizer state, which is left out. The step of a run that was restored has the type of its weights, and is int32 here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from upcycle import schema
from upcycle.checkpoints import arrays, json_files, views
from upcycle.checkpoints.t5x import tree
from upcycle.errors import UserError

INDEX_HASH = 'index_sha256'  # among our notes

_STEPS = ('step', 'opt_state/count')
# Stacks of layers: `encoder/encoder/<p>`, or `encoder/encoder/subblock_1/<p>` where a block has a dense and a sparse layer.
_STACKED = re.compile(r'params/(encoder|decoder)/(?:encoder|decoder)/(?:subblock_(\d+)/)?(.*)')
_STACK_AXIS = 1
_ATTENTION_KERNEL = re.compile(r'/(?:self_|encoder_decoder_)?attention/(query|key|value|out)/kernel$')


class T5XReader(arrays.ArrayReader):
    """Leaves under our names, without the placeholders of optimizer slots that T5X does not use."""

    def __init__(self, path: epath.Path, sources: Mapping[tuple[str, ...], arrays.Source]):
        named = {name: source for keys, source in sources.items() for name in tree.our_names(keys)}
        if not any(name.startswith('params/') for name in named):
            raise UserError(f'{path} has no parameters below `target`, where T5X keeps them: is it a T5X checkpoint?')
        if not any(name.startswith(tree.PARAM_STATES) for name in named):
            # A step without a state is the model's alone.
            named.pop('opt_state/count', None)
        self._left_out: dict[str, str] = {}
        super().__init__(path, named)

    @functools.cached_property
    def metadata(self) -> Mapping[str, Any]:
        """The metadata that we wrote; {} in a checkpoint that T5X saved."""
        self.leaves()
        ours = {name: value for name, value in self.notes.items() if name != INDEX_HASH}
        return {**ours, 'not_read': self._left_out} if self._left_out else ours

    @functools.cached_property
    def notes(self) -> dict[str, Any]:
        """Our file next to T5X's index; {} where there is none."""
        file = epath.Path(self.path) / tree.METADATA
        return json_files.checked_metadata(str(file), json_files.read_json(file)) if file.exists() else {}

    def _abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        every = self._views(super()._abstract())
        # `m` is in use everywhere or nowhere, which settles it for a parameter that itself has the shape (1,).
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

    def _leave_out_unknown(self, every: dict[str, jax.ShapeDtypeStruct]) -> None:
        """Takes out what no model of ours has: `flax_mutables`, and a state that is no parameter's (optax, MultiOptimizer)."""
        tops = {name.split('/')[0] for name in every} - {'params', 'opt_state', 'step', 'rng'}
        for top in sorted(tops):
            names = [name for name in every if name.split('/')[0] == top]
            self._left_out[top] = f'neither a parameter nor of an optimizer (arrays: {len(names)})'
            for name in names:
                every.pop(name)
        state = [name for name in every if name.startswith('opt_state/') and name != 'opt_state/count']
        owners = {name.removeprefix(tree.PARAM_STATES).rpartition('/')[0] for name in state}
        if state and not any(f'params/{owner}' in every for owner in owners):
            self._left_out['opt_state'] = f'the state of another optimizer than Adafactor (arrays: {len(state)})'
            for name in (*state, 'opt_state/count'):
                every.pop(name, None)

    def _views(self, stored: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """Leaves as ours are: layers out of their stacks, heads joined, the step a whole number."""
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
            # The array itself is not a leaf, and keeps T5X's name.
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
                raise UserError(f'{self.path} holds {min(twice)} twice, once of them in {theirs}: it is not read.')
            changed = changed or name not in _STEPS
            self._sources |= made
            every |= {ours: jax.ShapeDtypeStruct(view.shape, view.dtype) for ours, view in made.items()}
        if changed:
            self._leave_out_state(every)
        return every

    def _leave_out_state(self, every: dict[str, jax.ShapeDtypeStruct]) -> None:
        """Takes out the optimizer state where its arrays do not have the shapes of ours."""
        state = [name for name in every if name.startswith(tree.PARAM_STATES)]
        if state:
            self._left_out[tree.PARAM_STATES.rstrip('/')] = (
                f'the optimizer state ({len(state)} arrays) of stacked layers or of attention kernels with heads apart'
            )
            for name in (*state, 'opt_state/count'):
                every.pop(name, None)

    def _read_stored(self, name: str, region: views.Region) -> np.ndarray:
        value = self._begin_read(name, region)()
        return value if self._is_fresh(name) else value.copy()


@dataclasses.dataclass(frozen=True)
class _Stored:
    """An array of T5X's as a `views.Lazy` one."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[views.Region], np.ndarray]


def _whole_step(location: str, source: views.Lazy) -> views.Lazy:
    if math.prod(source.shape) != 1:
        raise _no_step(location, f'{source.dtype}{list(source.shape)}')
    return views.Computed((), np.dtype(np.int32), (source,), functools.partial(_step, location))


def _layers(location: str, source: views.Lazy, stack: re.Match[str], subblocks: int) -> dict[str, views.Lazy]:
    """The layers of a stack by our names.

    Args:
        location: of the array, for messages.
        source: of all layers.
        stack: the match of its name.
        subblocks: how many layers a block has.
    """
    if not schema.fits(blocks := source.shape[_STACK_AXIS], schema.Depth):
        raise UserError(
            f'{location} would be a stack of {blocks} layers, which no model has: the index is damaged, copy the checkpoint '
            'again.'
        )
    layers: dict[str, views.Lazy] = {}
    for block in range(blocks):
        name = f'params/{stack[1]}/layers_{block * subblocks + int(stack[2] or 0)}/{stack[3]}'
        layers[name] = _with_joined_heads(name, views.Layer(source, _STACK_AXIS, block))
    return layers


def _joined_heads_axis(name: str, shape: tuple[int, ...]) -> int | None:
    """The axis of an attention kernel with which the next one is joined, as ours are; None where they are, or there are no heads.

    T5X's scalable_t5 and flaxformer's `split_head_kernel` keep (embed, heads, head_dim) and (heads, head_dim, embed).
    """
    match = _ATTENTION_KERNEL.search(name)
    if match is None or len(shape) != 3 or 0 in shape:
        return None
    return 0 if match[1] == 'out' else 1


def _with_joined_heads(name: str, array: views.Lazy) -> views.Lazy:
    axis = _joined_heads_axis(name, array.shape)
    return array if axis is None else views.JoinedAxes(array, axis)


def _step(location: str, value: np.ndarray) -> np.ndarray:
    """A count of training steps. A T5X run that was restored has it in the dtype of its weights.

    Raises:
        UserError: it is no such count.
    """
    number = value.item()
    is_real = jax.dtypes.issubdtype(value.dtype, np.integer) or jax.dtypes.issubdtype(value.dtype, np.floating)
    # The comparison is false of NaN.
    if not is_real or not 0 <= number < 2**31 or number != int(number):
        raise _no_step(location, f'{value.dtype} {number}')
    return np.asarray(int(number), np.int32)


def _no_step(location: str, shown: str) -> UserError:
    return UserError(
        f'{location} is {shown}, and not a whole number from 0 to {2**31 - 1}: the checkpoint is damaged, copy it again.'
    )
