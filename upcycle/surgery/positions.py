"""Resizes learned positions to another grid size."""

import math

import jax
import numpy as np


def resize_positions(pos_1xLxD: jax.Array, num_positions: int) -> jax.Array:
    """Interpolates a square grid of positions bilinearly, with aligned corners.

    Matches vision_transformer and big_vision (`scipy.ndimage.zoom` of order 1).

    Args:
      pos_1xLxD: learned positions.
      num_positions: number of positions in the result.

    Returns:
      (1, num_positions, D).
    """
    old, new = math.isqrt(pos_1xLxD.shape[1]), math.isqrt(num_positions)
    at_N = np.linspace(0, old - 1, new)
    below_N = np.minimum(at_N.astype(int), max(old - 2, 0))
    weight_NxO = np.zeros((new, old), np.float32)
    weight_NxO[np.arange(new), below_N] += 1 - (at_N - below_N)
    weight_NxO[np.arange(new), np.minimum(below_N + 1, old - 1)] += at_N - below_N
    grid_OxOxD = pos_1xLxD.reshape(old, old, -1)
    with jax.default_matmul_precision('highest'):
        grid_NxNxD = jax.numpy.einsum('no,mp,opd->nmd', weight_NxO, weight_NxO, grid_OxOxD)
    return grid_NxNxD.reshape(1, new * new, -1).astype(pos_1xLxD.dtype)
