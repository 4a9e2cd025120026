"""The loss of a language model's head, whose logits are computed for a part of the vocabulary at a time.

All logits of a batch would be the largest array of a step: 2 GB for 4096 tokens and a vocabulary of 128 thousand.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from upcycle import partitioning
from upcycle.models import losses, memory

Chunk = int | Literal['auto'] | None

# 'auto': bytes of a device's logits that are computed at once, and of a part of more. Parts cost time: one of the head's three
# products is computed twice (docs/performance.md).
_WHOLE = 2**30
_PART = 2**29
_LANES = 128  # of a TPU's registers


@dataclasses.dataclass(frozen=True)
class Head:
    """The last layer of a model.

    Attributes:
      kernel: float32 (D, V), or (V, D) if it is the embedding.
      axes: logical axes of the kernel.
      logits: computes float32 (..., V) from the kernel, or some of its rows or columns, and (..., D). It holds no arrays.
    """

    kernel: jax.Array
    axes: tuple[str, str]
    logits: Callable[[jax.Array, jax.Array], jax.Array]


def head_sums(
    head: Head,
    x_BxLxD: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    *,
    chunk: Chunk,
    z_loss: float,
    label_smoothing: float,
) -> dict[str, jax.Array]:
    """Returns `losses.target_sums` of the head's logits.

    Args:
      head: see `Head`.
      x_BxLxD: input of the head.
      targets_BxL: int32.
      weights_BxL: of the targets.
      chunk: most entries of a device's vocabulary whose logits are computed at once; None: all; 'auto': all up to 1 GiB of
        logits on a device, else 512 MiB at once.
      z_loss, label_smoothing: see `losses.cross_entropy`.
    """
    parts = _parts_of(head, targets_BxL, chunk)
    if parts.count == 1:
        logits_BxLxV = head.logits(*memory.both_gradients(head.kernel, x_BxLxD))
        return losses.target_sums(
            logits_BxLxV, targets_BxL, weights_BxL, z_loss=z_loss, label_smoothing=label_smoothing
        )
    smoothing = losses.Smoothing(parts.size * parts.shards, z_loss, label_smoothing)
    return losses.weighted_sums(*_cross_entropy(head, parts, smoothing, x_BxLxD, targets_BxL), weights_BxL)


class _Slice(NamedTuple):
    """A part of the vocabulary: of each shard, `width` consecutive entries.

    Attributes:
      first: the first entry, within a shard.
      id_V: int32, numbers of the entries in the whole vocabulary.
      new_V: which entries are in no earlier part; None if all are.
    """

    first: jax.Array
    id_V: jax.Array
    new_V: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Parts:
    """How a vocabulary is cut.

    Attributes:
      axis: of the kernel.
      shards: parts of the vocabulary on different devices.
      size: entries of a shard.
      width: entries of a shard in a part; the last part overlaps the one before if `size` is not a multiple.
    """

    axis: int
    shards: int
    size: int
    width: int

    @property
    def count(self) -> int:
        """The number of parts."""
        return -(-self.size // self.width)

    def split(self, kernel: jax.Array) -> jax.Array:
        """Splits the vocabulary into (shards, size), so that slices of it stay on their devices."""
        shape = list(kernel.shape)
        shape[self.axis : self.axis + 1] = [self.shards, self.size]
        return kernel.reshape(shape)

    def slice(self, index: jax.Array) -> _Slice:
        """Returns a part by its number."""
        first = jnp.minimum(index * self.width, self.size - self.width)
        own_V = first + jnp.arange(self.width, dtype=index.dtype)
        id_V = (jnp.arange(self.shards, dtype=index.dtype)[:, None] * self.size + own_V).reshape(-1)
        new_V = None if self.size % self.width == 0 else jnp.tile(own_V >= index * self.width, self.shards)
        return _Slice(first, id_V, new_V)

    def take(self, kernel: jax.Array, part: _Slice) -> jax.Array:
        """Returns a part of a kernel that `split` has split, in the kernel's form."""
        own = jax.lax.dynamic_slice_in_dim(kernel, part.first, self.width, self.axis + 1)
        shape = [size for axis, size in enumerate(own.shape) if axis != self.axis + 1]
        shape[self.axis] = self.shards * self.width
        return own.reshape(shape)

    def put(self, kernel: jax.Array, own: jax.Array, part: _Slice) -> jax.Array:
        """Writes the new entries of a part into a kernel that `split` has split."""
        if part.new_V is not None:
            new_V = part.new_V[:, None] if self.axis == 0 else part.new_V
            own = jnp.where(new_V, own, self.take(kernel, part))
        shape = list(kernel.shape)
        shape[self.axis + 1] = self.width
        return jax.lax.dynamic_update_slice_in_dim(kernel, own.reshape(shape), part.first, self.axis + 1)


