"""Maps the state of a foreign optimizer to parameters, leaf by leaf."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from upcycle import trees
from upcycle.errors import UserError
from upcycle.foreign.outline import Named, Outline, named, ours, refuse_all
from upcycle.foreign.rules import State
from upcycle.surgery.plan import COUNT, EXPERT, PARAMS, STATES, OptimizerState, Surgery, is_clock


@dataclasses.dataclass(frozen=True)
class OptimizerTree:
    """The optimizer state that the sparse model needs.

    Attributes:
      names: our names of its leaves, in tree order.
      structure: the tree structure.
      keys: by name, the implementation of each typed random key; leaves hold its data.
    """

    names: tuple[str, ...]
    structure: Any
    keys: Mapping[str, Any]

    def of(self, leaves: Mapping[str, jax.Array]) -> Any:
        """Makes the state from its leaves."""
        typed = {name: jax.random.wrap_key_data(leaves[name], impl=impl) for name, impl in self.keys.items()}
        return jax.tree.unflatten(self.structure, [typed.get(name, leaves[name]) for name in self.names])


def add_state(outline: Outline, arrays: dict[str, Any], state: State, target: Any, surgery: Surgery) -> OptimizerTree:
    """Adds the leaves of an optimizer's state to an outline of parameters.

    Args:
      outline: the outline.
      arrays: filled with the source leaves, by our names.
      state: the source state.
      target: the sparse model's parameters, abstract, in a tree of the user's kind.
      surgery: the specification, with its optimizer-state policy.

    Returns:
      The names and structure of the target state.

    Raises:
      UserError: `opt_state` is not a state of this optimizer, a leaf of the dense state does not fit the experts, or the number
        of steps is unknown.
    """
    given = _given(state)
    owners = dict.fromkeys(outline.dropped, '') | {source.name: name for name, source in outline.sources.items()}
    for keys, leaf in given:
        owner, slot = _owner(keys, owners)
        if owner == '':
            outline.dropped[_path(keys)] = 'its parameter is dropped'
            continue
        leaf = without_key_type(leaf)
        name, order = _ownerless(keys, leaf), ()
        if owner is not None:
            name = _state_of(owner, slot)
            order = outline.sources[owner].order if len(leaf.shape) == len(outline.sources[owner].order) else ()
        outline.sources[name] = named(_path(keys), leaf, order)
        arrays[name] = leaf
    if state.step is not None:
        arrays['step'] = jnp.asarray(state.step, jnp.int32)
        outline.sources['step'] = named('step', arrays['step'])
    return _add_targets(outline, state, jax.eval_shape(state.init, target), surgery)


def without_key_type(leaf: Any) -> Any:
    """Returns the data of a typed random key, or its shape; other leaves unchanged."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    is_array = isinstance(leaf, jax.Array)
    return jax.random.key_data(leaf) if is_array else jax.eval_shape(jax.random.key_data, leaf)


def _key_impl(key: jax.ShapeDtypeStruct) -> Any:
    """Returns the implementation of an abstract random key; `jax.random.key_impl` takes only arrays and tracers."""
    impls: list[Any] = []
    jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), key)
    return impls[0]


def _given(state: State) -> list[tuple[tuple[str, ...], Any]]:
    """Returns the path and the array of every leaf of `opt_state`.

    Raises:
      UserError: a path or a shape differs from the state that `init` makes for the same parameters, or a leaf is not an array.
    """
    try:
        made = jax.eval_shape(state.init, state.params)
    except TypeError as error:
        if 'not a valid JAX type' not in str(error):
            raise
        raise UserError(f'init must return a tree of arrays, such as tx.init does: {error}') from None
    if jax.tree_util.all_leaves([made]):
        raise UserError('init must return the initial state of the optimizer, such as tx.init does, not an array.')
    if state.opt_state is None:
        return []
    leaves = trees.arrays_of(state.opt_state)
    for keys, leaf in leaves:
        if not isinstance(leaf, int | float) and not hasattr(leaf, 'dtype'):
            raise UserError(f'{_path(keys)} = {leaf!r} is not an array: pass only the state that init makes.')
    leaves = [(keys, leaf if hasattr(leaf, 'dtype') else jnp.asarray(leaf)) for keys, leaf in leaves]
    wanted, given = (
        {_path(keys): tuple(leaf.shape) for keys, leaf in tree} for tree in (trees.arrays_of(made), leaves)
    )
    if path := next((path for path in (*wanted, *given) if wanted.get(path) != given.get(path)), None):
        raise UserError(
            f'opt_state is not the state that init makes for these parameters: {path} is {given.get(path, "missing")} in '
            f'opt_state and {wanted.get(path, "missing")} in the result of init. Pass the `init` of the optimizer that made it.'
        )
    return leaves


