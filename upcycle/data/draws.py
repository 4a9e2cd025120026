"""Random numbers as a pure function of (seed, purpose, index), for a range of indices at once.

Philox is counter-based: example i uses the counters from i * n on, so a batch of consecutive examples is one call. Only raw
words are used: NumPy keeps them stable across releases, but not its distributions.
"""

from __future__ import annotations

import numpy as np

# Purposes make different uses of one seed independent.
ORDER, AUGMENT, NOISE, PHASE = 1, 2, 3, 4


def words(seed: int, purpose: int, first: int, count: int, each: int) -> np.ndarray:
    """uint64 [count, each]: random words of examples `first` to `first + count - 1`."""
    blocks = -(-each // 4)  # each counter gives four words
    philox = np.random.Philox(
        key=np.array([seed % 2**64, purpose], np.uint64), counter=np.array([first * blocks, 0, 0, 0], np.uint64)
    )
    return philox.random_raw(count * blocks * 4).reshape(count, blocks * 4)[:, :each]


def uniform(seed: int, purpose: int, first: int, count: int, each: int) -> np.ndarray:
    """float32 [count, each], uniform in [0, 1)."""
    return (words(seed, purpose, first, count, each) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def normal(seed: int, purpose: int, first: int, count: int, each: int) -> np.ndarray:
    """float32 [count, each] with mean 0 and standard deviation 1: sums of four uniforms, so at most 3.5 deviations."""
    sixteens = np.ascontiguousarray(words(seed, purpose, first, count, each)).view('<u2').reshape(count, 4, each)
    sums = sixteens[:, 0].astype(np.float32)
    for i in range(1, 4):
        sums += sixteens[:, i]
    return (sums - np.float32(2 * 65535)) * np.float32(3**0.5 / 65536)


def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """int64 [size]: the order of the examples in an epoch."""
    return np.argsort(words(seed, ORDER, epoch, 1, size)[0], kind='stable')
