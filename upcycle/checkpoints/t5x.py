"""T5X checkpoints, both of its layouts, dense and MoE (flaxformer's), read lazily and written part by part without T5X.

`legacy`: a msgpack file `checkpoint` whose leaves are small arrays, or TensorStore specs of zarr folders beside it
(`target.encoder.layers_0.mlp.wi_0.kernel/`). `orbax`: an Orbax item `state` with the same tree. T5X's names become
ours: `target/<p>` is `params/<p>`, `state/param_states/<p>/v_row` is `opt_state/param_states/<p>/v_row`, and
`state/step`, which is also Adafactor's decay clock, is `step` and `opt_state/count`.

Stacked layers (`scan_layers=True`) are taken apart: `encoder/encoder/...` with layers along axis 1 is `encoder/layers_0/...`.
Attention kernels with heads apart are joined: (embed, heads, head_dim) is (embed, heads * head_dim). Such layouts have another
optimizer state, which is left out. The step of a run that was restored has the type of its weights, and is int32 here.
Sources: t5x/checkpoints.py, adafactor.py, contrib/moe/adafactor_utils.py, examples/scalable_t5; flaxformer's
moe_architecture.py.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.serialization
import jax
import msgpack
import numpy as np
from etils import epath

from upcycle import schema
from upcycle.checkpoints import arrays, writing
from upcycle.errors import UserError

# flax.serialization's codes for an array and a numpy scalar. Its third, for complex numbers, never occurs here.
_FLAX_ARRAY_CODES = (1, 3)
_ADAFACTOR_SLOTS = ('m', 'v', 'v_row', 'v_col')
_PARAM_STATES = 'opt_state/param_states/'
METADATA = 'upcycle.json'  # family, receipt, ...: ours, beside the index
_INDEX_HASH = 'index_sha256'

# Stacks of layers: `encoder/encoder/<p>`, or `encoder/encoder/subblock_1/<p>` where a block has a dense and a sparse layer.
_STACKED = re.compile(r'params/(encoder|decoder)/(?:encoder|decoder)/(?:subblock_(\d+)/)?(.*)')
_STACK_AXIS = 1
_ATTENTION_KERNEL = re.compile(r'/(?:self_|encoder_decoder_)?attention/(query|key|value|out)/kernel$')


class _T5XReader(arrays.ArrayReader):
    """Leaves under our names, without the placeholders of optimizer slots that T5X does not use."""

    def __init__(self, path: epath.Path, sources: Mapping[tuple[str, ...], arrays.Source]):
        named = {name: source for keys, source in sources.items() for name in _names(keys)}
        if not any(name.startswith('params/') for name in named):
            raise UserError(f'{path} has no parameters below `target`, where T5X keeps them: is it a T5X checkpoint?')
        if not any(name.startswith(_PARAM_STATES) for name in named):
            # A step without a state is the model's alone.
            named.pop('opt_state/count', None)
        self._left_out: dict[str, str] = {}
        super().__init__(path, named)

    @functools.cached_property
    def metadata(self) -> Mapping[str, Any]:
        """What we wrote beside it; {} in a checkpoint that T5X saved."""
        self.leaves()
        ours = {name: value for name, value in self._notes.items() if name != _INDEX_HASH}
        return {**ours, 'not_read': self._left_out} if self._left_out else ours

    @functools.cached_property
    def _notes(self) -> dict[str, Any]:
        file = epath.Path(self.path) / METADATA
        return arrays.checked_metadata(str(file), arrays.read_json(file)) if file.exists() else {}

    def _abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        every = self._views(super()._abstract())
        # `m` is in use everywhere or nowhere, which settles it for a parameter that itself has the shape (1,).
        momentum = any(name.endswith('/m') and leaf.shape != (1,) for name, leaf in every.items())
        own_slots = ('m', 'v') if momentum else ('v',)

        def is_placeholder(name: str) -> bool:
            parameter, _, slot = name.removeprefix(_PARAM_STATES).rpartition('/')
            if not name.startswith(_PARAM_STATES) or slot not in _ADAFACTOR_SLOTS or every[name].shape != (1,):
                return False
            owner = every.get(f'params/{parameter}')
            return owner is not None and not (owner.shape == (1,) and slot in own_slots)

        every = {name: leaf for name, leaf in every.items() if not is_placeholder(name)}
        self._leave_out_of_others(every)
        for row, column in _swapped_statistics(every):
            for by_name in (self._sources, self._opened, every):
                if row in by_name:
                    by_name[row], by_name[column] = by_name[column], by_name[row]
        return every

    def _leave_out_of_others(self, every: dict[str, jax.ShapeDtypeStruct]) -> None:
        """Takes out what no model of ours has: `flax_mutables`, and a state that is no parameter's (optax, MultiOptimizer)."""
        tops = {name.split('/')[0] for name in every} - {'params', 'opt_state', 'step', 'rng'}
        for top in sorted(tops):
            names = [name for name in every if name.split('/')[0] == top]
            self._left_out[top] = f'neither a parameter nor of an optimizer (arrays: {len(names)})'
            for name in names:
                every.pop(name)
        state = [name for name in every if name.startswith('opt_state/') and name != 'opt_state/count']
        owners = {name.removeprefix(_PARAM_STATES).rpartition('/')[0] for name in state}
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
            is_step = name in ('step', 'opt_state/count')
            match = _STACKED.match(name) if len(leaf.shape) > _STACK_AXIS else None
            if not is_step and not match and _joined_heads(name, leaf.shape) is None:
                every[name] = leaf
                continue
            # The array itself is no leaf, and keeps T5X's name.
            theirs = '/'.join(_keys(name))
            for by_name in (self._sources, self._opened):
                if name in by_name:
                    by_name[theirs] = by_name.pop(name)
            read = functools.partial(self._read_stored, theirs)
            views: dict[str, arrays.Lazy] = {}
            if is_step:
                if math.prod(leaf.shape) != 1:
                    raise _no_step(f'{theirs} of {self.path}', f'{leaf.dtype}{list(leaf.shape)}')
                make = functools.partial(_step, f'{theirs} of {self.path}')
                views[name] = arrays.Derived((), np.dtype(np.int32), (_Stored(leaf.shape, leaf.dtype, read),), make)
            elif match:
                shape = (*leaf.shape[:_STACK_AXIS], *leaf.shape[_STACK_AXIS + 1 :])
                if not schema.fits(layers := leaf.shape[_STACK_AXIS], schema.Depth):
                    raise UserError(
                        f'{theirs} of {self.path} would be a stack of {layers} layers, which no model has: the index is '
                        'damaged, copy the checkpoint again.'
                    )
                for i in range(layers):
                    layer = i * len(blocks[match[1]]) + int(match[2] or 0)
                    ours = f'params/{match[1]}/layers_{layer}/{match[3]}'
                    views[ours] = _with_joined_heads(ours, _Stored(shape, leaf.dtype, read, i))
            else:
                views[name] = _with_joined_heads(name, _Stored(leaf.shape, leaf.dtype, read))
            if twice := views.keys() & (every.keys() | (stored.keys() - {name})):
                raise UserError(f'{self.path} holds {min(twice)} twice, once of them in {theirs}: it is not read.')
            changed = changed or not is_step
            self._sources |= views
            every |= {ours: jax.ShapeDtypeStruct(view.shape, view.dtype) for ours, view in views.items()}
        state = [name for name in every if name.startswith(_PARAM_STATES)]
        if changed and state:
            self._left_out[_PARAM_STATES.rstrip('/')] = (
                f'the optimizer state ({len(state)} arrays) of stacked layers or of attention kernels with heads apart'
            )
            for name in (*state, 'opt_state/count'):
                every.pop(name, None)
        return every

    def _read_stored(self, name: str, region: arrays.Region) -> np.ndarray:
        value = self._begin_read(name, region)()
        return value if self._is_fresh(name) else value.copy()


