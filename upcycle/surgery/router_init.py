"""Ways to start a router, by name. Pure functions that give a float32 kernel (D, E)."""

import enum
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from upcycle.errors import UserError


class RouterInit(enum.StrEnum):
    """Where a router's columns, the experts' vectors, come from."""

    NORMAL = 'normal'
    ORTHOGONAL = 'orthogonal'
    HIDDEN = 'hidden'  # centres of clusters of the hidden states that the layer reads
    COPIED = 'copied'  # the checkpoint's router; a new expert has its parents' column, with a little noise
    EXTENDED = 'extended'  # the checkpoint's router; new experts' columns are drawn


# These keep the columns that a checkpoint has.
INHERITED = (RouterInit.COPIED, RouterInit.EXTENDED)


def normal(shape: tuple[int, int], stddev: float, key: jax.Array) -> jax.Array:
    """Weights ~ N(0, stddev^2) (the paper: 0.02)."""
    return stddev * jax.random.normal(key, shape, jnp.float32)


def orthogonal(shape: tuple[int, int], stddev: float, key: jax.Array) -> jax.Array:
    """Experts' vectors at right angles (as far as D has room for E), their entries' root mean square `stddev`.

    Against routers whose experts start out wanting the same tokens; asked for in mergekit's pull request 664.
    """
    D, E = shape
    # Of E <= D orthonormal columns the mean square is 1 / D; of more columns than rows, the rows are orthonormal.
    scale = stddev * jnp.sqrt(max(D, E))
    return scale * jax.nn.initializers.orthogonal()(key, shape, jnp.float32)


DRAWN: dict[RouterInit, Callable[[tuple[int, int], float, jax.Array], jax.Array]] = {
    RouterInit.NORMAL: normal,
    RouterInit.ORTHOGONAL: orthogonal,
}


def inherited(
    old_DxO: jax.Array,
    lineage: Sequence[Sequence[int]],
    init: RouterInit,
    *,
    stddev: float,
    noise: float,
    key: jax.Array,
) -> jax.Array:
    """The router of more experts than there were: the old columns as they are, then those of the new experts.

    Args:
      old_DxO: the checkpoint's router.
      lineage: for each expert, the old ones that it is made of; the first O are the old ones themselves.
      init: COPIED: the mean of the parents' columns, with noise (arXiv 2604.19835). EXTENDED: N(0, stddev^2).
      stddev: of EXTENDED.
      noise: of COPIED, as a share of the old router's own deviation.
      key: of this router.
    """
    D, O = old_DxO.shape
    drawn_DxN = jax.random.normal(key, (D, len(lineage) - O), jnp.float32)
    if init == RouterInit.EXTENDED:
        new_DxN = stddev * drawn_DxN
    else:
        parents_DxN = [old_DxO[:, jnp.asarray(parents)].mean(axis=1) for parents in lineage[O:]]
        new_DxN = jnp.stack(parents_DxN, axis=1) + noise * jnp.std(old_DxO) * drawn_DxN
    return jnp.concatenate([old_DxO, new_DxN], axis=1)


def clusters(x_NxD: jax.Array, num_columns: int, stddev: float, key: jax.Array, *, steps: int = 20) -> jax.Array:
    """Centres of clusters of hidden states, one a column, at the size of `normal`.

    Hidden states have a large common part, by which no router can tell them apart, so their mean is taken off first. Spherical
    k-means, since a router compares directions. After mergekit's `hidden` gate, whose vectors are mean hidden states of prompts.

    Args:
      x_NxD: hidden states of real tokens.
      num_columns: of the router.
      stddev: root mean square of a column's entries.
      key: chooses the first centres among the states.
      steps: of Lloyd's algorithm. A cluster that loses all its states keeps its centre.
    """

    def unit(v_NxD: jax.Array) -> jax.Array:
        return v_NxD / jnp.maximum(jnp.linalg.norm(v_NxD, axis=-1, keepdims=True), 1e-30)

    if x_NxD.shape[0] < num_columns:
        raise UserError(
            f"ROUTER_INIT = 'hidden' makes {num_columns} clusters, and a batch has {x_NxD.shape[0]} real tokens: raise "
            'BATCH_SIZE.'
        )
    x_NxD = x_NxD.astype(jnp.float32)
    x_NxD = unit(x_NxD - x_NxD.mean(axis=0))
    first = jax.random.choice(key, x_NxD.shape[0], (num_columns,), replace=False)

    def step(centre_CxD: jax.Array, _: None) -> tuple[jax.Array, None]:
        nearest_NxC = jax.nn.one_hot((x_NxD @ centre_CxD.T).argmax(axis=-1), num_columns)
        sum_CxD = nearest_NxC.T @ x_NxD
        return jnp.where(nearest_NxC.sum(axis=0)[:, None] > 0, unit(sum_CxD), centre_CxD), None

    centre_CxD, _ = jax.lax.scan(step, x_NxD[first], None, length=steps)
    return stddev * jnp.sqrt(x_NxD.shape[1]) * centre_CxD.T