def _parts_of(head: Head, targets_BxL: jax.Array, chunk: Chunk) -> _Parts:
    axis = head.axes.index('vocab')
    size = partitioning.split_size(head.axes, head.kernel.shape, 'vocab')
    if chunk == 'auto':
        shards = partitioning.batch_shards(partitioning.current_mesh())
        column = 4 * targets_BxL.size / shards
        chunk = None if column * size <= _WHOLE else max(1, int(_PART / column))
    width = size if chunk is None else _width(size, min(chunk, size))
    return _Parts(axis, head.kernel.shape[axis] // size, size, width)


def _width(size: int, most: int) -> int:
    """Returns a width of parts, at most `most` and not much less: one that divides `size` if there is one.

    Masks of an overlap take the TPU a fourth of the whole time.
    """
    fewest = -(-size // most)
    counts = [count for count in range(fewest, 2 * fewest) if size % count == 0]
    aligned = [count for count in counts if size // count % _LANES == 0]
    return size // min(aligned or counts) if counts else most


def _cross_entropy(
    head: Head, parts: _Parts, smoothing: losses.Smoothing, x_BxLxD: jax.Array, targets_BxL: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the loss of each target, its z-loss, and whether its logit is the largest; all (B, L).

    The first pass over the parts computes each token's normaliser, the second, in the backward pass, both gradients of a part.
    """
    numbers = jnp.arange(parts.count, dtype=targets_BxL.dtype)

    def derivative(kernel: jax.Array, part: _Slice, x_BxLxD: jax.Array) -> tuple[jax.Array, Callable[..., Any]]:
        own = partitioning.constrain(parts.take(kernel, part), head.axes)
        logits_BxLxV, pull = jax.vjp(head.logits, own, x_BxLxD)
        return partitioning.constrain(logits_BxLxV, ('batch', None, 'vocab')), pull

    def forward(kernel: jax.Array, x_BxLxD: jax.Array, targets_BxL: jax.Array) -> tuple[Any, Any]:
        split = parts.split(kernel)

        def body(seen: losses.Seen, number: jax.Array) -> tuple[losses.Seen, None]:
            part = parts.slice(number)
            logits_BxLxV, _ = derivative(split, part, x_BxLxD)
            return seen.add(logits_BxLxV, targets_BxL, part.id_V, part.new_V), None

        start = losses.Seen.nothing(targets_BxL, label_smoothing=smoothing.label_smoothing)
        seen, _ = jax.lax.scan(body, start, numbers)
        results = (*smoothing.losses(seen), seen.best_BxL == targets_BxL)
        return results, (kernel, x_BxLxD, targets_BxL, seen.normalizer())

    def backward(kept: Any, cotangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, None]:
        kernel, x_BxLxD, targets_BxL, log_z_BxL = kept
        float_BxLxD = x_BxLxD.astype(jnp.float32)  # its gradient is a sum over parts

        def body(carry: tuple[jax.Array, jax.Array], number: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            kernel, dx_BxLxD = carry
            part = parts.slice(number)
            logits_BxLxV, pull = derivative(kernel, part, float_BxLxD)
            is_target_BxLxV = part.id_V == targets_BxL[..., None]
            dlogits_BxLxV = smoothing.derivative(logits_BxLxV, is_target_BxLxV, log_z_BxL, cotangents[:2])
            if part.new_V is not None:
                dlogits_BxLxV = jnp.where(part.new_V, dlogits_BxLxV, 0.0)
            down, more_BxLxD = pull(dlogits_BxLxV)
            return (parts.put(kernel, down, part), dx_BxLxD + more_BxLxD), None

        # The gradient of a part is written over the part of the kernel that was read: where the kernel is, and without zeros.
        (split, dx_BxLxD), _ = jax.lax.scan(body, (parts.split(kernel), jnp.zeros_like(float_BxLxD)), numbers)
        return split.reshape(kernel.shape), dx_BxLxD.astype(x_BxLxD.dtype), None

    run = jax.custom_vjp(lambda *operands: forward(*operands)[0])
    run.defvjp(forward, backward)
    return run(head.kernel, x_BxLxD, targets_BxL)