class OrbaxReader(_T5XReader):
    """A step that T5X saved through Orbax (its `use_orbax=True`); see `upcycle.checkpoints.Reader`."""

    format = 't5x_orbax'

    def __init__(self, path: epath.Path, sources: Mapping[tuple[str, ...], arrays.Source] | None = None):
        super().__init__(path, arrays.orbax_arrays(path / 'state') if sources is None else sources)


class LegacyReader(_T5XReader):
    """A step in T5X's own format, that of its published models; see `upcycle.checkpoints.Reader`."""

    format = 't5x_legacy'

    def __init__(self, path: epath.Path):
        super().__init__(path, _legacy_arrays(path))
        # Arrays within the index have no checksum.
        expected = self._notes.get(_INDEX_HASH)
        if expected is not None and hashlib.sha256((path / 'checkpoint').read_bytes()).hexdigest() != expected:
            raise UserError(f'{path / "checkpoint"} is damaged: it is not the file that was written. Copy it again.')


def _names(keys: tuple[str, ...]) -> tuple[str, ...]:
    """Our names of T5X's leaf: two for the step."""
    match keys:
        case ('target', *rest):
            return ('/'.join(['params', *rest]),)
        case ('state', 'step'):
            return ('step', 'opt_state/count')
        case ('state', *rest):
            return ('/'.join(['opt_state', *rest]),)
        case _:
            return ('/'.join(keys),)