def _add_targets(outline: Outline, state: State, abstract: Any, surgery: Surgery) -> OptimizerTree:
    """Adds the leaves that the sparse model needs."""
    mistakes: list[str] = []
    owners = {target.name: name for name, target in outline.targets.items()}
    names, impls = [], {}
    for keys, leaf in trees.arrays_of(abstract):
        typed, leaf = leaf, without_key_type(leaf)
        owner, slot = _owner(keys, owners)
        if owner is None:
            name, made = _ownerless(keys, leaf), named(_path(keys), leaf)
            if state.opt_state is None and not is_clock(name):
                name = f'opt_state/{name}'  # initial, as moments are
            lacks_clock = is_clock(name) and name not in outline.sources and state.step is None
            if lacks_clock and surgery.optimizer_state is not OptimizerState.FRESH_CLOCK:
                mistakes.append(
                    f"{made.name} counts steps, and their number is unknown: set `step`, or use 'fresh_clock'."
                )
        else:
            name, made = _of_parameter(outline, owner, slot, _path(keys), leaf, surgery, mistakes)
        if typed is not leaf:
            impls[name] = _key_impl(typed)
        outline.targets[name] = made
        names.append(name)
    refuse_all('The optimizer state does not fit', mistakes)
    return OptimizerTree(tuple(names), jax.tree.structure(abstract), impls)


def _of_parameter(
    outline: Outline, owner: str, slot: str, path: str, leaf: Any, surgery: Surgery, mistakes: list[str]
) -> tuple[str, Named]:
    """Returns our name and description of a state leaf of a target parameter."""
    parameter = outline.targets[owner]
    shape = tuple(leaf.shape)
    if shape == parameter.shape:
        return _state_of(owner, slot), named(path, leaf, parameter.order, parameter.axes)
    if EXPERT not in owner.split('/'):
        return _state_of(owner, slot), named(path, leaf)
    if math.prod(shape) <= 1:  # a placeholder, as in optax for a moment that is not factored
        return _state_of(parameter.dense, slot), named(path, leaf)
    if surgery.optimizer_state is not OptimizerState.TILE:
        return _state_of(owner, slot), named(path, leaf)
    dense = outline.sources.get(_state_of(parameter.dense, slot))
    if parameter.order or (dense is not None and shape[1:] != dense.shape) or shape[:1] != parameter.leaf.shape[:1]:
        way_out = 'put the expert axis first, or use' if parameter.order else 'use'
        mistakes.append(
            f'{path} {shape} cannot be repeated over the experts of {parameter.name} {parameter.shape}, because it is '
            f"factored or stacked along other axes than the dense state: {way_out} optimizer_state='fresh'."
        )
    return _state_of(owner, slot), named(path, leaf, (), ('expert', *(None,) * (len(shape) - 1)))


def _state_of(parameter: str, slot: str) -> str:
    return f'{STATES}{parameter.removeprefix(PARAMS)}/{ours(slot)}'


def _owner(keys: tuple[str, ...], names: Mapping[str, str]) -> tuple[str | None, str]:
    """Finds the longest parameter path within `keys`. Returns its entry in `names` and the remaining keys, or (None, '')."""
    for length in range(len(keys), 0, -1):
        for start in range(len(keys) - length + 1):
            owner = names.get('/'.join(keys[start : start + length]))
            if owner is not None:
                return owner, '.'.join((*keys[:start], *keys[start + length :])) or 'state'
    return None, ''


def _ownerless(keys: Iterable[str], leaf: Any) -> str:
    """Names a leaf that belongs to no parameter: a clock, or a leaf that is kept."""
    path = ours('.'.join(keys))
    counts = tuple(leaf.shape) == () and jnp.issubdtype(leaf.dtype, jnp.integer)
    return f'{COUNT}/{path}' if counts else f'kept/{path}'


def _path(keys: Iterable[str]) -> str:
    return '/'.join(('opt_state', *keys))
