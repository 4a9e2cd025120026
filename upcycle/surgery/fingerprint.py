"""Fingerprints of leaves."""

import hashlib
from collections.abc import Iterator

import jax
import numpy as np

# Sizes of the tiles of a transposed matrix: both orders of a tile fit into a cache.
_TILE_ROWS, _TILE_COLUMNS = 64, 2048


def sha256_of(name: str, leaf: jax.Array | np.ndarray) -> str:
    """Returns the sha256 of a leaf's path, dtype, shape and bytes in C order."""
    array = np.asarray(leaf)
    digest = hashlib.sha256(f'{name}\0{array.dtype.name}\0{array.shape}\0'.encode())
    for part in in_c_order(array):
        digest.update(part)
    return digest.hexdigest()


def in_c_order(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the bytes of an array in C order: those of a transposed matrix tile by tile, without a copy of the whole."""
    if array.ndim != 2 or array.flags.c_contiguous:
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return
    numbers = array.view(f'u{array.dtype.itemsize}')  # NumPy copies its own types faster
    for first in range(0, len(numbers), _TILE_ROWS):
        rows = numbers[first : first + _TILE_ROWS]
        out = np.empty(rows.shape, numbers.dtype)
        for start in range(0, rows.shape[1], _TILE_COLUMNS):
            tile = rows[:, start : start + _TILE_COLUMNS]
            out[:, start : start + _TILE_COLUMNS] = tile.copy(order='F')
        yield out.reshape(-1).view(np.uint8)