def _legacy_arrays(folder: epath.Path) -> dict[tuple[str, ...], arrays.Source]:
    """What a legacy checkpoint's msgpack index holds, specs made absolute. Nothing in it is ever unpickled."""
    index = folder / 'checkpoint'
    try:
        encoded = index.read_bytes()
        if encoded.startswith(b'model_checkpoint_path'):
            raise UserError(
                f'{index} is of a TensorFlow checkpoint, which is not read: take the model in the format of T5X or of '
                'Hugging Face.'
            )
        tree = msgpack.unpackb(encoded, raw=False, strict_map_key=True, ext_hook=_flax_array)
        # The first version of the format had neither the number nor the wrapper around the optimizer.
        version = tree.pop('version', 0)
        tree = tree['optimizer'] if version else tree
        sources: dict[tuple[str, ...], arrays.Source] = {}
        _collect(folder, tree, (), sources)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
        msgpack.UnpackException,
    ) as error:
        raise UserError(
            f'{index} is not a T5X checkpoint index, or is damaged ({error}): copy the checkpoint again.'
        ) from error
    return sources


def _collect(folder: epath.Path, node: Any, keys: tuple[str, ...], out: dict[tuple[str, ...], arrays.Source]) -> None:
    if isinstance(node, dict) and node.keys() >= {'driver', 'kvstore', 'metadata'}:
        out[keys] = _zarr(folder, node)
    elif isinstance(node, dict):
        for key, child in node.items():
            _collect(folder, child, (*keys, key), out)
    elif isinstance(node, np.ndarray | np.generic | int) and np.asarray(node).dtype.kind not in 'OSUMm':
        out[keys] = np.asarray(node)
    elif node is not None:  # None is the state of a parameter that no optimizer touches.
        raise ValueError(f'{"/".join(keys)} is a {type(node).__name__}, neither an array nor a description of one')


def _zarr(folder: epath.Path, spec: dict[str, Any]) -> arrays.Source:
    """The spec of an array beside the index, wherever it was written. Its chunks and compressor are in the folder."""
    # TensorStore before 0.1.14 wrote the path at the top.
    name = (spec['kvstore'].get('path') or spec['path']).rstrip('/')
    if not arrays.is_plain_name(name):
        raise ValueError(f'it names the folder {name!r}, which is not one beside it')
    return {
        'driver': 'zarr',
        'kvstore': arrays.kvstore(folder / name),
        'dtype': jax.numpy.dtype(spec['dtype']).name,
        # The order is C in whatever T5X writes; another one would be read as a transposed array.
        'metadata': {'shape': [int(size) for size in spec['metadata']['shape']], 'order': 'C'},
        # T5X stores every chunk (its fill value is null), so that a missing one is a lost one.
        'fill_missing_data_reads': False,
    }


def _flax_array(code: int, data: bytes) -> Any:
    if code not in _FLAX_ARRAY_CODES:
        raise ValueError(f'it has an extension of type {code}, which T5X does not write')
    return flax.serialization.msgpack_restore(msgpack.packb(msgpack.ExtType(code, data)))


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A `Lazy` view of an array of T5X's, or of one layer of a stack.

    Attributes:
        shape, dtype: of the view.
        read_array: reads a region of the array.
        layer: index along the stack's axis; None: the array is no stack.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read_array: Callable[[arrays.Region], np.ndarray]
    layer: int | None = None

    def read(self, region: arrays.Region) -> np.ndarray:
        """See `arrays.Lazy`."""
        if self.layer is None:
            return self.read_array(region)
        whole = (*region, *[slice(None)] * (len(self.shape) - len(region)))
        layer = slice(self.layer, self.layer + 1)
        return self.read_array((*whole[:_STACK_AXIS], layer, *whole[_STACK_AXIS:])).squeeze(_STACK_AXIS)


