"""Router initialisations, by name: pure functions that return a float32 kernel (D, E)."""

import enum
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from upcycle.errors import UserError


class RouterInit(enum.StrEnum):
    """The source of a router's columns, one per expert."""

    NORMAL = 'normal'
    ORTHOGONAL = 'orthogonal'
    HIDDEN = 'hidden'  # cluster centres of the hidden states that the layer reads, or means of those of each expert's prompts
    COPIED = 'copied'  # the checkpoint's router; new experts copy their parents' columns with a little noise
    EXTENDED = 'extended'  # the checkpoint's router; columns of new experts are drawn


# These keep the columns of the checkpoint.
INHERITED = (RouterInit.COPIED, RouterInit.EXTENDED)


def normal(shape: tuple[int, int], stddev: float, key: jax.Array) -> jax.Array:
    """Draws weights from N(0, stddev^2); 0.02 in the paper."""
    return stddev * jax.random.normal(key, shape, jnp.float32)


def orthogonal(shape: tuple[int, int], stddev: float, key: jax.Array) -> jax.Array:
    """Draws orthogonal columns (if E <= D) whose entries have root mean square `stddev`.

    Experts then do not start with the same preferences; requested in mergekit's pull request 664.
    """
    D, E = shape
    # The mean square of E <= D orthonormal columns is 1 / D; with E > D the rows are orthonormal.
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
    """Extends a router to more experts: the old columns unchanged, then those of the new experts.

    Args:
      old_DxO: the checkpoint's router.
      lineage: parents of each expert; the first O experts are the old ones.
      init: COPIED: the mean of the parents' columns, with noise (arXiv 2604.19835). EXTENDED: N(0, stddev^2).
      stddev: standard deviation for EXTENDED.
      noise: noise for COPIED, relative to the standard deviation of the old router.
      key: key of this router.
    """
    D, O = old_DxO.shape
    drawn_DxN = jax.random.normal(key, (D, len(lineage) - O), jnp.float32)
    if init == RouterInit.EXTENDED:
        new_DxN = stddev * drawn_DxN
    else:
        parents_DxN = [old_DxO[:, jnp.asarray(parents)].mean(axis=1) for parents in lineage[O:]]
        new_DxN = jnp.stack(parents_DxN, axis=1) + noise * jnp.std(old_DxO) * drawn_DxN
    return jnp.concatenate([old_DxO, new_DxN], axis=1)


def of_means(mean_ExD: jax.Array, stddev: float) -> jax.Array:
    """Returns the directions of mean hidden states as router columns (D, E), with the scale of `normal`.

    As mergekit's `hidden` gate, whose vectors have length 1: `stddev` = D ** -0.5.
    """
    mean_ExD = mean_ExD.astype(jnp.float32)
    return stddev * jnp.sqrt(mean_ExD.shape[1]) * _unit(mean_ExD).T


def _unit(v_NxD: jax.Array) -> jax.Array:
    return v_NxD / jnp.maximum(jnp.linalg.norm(v_NxD, axis=-1, keepdims=True), 1e-30)


def clusters(x_NxD: jax.Array, num_columns: int, stddev: float, key: jax.Array) -> jax.Array:
    """Clusters hidden states and returns the centres as router columns, with the scale of `normal`.

    The mean is subtracted first, because it does not distinguish the states. Uses 20 steps of spherical k-means, because a
    router compares directions. An empty cluster keeps its centre. After mergekit's `hidden` gate, whose vectors are mean hidden
    states of prompts.

    Args:
      x_NxD: hidden states of real tokens.
      num_columns: number of router columns.
      stddev: root mean square of a column's entries.
      key: key for choosing the initial centres among the states.
    """
    if x_NxD.shape[0] < num_columns:
        raise UserError(
            f"ROUTER_INIT = 'hidden' makes {num_columns} clusters, and a batch has {x_NxD.shape[0]} real tokens: raise "
            'BATCH_SIZE.'
        )
    x_NxD = x_NxD.astype(jnp.float32)
    x_NxD = _unit(x_NxD - x_NxD.mean(axis=0))
    first = jax.random.choice(key, x_NxD.shape[0], (num_columns,), replace=False)

    def step(centre_CxD: jax.Array, _: None) -> tuple[jax.Array, None]:
        nearest_NxC = jax.nn.one_hot((x_NxD @ centre_CxD.T).argmax(axis=-1), num_columns)
        sum_CxD = nearest_NxC.T @ x_NxD
        return jnp.where(nearest_NxC.sum(axis=0)[:, None] > 0, _unit(sum_CxD), centre_CxD), None

    centre_CxD, _ = jax.lax.scan(step, x_NxD[first], None, length=20)
    return stddev * jnp.sqrt(x_NxD.shape[1]) * centre_CxD.T
