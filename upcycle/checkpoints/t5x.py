"""T5X checkpoints, both of its layouts, read lazily without T5X.

`legacy`: a msgpack file `checkpoint` whose leaves are small arrays, or TensorStore specs of gzipped zarr folders beside
it (`target.encoder.layers_0.mlp.wi_0.kernel/`). `orbax`: an Orbax item `state` with the same tree. T5X's names become
ours: `target/<p>` is `params/<p>`, `state/param_states/<p>/v_row` is `opt_state/param_states/<p>/v_row`, and
`state/step`, which is also Adafactor's decay clock, is `step` and `opt_state/count`.
Source of the format: t5x/checkpoints.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax
import msgpack
import numpy as np
from etils import epath

from upcycle.checkpoints import arrays
from upcycle.errors import UserError

# flax.serialization's codes for an array and a numpy scalar. Its third, for complex numbers, never occurs here.
_FLAX_ARRAY_CODES = (1, 3)
_ADAFACTOR_SLOTS = ('m', 'v', 'v_row', 'v_col')
_PARAM_STATES = 'opt_state/param_states/'


class _T5XReader(arrays.ArrayReader):
    """Leaves under our names, without the placeholders of optimizer slots that T5X does not use."""

    def __init__(self, path: epath.Path, sources: Mapping[tuple[str, ...], arrays.Source]):
        named = {name: source for keys, source in sources.items() for name in _names(keys)}
        if not any(name.startswith('params/') for name in named):
            raise UserError(f'{path} has no parameters below `target`, where T5X keeps them: is it a T5X checkpoint?')
        super().__init__(path, named)

    def _abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        every = super()._abstract()
        # `m` is in use everywhere or nowhere, which settles it for a parameter that itself has the shape (1,).
        momentum = any(name.endswith('/m') and leaf.shape != (1,) for name, leaf in every.items())
        own_slots = ('m', 'v') if momentum else ('v',)

        def is_placeholder(name: str) -> bool:
            parameter, _, slot = name.removeprefix(_PARAM_STATES).rpartition('/')
            if not name.startswith(_PARAM_STATES) or slot not in _ADAFACTOR_SLOTS or every[name].shape != (1,):
                return False
            owner = every.get(f'params/{parameter}')
            return owner is not None and not (owner.shape == (1,) and slot in own_slots)

        return {name: leaf for name, leaf in every.items() if not is_placeholder(name)}


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
    encoded = index.read_bytes()
    try:
        tree = msgpack.unpackb(encoded, raw=False, strict_map_key=True, ext_hook=_flax_array)
        # The first version of the format had neither the number nor the wrapper around the optimizer.
        version = tree.pop('version', 0)
        tree = tree['optimizer'] if version else tree
        sources: dict[tuple[str, ...], arrays.Source] = {}
        _collect(folder, tree, (), sources)
    except (ValueError, KeyError, TypeError, AttributeError, msgpack.UnpackException) as error:
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
    if not name or '/' in name or name in ('.', '..'):
        raise ValueError(f'it names the folder {name!r}, which is not one beside it')
    return {
        'driver': 'zarr',
        'kvstore': arrays.kvstore(folder / name),
        'dtype': jax.numpy.dtype(spec['dtype']).name,
        'metadata': {'shape': [int(size) for size in spec['metadata']['shape']]},
        # T5X stores every chunk (its fill value is null), so that a missing one is a lost one.
        'fill_missing_data_reads': False,
    }


def _flax_array(code: int, data: bytes) -> Any:
    if code not in _FLAX_ARRAY_CODES:
        raise ValueError(f'it has an extension of type {code}, which T5X does not write')
    return flax.serialization.msgpack_restore(msgpack.packb(msgpack.ExtType(code, data)))