def _joined_heads(name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of an attention kernel with its heads joined, as ours are; None where they are, or there are none.

    T5X's scalable_t5 and flaxformer's `split_head_kernel` keep (embed, heads, head_dim) and (heads, head_dim, embed).
    """
    match = _ATTENTION_KERNEL.search(name)
    if match is None or len(shape) != 3:
        return None
    first, second, third = shape
    return (first * second, third) if match[1] == 'out' else (first, second * third)


def _with_joined_heads(name: str, array: arrays.Lazy) -> arrays.Lazy:
    shape = _joined_heads(name, array.shape)
    return array if shape is None else arrays.Derived(shape, array.dtype, (array,), lambda x: x.reshape(shape))


def _step(what: str, value: np.ndarray) -> np.ndarray:
    """A count of training steps. A T5X run that was restored has it in the dtype of its weights.

    Raises:
        UserError: it is no such count.
    """
    number = value.item()
    is_real = jax.dtypes.issubdtype(value.dtype, np.integer) or jax.dtypes.issubdtype(value.dtype, np.floating)
    # The comparison is false of NaN.
    if not is_real or not 0 <= number < 2**31 or number != int(number):
        raise _no_step(what, f'{value.dtype} {number}')
    return np.asarray(int(number), np.int32)


def _no_step(what: str, shown: str) -> UserError:
    return UserError(
        f'{what} is {shown}, and not a whole number from 0 to {2**31 - 1}: the checkpoint is damaged, copy it again.'
    )


def _swapped_statistics(leaves: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Factored statistics of experts that T5X and we name the other way round: (v_row, v_col).

    Both keep a mean over either axis of a kernel. Of a matrix T5X names them by size, as we do; of experts by meaning: `v_row`
    belongs to the model's width, whichever is larger.
    """
    found = []
    for name, leaf in leaves.items():
        match = re.fullmatch(r'params/(.*/expert/(wi|wi_\d|wo)/kernel)', name)
        row, column = (f'{_PARAM_STATES}{match[1]}/{slot}' if match else '' for slot in ('v_row', 'v_col'))
        if row in leaves and column in leaves:
            width_axis = 1 if match[2] == 'wo' else 0
            if int(np.argsort(leaf.shape[1:])[-2]) != width_axis:
                found.append((row, column))
    return found


class _T5XLayout:
    """T5X's tree, written part by part; see `writing.Layout`."""

    format = ''
    state = ''

    def final(self, path: epath.Path, step: int | None) -> epath.Path:
        """T5X reads the step off the folder's name."""
        return path if path.name == f'checkpoint_{step}' else path / f'checkpoint_{step}'

    def place(self, leaves: writing.Leaves) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        """See `writing.Layout`."""
        _refuse(leaves, self.format)
        left_out = {}
        if 'rng' in leaves:
            left_out['rng'] = 'T5X takes its random key from its own configuration'
        if 'opt_state/count' in leaves:
            left_out['opt_state/count'] = 'it is the step, which T5X takes for the clock of its Adafactor'
        renamed = dict(pair for row, column in _swapped_statistics(leaves) for pair in ((row, column), (column, row)))
        return {name: _keys(renamed.get(name, name)) for name in leaves if name not in left_out}, left_out

    def zarr(self, leaf: jax.ShapeDtypeStruct, chunks: list[int]) -> dict[str, Any]:
        """T5X reads version 2 of zarr, which has no checksums of its own: gzip's, without its compression."""
        metadata = {'shape': list(leaf.shape), 'chunks': chunks, 'compressor': {'id': 'gzip', 'level': 0}}
        return {'driver': 'zarr', 'metadata': metadata}

    def _placeholders(self, writer: writing.FolderWriter) -> dict[tuple[str, ...], np.ndarray]:
        """Slots that Adafactor does not use hold one zero in T5X."""
        states = {keys[:-1] for keys in writer.keys.values() if keys[:2] == ('state', 'param_states')}
        used = set(writer.keys.values())
        return {
            (*keys, slot): np.zeros(1, np.float32)
            for keys in sorted(states)
            for slot in _ADAFACTOR_SLOTS
            if (*keys, slot) not in used
        }


class LegacyLayout(_T5XLayout):
    """The format of T5X's published models."""

    format = 't5x_legacy'

    def is_inline(self, keys: tuple[str, ...]) -> bool:
        """T5X reads factored statistics, which it does not split, from the index."""
        return keys[-1] in ('step', 'v_row', 'v_col') and keys[0] == 'state'

    def commit(self, writer: writing.FolderWriter, metadata: Mapping[str, Any]) -> None:
        """The index, last."""
        tree: dict[str, Any] = {}

        def put(keys: tuple[str, ...], value: Any) -> None:
            node = tree
            for key in keys[:-1]:
                node = node.setdefault(key, {})
            node[keys[-1]] = value

        for name, keys in writer.keys.items():
            leaf = writer.leaves[name]
            if name in writer.inline:
                put(keys, writer.inline[name])
                continue
            # A path beside the index, so that the checkpoint can be moved.
            store = {'driver': 'file', 'path': '.'.join(keys) + '/'}
            array = self.zarr(leaf, writing.chunk_shape(name, leaf))
            put(keys, {**array, 'dtype': leaf.dtype.name, 'kvstore': store})
        for keys, value in self._placeholders(writer).items():
            put(keys, value)
        index = flax.serialization.msgpack_serialize({'version': 3, 'optimizer': tree})
        notes = {**metadata, _INDEX_HASH: hashlib.sha256(index).hexdigest()}
        (writer.folder / METADATA).write_text(json.dumps(notes))
        (writer.folder / 'checkpoint').write_bytes(index)

    def reader(self, folder: epath.Path) -> LegacyReader:
        """See `writing.Layout`."""
        return LegacyReader(folder)


class OrbaxLayout(_T5XLayout):
    """What T5X writes by default today."""

    format = 't5x_orbax'
    state = 'state'

    def is_inline(self, keys: tuple[str, ...]) -> bool:
        """Every array has a folder."""
        return False

    def commit(self, writer: writing.FolderWriter, metadata: Mapping[str, Any]) -> None:
        """Placeholders and the index."""
        placeholders = self._placeholders(writer)
        for future in [writer.put(keys, value) for keys, value in placeholders.items()]:
            future.result()
        shapes = {keys: writer.leaves[name].shape for name, keys in writer.keys.items()}
        shapes |= {keys: value.shape for keys, value in placeholders.items()}
        (writer.folder / self.state / arrays.ORBAX_INDEX).write_text(arrays.orbax_index(shapes, zarr3=False))
        (writer.folder / METADATA).write_text(json.dumps(dict(metadata)))
        arrays.mark_finished(writer.folder, (self.state,))

    def reader(self, folder: epath.Path) -> OrbaxReader:
        """See `writing.Layout`."""
        return OrbaxReader(folder)


def _keys(name: str) -> tuple[str, ...]:
    top, *rest = name.split('/')
    return {'params': ('target',), 'opt_state': ('state',), 'step': ('state', 'step')}[top] + tuple(rest)


def _refuse(leaves: writing.Leaves, format: str) -> None:
    """Raises UserError for a leaf that T5X has no place for."""
    if 'step' not in leaves:
        raise UserError(
            f'{format} needs the step that the model was trained to, which the source does not say: give --step.'
        )
    for name in leaves:
        segments = name.split('/')
        if name in ('step', 'rng', 'opt_state/count'):
            continue
        if segments[0] == 'params' and len(segments) > 1 and segments[1] in ('encoder', 'decoder', 'token_embedder'):
            continue
        if not name.startswith(_PARAM_STATES) or segments[-1] not in _ADAFACTOR_SLOTS:
            raise UserError(f'{name} has no counterpart in {format}, which holds T5 models and Adafactor state.')
    owners: dict[str, set[str]] = {}
    for name in leaves:
        if name.startswith(_PARAM_STATES):
            owner, _, slot = name.removeprefix(_PARAM_STATES).rpartition('/')
            owners.setdefault(owner, set()).add(slot)
    for owner, slots in owners.items():
        way_out = 'leave the optimizer state out with --optimizer_state=none'
        if not ({'v'} <= slots or {'v_row', 'v_col'} <= slots):
            raise UserError(
                f"{_PARAM_STATES}{owner} holds {', '.join(sorted(slots))}, which is not Adafactor's state: {way_out}."
            )
        if writing.EXPERT in owner.split('/') and 'v' in slots and len(leaves[f'params/{owner}'].shape) > 2:
            raise UserError(
                f'{_PARAM_STATES}{owner}/v has no counterpart in {format}, since T5X factors the statistics of experts whatever '
                f'their size: train with expert_min_dim_size_to_factor = 1, or {way_out}.'
            )
