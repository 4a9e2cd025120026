"""Converts parameter trees of Flax linen, NNX and nested dicts to flat dicts of arrays and back."""

import dataclasses
import sys
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import unflatten_dict

from upcycle.errors import UserError

Keys = tuple[Hashable, ...]


def _is_variable(node: Any) -> bool:
    # Importing NNX is slow, and a tree can only contain variables if it was imported.
    nnx = sys.modules.get('flax.nnx')
    return nnx is not None and isinstance(node, nnx.Variable)


def is_box(node: Any) -> bool:
    """True if a node wraps one array with metadata: `nn.Partitioned`, `nn.LogicallyPartitioned`, `nnx.Param`."""
    return isinstance(node, nn.meta.AxisMetadata) or _is_variable(node)


def _is_empty(node: Any) -> bool:
    """True for a node without leaves, which JAX leaves out when it flattens a tree."""
    return node is None or (isinstance(node, Mapping | list | tuple) and not node)


def _inside(leaf: Any) -> Any:
    """The array of a leaf, without its box."""
    return next(iter(jax.tree.leaves(leaf)), None) if is_box(leaf) else leaf


def _segments(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys of a path of `jax.tree_util` as text."""
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def _leaves_of(tree: Any, label: str, is_leaf: Callable[[Any], bool] = is_box) -> list[tuple[tuple[Any, ...], Any]]:
    """The path and the leaf of every leaf of any pytree.

    Raises:
      UserError: JAX cannot sort the keys of a dict.
    """
    try:
        return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    except (TypeError, ValueError) as error:
        raise UserError(f'a dict of {label} has keys of several types, which cannot be sorted: use strings.') from error


def arrays_of(tree: Any, label: str = 'opt_state') -> list[tuple[tuple[str, ...], Any]]:
    """The path and the unboxed array of every leaf of any pytree, in the order of `jax.tree.leaves`."""
    return [(_segments(path), _inside(leaf)) for path, leaf in _leaves_of(tree, label)]


def require_numbers(tree: Any, label: str) -> None:
    """Checks that the numbers of every array of a pytree can be read, and that JAX can hold them.

    Raises:
      UserError: a leaf is a shape, a tracer or a deleted array; or it has 64 bits, 64-bit types are disabled, and a number
        needs them.
    """
    for path, leaf in arrays_of(tree, label):
        if not hasattr(leaf, 'dtype') or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            continue
        name = f'{"/".join(path)} of {label}'
        if isinstance(leaf, jax.core.Tracer):
            raise UserError(f'{name} is being traced: call upcycle outside of jax.jit and other transformations.')
        if not hasattr(leaf, '__array__'):
            raise UserError(f'{name} is a shape without numbers: pass arrays, or use `plan`.')
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise UserError(f'{name} was deleted or donated: pass the arrays that replaced it.')
        narrow = jax.dtypes.canonicalize_dtype(leaf.dtype) if np.dtype(leaf.dtype).kind in 'iuf' else leaf.dtype
        if narrow != leaf.dtype:
            _require_narrow(name, np.asarray(leaf), narrow)


def _require_narrow(name: str, leaf: np.ndarray, dtype: np.dtype) -> None:
    limits = jnp.finfo(dtype) if leaf.dtype.kind == 'f' else jnp.iinfo(dtype)
    beyond = leaf[np.isfinite(leaf) & ((leaf < limits.min) | (leaf > limits.max))]
    if beyond.size:
        raise UserError(
            f'{name} holds {beyond[0]}, which {dtype.name} cannot hold: enable 64-bit types with the JAX option '
            'jax_enable_x64, or remove the number.'
        )


@dataclasses.dataclass(frozen=True)
class Tree:
    """A flattened parameter tree.

    Attributes:
      leaves: unboxed arrays, or their shapes, by their path joined with '/'.
      keys: the keys of every path and path prefix, by their text.
      rebuild: makes a tree of the same kind (plain dicts, a FrozenDict or an NNX State) from leaves by their keys.
    """

    leaves: Mapping[str, Any]
    keys: Mapping[str, Keys]
    rebuild: Callable[[Mapping[Keys, Any]], Any]

    @classmethod
    def of(cls, tree: Any) -> 'Tree':
        """Flattens a tree.

        Args:
          tree: nested mappings.

        Raises:
          UserError: the tree is not a mapping, is empty, or contains a list, an object, a leaf that is not numeric, None or an
            empty dict.
        """
        if not isinstance(tree, Mapping):
            raise UserError(f'params must be nested dicts of arrays, not {type(tree).__name__}.')
        if not tree:
            raise UserError('params contains no arrays.')
        leaves: dict[str, Any] = {}
        keys: dict[str, Keys] = {}
        nodes = _leaves_of(tree, 'params', lambda node: is_box(node) or _is_empty(node))
        for path, leaf in nodes:
            name = '/'.join(_segments(path))
            if _is_empty(leaf):
                kind = 'None' if leaf is None else f'an empty {type(leaf).__name__}'
                raise UserError(f'{name} of params is {kind}, which the result cannot keep: remove it.')
            if not all(isinstance(entry, jax.tree_util.DictKey) for entry in path):
                raise UserError(f'{name} of params is in a list or an object: params must be nested dicts of arrays.')
            array = _inside(leaf)
            if not hasattr(array, 'shape') or not any(
                jnp.issubdtype(array.dtype, kind) for kind in (jnp.number, jnp.bool_)
            ):
                raise UserError(f'{name} of params is not a numeric array: pass only the parameters of the model.')
            path_keys = tuple(entry.key for entry in path)
            for end in range(1, len(path_keys) + 1):
                prefix = '/'.join(map(str, path_keys[:end]))
                if keys.setdefault(prefix, path_keys[:end]) != path_keys[:end]:
                    raise UserError(
                        f'{prefix} of params is the name of two paths: no key may contain a `/` or equal another as text.'
                    )
            leaves[name] = array
        return cls(leaves, keys, _builder(tree))

    def like(self, leaves: Mapping[str, Any]) -> Any:
        """Makes a tree of the same kind from leaves by name; new keys are strings."""
        return self.rebuild({self._keys(name): leaf for name, leaf in leaves.items()})

    def _keys(self, name: str) -> Keys:
        segments = name.split('/')
        for end in range(len(segments), 0, -1):
            if known := self.keys.get('/'.join(segments[:end])):
                return (*known, *segments[end:])
        return tuple(segments)


def _builder(tree: Mapping[Any, Any]) -> Callable[[Mapping[Keys, Any]], Any]:
    if isinstance(tree, FrozenDict):
        return lambda leaves: FrozenDict(unflatten_dict(leaves))
    nnx = sys.modules.get('flax.nnx')
    if nnx is None or not isinstance(tree, nnx.State):
        return unflatten_dict
    kinds = {path: type(variable) for path, variable in nnx.to_flat_state(tree)}
    return lambda leaves: nnx.from_flat_state(
        [(path, kinds.get(path, nnx.Param)(leaf)) for path, leaf in leaves.items()]
    )
