"""Fingerprints of leaves."""

import hashlib

import jax
import numpy as np


def sha256_of(name: str, leaf: jax.Array | np.ndarray) -> str:
    """Returns the sha256 of a leaf's path, dtype, shape and bytes in C order."""
    array = np.ascontiguousarray(leaf)
    digest = hashlib.sha256(f'{name}\0{array.dtype.name}\0{array.shape}\0'.encode())
    digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()
