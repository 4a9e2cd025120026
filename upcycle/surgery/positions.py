"""Resizes learned positions to another grid size."""

import math

import jax
import numpy as np


def resize_positions(pos_1xLxD: jax.Array | np.ndarray, num_positions: int) -> np.ndarray:
    """Interpolates a square grid of positions bilinearly, with aligned corners.

    Uses `scipy.ndimage.zoom` of order 1, as vision_transformer and big_vision do.

    Args:
      pos_1xLxD: learned positions.
      num_positions: number of positions in the result.

    Returns:
      (1, num_positions, D).
    """
    from scipy import ndimage  # not at every start

    old, new = math.isqrt(pos_1xLxD.shape[1]), math.isqrt(num_positions)
    grid_OxOxD = np.asarray(pos_1xLxD, np.float32).reshape(old, old, -1)
    grid_NxNxD = ndimage.zoom(grid_OxOxD, (new / old, new / old, 1), order=1)
    return grid_NxNxD.reshape(1, num_positions, -1).astype(pos_1xLxD.dtype)
