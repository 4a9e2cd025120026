"""Parameter trees of Flax linen, NNX and nested dicts as flat dicts of arrays, and back."""

import dataclasses
import sys
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import FrozenDict
from flax.traverse_util import unflatten_dict

from upcycle.errors import UserError

Keys = tuple[Hashable, ...]


def _is_variable(node: Any) -> bool:
    # A tree can hold one only where NNX has been imported, which takes a while.
    nnx = sys.modules.get('flax.nnx')
    return nnx is not None and isinstance(node, nnx.Variable)


def is_box(node: Any) -> bool:
    """Whether a node is metadata around one array: `nn.Partitioned`, `nn.LogicallyPartitioned`, `nnx.Param`."""
    return isinstance(node, nn.meta.AxisMetadata) or _is_variable(node)


def _inside(leaf: Any) -> Any:
    """The array of a leaf, without its box."""
    if not is_box(leaf):
        return leaf
    (array,) = jax.tree.leaves(leaf)
    return array


def segments_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys of a path of `jax.tree_util` as text."""
    return tuple(str(_key(entry)) for entry in path)


def _key(entry: Any) -> Hashable:
    for attribute in ('key', 'name', 'idx'):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return str(entry)


def arrays_of(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
    """The path and the array, without its box, of every leaf of any pytree, in the order of `jax.tree.leaves`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)
    return [(segments_of(path), _inside(leaf)) for path, leaf in leaves]


@dataclasses.dataclass(frozen=True)
class Tree:
    """A parameter tree, taken apart.

    Attributes:
      leaves: arrays, or their shapes, by the keys of their paths joined with '/'. Boxes are taken off.
      keys: the keys of every path and of its beginnings, by their text.
      rebuild: makes a tree of the same kind from leaves by their keys: plain dicts, a FrozenDict, or an NNX State.
    """

    leaves: Mapping[str, Any]
    keys: Mapping[str, Keys]
    rebuild: Callable[[Mapping[Keys, Any]], Any]

    @classmethod
    def of(cls, tree: Any, called: str = 'params') -> 'Tree':
        """Takes a tree apart.

        Args:
          tree: nested mappings.
          called: its name in messages.

        Raises:
          UserError: it is no mapping or empty, holds a list or an object, or a leaf that is no array of numbers.
        """
        if not isinstance(tree, Mapping):
            raise UserError(f'{called} must be nested dicts of arrays, not {type(tree).__name__}.')
        found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)
        leaves: dict[str, Any] = {}
        keys: dict[str, Keys] = {}
        for path, leaf in found:
            name = '/'.join(segments_of(path))
            if not all(isinstance(entry, jax.tree_util.DictKey) for entry in path):
                raise UserError(
                    f'{name} of {called} lies in a list or an object: parameters must be nested dicts of arrays.'
                )
            array = _inside(leaf)
            if not hasattr(array, 'shape') or jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
                raise UserError(f'{name} of {called} is no array of numbers: pass the parameters of the model only.')
            whole = tuple(entry.key for entry in path)
            for end in range(1, len(whole) + 1):
                beginning = '/'.join(map(str, whole[:end]))
                if keys.setdefault(beginning, whole[:end]) != whole[:end]:
                    raise UserError(
                        f'{beginning} of {called} is two paths: no key may hold a `/` or equal another as text.'
                    )
            leaves[name] = array
        if not leaves:
            raise UserError(f'{called} holds no array.')
        return cls(leaves, keys, _builder(tree))

    def like(self, leaves: Mapping[str, Any]) -> Any:
        """A tree of the same kind of other leaves by their names; keys that are new are text."""
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
