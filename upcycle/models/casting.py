"""Which arguments of a function are cast before anything else is done with them, found out from its jaxpr."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxprs_in_params

# Operations that move numbers and change none, so that a cast may come before them as well. Output i is made of input i.
_MOVES = {
    *('broadcast_in_dim', 'copy', 'dynamic_slice', 'gather', 'optimization_barrier', 'pcast', 'pvary', 'reshape'),
    *('rev', 'sharding_constraint', 'slice', 'squeeze', 'transpose'),
}
# All that a loop reads is needed as it is: a step may read what an earlier one has made. The parameters of our layers are read by
# none.
_LOOPS = {'scan', 'while'}


def needed_as_they_are(function: Callable[..., Any], dtype: Any, tree: Any, *arguments: Any) -> Any:
    """For each leaf of a function's first argument, whether the function needs it in the type that it has.

    Args:
      function: is traced, not run.
      dtype: a type to cast to.
      tree: the first argument, arrays or their shapes.
      *arguments: the others.

    Returns:
      A tree of bools. False: all that the function does with the leaf is to cast it to `dtype`, so that a leaf that has been
      cast before gives the same result.
    """
    leaves, structure = jax.tree.flatten(tree)
    closed = jax.make_jaxpr(function)(tree, *arguments)
    needed = _needed(closed.jaxpr, [True] * len(closed.jaxpr.outvars), jnp.dtype(dtype))
    return jax.tree.unflatten(structure, needed[: len(leaves)])


def _needed(jaxpr: Any, outputs: Sequence[bool], dtype: Any) -> list[bool]:
    """Of each input, whether it is needed in its own type where the outputs marked True are."""
    needed = {var for var, yes in zip(jaxpr.outvars, outputs, strict=True) if yes and not isinstance(var, Literal)}
    for equation in reversed(jaxpr.eqns):
        for var, yes in zip(equation.invars, _needed_by(equation, needed, dtype), strict=True):
            if yes and not isinstance(var, Literal):
                needed.add(var)
    return [var in needed for var in jaxpr.invars]


def _needed_by(equation: Any, needed: set[Any], dtype: Any) -> list[bool]:
    """Of each input of one operation, whether it is needed in its own type; `needed` holds the outputs that are."""
    name, number = equation.primitive.name, len(equation.invars)
    outputs = [var in needed for var in equation.outvars]
    if name == 'convert_element_type' and equation.params['new_dtype'] == dtype:
        return [False]
    if name in _MOVES:
        # Indices come after what they choose from.
        return [*outputs, *[True] * (number - len(outputs))]
    inner = list(jaxprs_in_params(equation.params))
    first = 1 if name == 'cond' else 0  # the number of the branch
    same = all((len(each.invars), len(each.outvars)) == (number - first, len(outputs)) for each in inner)
    if not inner or not same or name in _LOOPS:
        return [True] * number
    found = [_needed(each, outputs, dtype) for each in inner]
    return [True] * first + [any(flags) for flags in zip(*found, strict=True)]
