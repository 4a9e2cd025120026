"""Maps the state of a foreign optimizer to parameters, leaf by leaf."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from upcycle import trees
from upcycle.foreign.outline import Named, Outline, named, ours, refuse_all
from upcycle.foreign.rules import State
from upcycle.surgery.plan import COUNT, EXPERT, PARAMS, STATES, OptimizerState, Surgery, is_clock


@dataclasses.dataclass(frozen=True)
class OptimizerTree:
    """The optimizer state that the sparse model needs.

    Attributes:
      names: our names of its leaves, in tree order.
      structure: the tree structure.
    """

    names: tuple[str, ...]
    structure: Any


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
      UserError: the expert axis of a leaf is ambiguous, or the number of steps is unknown.
    """
    owners = dict.fromkeys(outline.dropped, '') | {source.name: name for name, source in outline.sources.items()}
    for keys, leaf in [] if state.opt_state is None else trees.arrays_of(state.opt_state):
        owner, slot = _owner(keys, owners)
        if owner == '':
            outline.dropped[_path(keys)] = 'its parameter is dropped'
            continue
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


def _add_targets(outline: Outline, state: State, abstract: Any, surgery: Surgery) -> OptimizerTree:
    """Adds the leaves that the sparse model needs."""
    mistakes: list[str] = []
    owners = {target.name: name for name, target in outline.targets.items()}
    names = []
    for keys, leaf in trees.arrays_of(abstract):
        owner, slot = _owner(keys, owners)
        if owner is None:
            name, made = _ownerless(keys, leaf), named(_path(keys), leaf)
            lacks_clock = is_clock(name) and name not in outline.sources and state.step is None
            if lacks_clock and surgery.optimizer_state is not OptimizerState.FRESH_CLOCK:
                mistakes.append(
                    f"{made.name} counts steps, and their number is unknown: set `step`, or use 'fresh_clock'."
                )
        else:
            name, made = _of_parameter(outline, owner, slot, _path(keys), leaf, mistakes)
        outline.targets[name] = made
        names.append(name)
    refuse_all('The optimizer state does not fit', mistakes)
    return OptimizerTree(tuple(names), jax.tree.structure(abstract))


def _of_parameter(
    outline: Outline, owner: str, slot: str, path: str, leaf: Any, mistakes: list[str]
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
    experts = parameter.leaf.shape[0]
    if parameter.order or shape[:1] != (experts,):
        mistakes.append(
            f'{path} {shape} has another shape than {parameter.name} {parameter.shape}, and its first axis is not the '
            f'{experts} experts: put the expert axis first, or do not pass the optimizer state.'
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
