"""Finds, from a function's jaxpr, the arguments that it casts before it does anything else with them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxprs_in_params

# Operations that move numbers without changing them, so that a cast may come first as well. Output i comes from input i.
_MOVES = {
    *(
        'all_gather',
        'broadcast_in_dim',
        'copy',
        'dynamic_slice',
        'gather',
        'optimization_barrier',
        'pcast',
        'pvary',
        'reshape',
    ),
    *('rev', 'sharding_constraint', 'slice', 'squeeze', 'transpose'),
}
# Inputs of loops are needed as they are, since an iteration may read results of an earlier one. No loop reads our layers'
# parameters.
_LOOPS = {'scan', 'while'}


def needed_as_they_are(function: Callable[..., Any], dtype: Any, tree: Any, *arguments: Any) -> Any:
    """Returns for each leaf of a function's first argument whether the function needs it in its own type.

    Args:
      function: traced, not run.
      dtype: a type to cast to.
      tree: the first argument, arrays or their shapes.
      *arguments: the other arguments.

    Returns:
      A tree of bools, False where the function only casts the leaf to `dtype`, so that it may be cast beforehand.
    """
    leaves, structure = jax.tree.flatten(tree)
    closed = jax.make_jaxpr(function)(tree, *arguments)
    needed = _needed(closed.jaxpr, [True] * len(closed.jaxpr.outvars), jnp.dtype(dtype))
    return jax.tree.unflatten(structure, needed[: len(leaves)])


def _needed(jaxpr: Any, outputs: Sequence[bool], dtype: Any) -> list[bool]:
    """Returns for each input whether it is needed in its own type, given which outputs are."""
    needed = {var for var, yes in zip(jaxpr.outvars, outputs, strict=True) if yes and not isinstance(var, Literal)}
    for equation in reversed(jaxpr.eqns):
        for var, yes in zip(equation.invars, _needed_by(equation, needed, dtype), strict=True):
            if yes and not isinstance(var, Literal):
                needed.add(var)
    return [var in needed for var in jaxpr.invars]


def _needed_by(equation: Any, needed: set[Any], dtype: Any) -> list[bool]:
    """Returns for each input of one operation whether it is needed in its own type; `needed` holds such variables."""
    name, number = equation.primitive.name, len(equation.invars)
    outputs = [var in needed for var in equation.outvars]
    if name == 'convert_element_type' and equation.params['new_dtype'] == dtype:
        return [False]
    if name in _MOVES:
        # Indices follow the arrays that they index.
        return [*outputs, *[True] * (number - len(outputs))]
    inner = list(jaxprs_in_params(equation.params))
    first = 1 if name == 'cond' else 0  # the index of the branch
    same = all((len(each.invars), len(each.outvars)) == (number - first, len(outputs)) for each in inner)
    if not inner or not same or name in _LOOPS:
        return [True] * number
    by_branch = [_needed(each, outputs, dtype) for each in inner]
    return [True] * first + [any(flags) for flags in zip(*by_branch, strict=True)]
