"""Images as sequences of patches, and fixed position embeddings."""

import jax
import numpy as np


def to_patches(image: jax.Array, patch_size: int) -> jax.Array:
    """Turns (B, height, width, channels) into (B, patches, patch_size * patch_size * channels), patches row by row."""
    B, height, width, channels = image.shape
    rows, columns = height // patch_size, width // patch_size
    x = image.reshape(B, rows, patch_size, columns, patch_size, channels).swapaxes(2, 3)
    return x.reshape(B, rows * columns, patch_size * patch_size * channels)


def sincos2d(grid: int, width: int, temperature: float = 10_000.0) -> np.ndarray:
    """Returns fixed position embeddings (1, grid * grid, width), float32: sin(x), cos(x), sin(y), cos(y) at falling frequencies.

    As big_vision's `posemb_sincos_2d`, after MoCo v3.
    """
    y, x = np.mgrid[:grid, :grid]
    frequency = 1.0 / temperature ** (np.arange(width // 4) / (width // 4 - 1))
    y, x = y.reshape(-1)[:, None] * frequency, x.reshape(-1)[:, None] * frequency
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)[None].astype(np.float32)
