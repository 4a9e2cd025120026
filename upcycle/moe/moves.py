"""Moving rows: every move and its gradient is a gather, since scattered rows are slow to add up, one by one on a TPU."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Move(NamedTuple):
    """A partial one-to-one mapping of R rows to Q places.

    Attributes:
      row_Q: int32, the row at each place; R for a place without a row.
      place_R: int32, the place of each row; Q for a row without a place.
    """

    row_Q: jax.Array
    place_R: jax.Array

    def inverse(self) -> 'Move':
        """Returns the mapping of places to rows."""
        return Move(self.place_R, self.row_Q)


def by_key(key_R: jax.Array, num_keys: int) -> tuple[Move, jax.Array]:
    """Sorts rows by key, stably.

    Args:
      key_R: int32, from 0 to `num_keys`; rows of the last sort to the end and have no place in a run.
      num_keys: number of runs.

    Returns:
      The move, and the length of each run.
    """
    row_R = jnp.argsort(key_R, stable=True).astype(jnp.int32)
    sizes = jnp.zeros(num_keys, jnp.int32).at[key_R].add(1, mode='drop')
    return Move(row_R, jnp.argsort(row_R).astype(jnp.int32)), sizes


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def moved(x_NxD: jax.Array, move: Move, copies: int = 1) -> jax.Array:
    """Moves rows to their places, (Q, D); a place without a row holds zeros.

    Args:
      x_NxD: each is `copies` successive rows of the mapping, R = N * `copies`.
      move: the mapping.
      copies: K if rows are the choices of tokens. The gradient is summed over them in float32.
    """
    return x_NxD.at[move.row_Q // copies].get(mode='fill', fill_value=0)


def _forward(x_NxD: jax.Array, move: Move, copies: int) -> tuple[jax.Array, Move]:
    return moved(x_NxD, move, copies), move


def _backward(copies: int, move: Move, dy_QxD: jax.Array) -> tuple[jax.Array, None]:
    dx_RxD = dy_QxD.at[move.place_R].get(mode='fill', fill_value=0)
    if copies == 1:
        return dx_RxD, None
    dx_NxKxD = dx_RxD.reshape(-1, copies, dx_RxD.shape[-1])
    return dx_NxKxD.sum(axis=1, dtype=jnp.float32).astype(dx_RxD.dtype), None


moved.defvjp(_forward, _backward)
