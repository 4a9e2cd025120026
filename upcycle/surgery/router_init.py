"""Ways to start a router. Pure functions `(shape (D, E), stddev, key) -> float32 kernel`, in a registry by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def normal(shape: tuple[int, ...], stddev: float, key: jax.Array) -> jax.Array:
    """Weights ~ N(0, stddev^2) (the paper: 0.02)."""
    return stddev * jax.random.normal(key, shape, jnp.float32)


def orthogonal(shape: tuple[int, ...], stddev: float, key: jax.Array) -> jax.Array:
    """Experts' vectors at right angles (as far as D has room for E), their entries' root mean square `stddev`.

    Against routers whose experts start out wanting the same tokens; asked for in mergekit's pull request 664.
    """
    D, E = shape
    # Of E <= D orthonormal columns the mean square is 1 / D; of more columns than rows, the rows are orthonormal.
    scale = stddev * jnp.sqrt(max(D, E))
    return scale * jax.nn.initializers.orthogonal()(key, shape, jnp.float32)


ROUTER_INITS: dict[str, Callable[[tuple[int, ...], float, jax.Array], jax.Array]] = {
    'normal': normal,
    'orthogonal': orthogonal,
}
