"""The loss of a language model's head, whose logits are computed for a part of the tokens at a time.

All logits of a batch would be the largest array of a step: 2 GB for 4096 tokens and a vocabulary of 128 thousand.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from upcycle import partitioning
from upcycle.models import memory
from upcycle.models.losses import target_sums

Sums = dict[str, jax.Array]

# By the compiler's account for TPU v5p: chunks of fewer tokens take longer, since each reads the kernel and adds to its gradient;
# of small vocabularies larger chunks save little memory.
_TOKENS = 1024
_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Head:
    """The last layer of a model.

    Attributes:
      kernel: float32 (D, V), or (V, D) if it is the embedding.
      axes: logical axes of the kernel.
      logits: computes float32 (..., V) from the kernel and (..., D). It holds no arrays.
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
    chunk: int | Literal['auto'] | None,
    z_loss: float,
    label_smoothing: float,
) -> Sums:
    """Returns `losses.target_sums` of the head's logits.

    Of several chunks only `loss` has a derivative, by the kernel and by `x_BxLxD`. It is computed together with the loss and
    scaled in the backward pass, so that no product is computed twice. With a mesh each device takes its own tokens, and the
    kernel's gradient is summed over devices once.

    Args:
      head: see `Head`.
      x_BxLxD: input of the head.
      targets_BxL: int32.
      weights_BxL: of the targets.
      chunk: most tokens of a device whose logits are computed at once; None for all; 'auto' for 256 MiB of logits, and for no
        fewer than 1024 tokens.
      z_loss, label_smoothing: see `losses.cross_entropy`.
    """
    losses = {'z_loss': z_loss, 'label_smoothing': label_smoothing}

    def sums_of(kernel: jax.Array, x_NxD: jax.Array, targets_N: jax.Array, weights_N: jax.Array) -> Sums:
        logits_NxV = partitioning.constrain(head.logits(kernel, x_NxD), (None, 'vocab'))
        return target_sums(logits_NxV, targets_N, weights_N, **losses)

    shards = partitioning.batch_shards(partitioning.current_mesh())
    if x_BxLxD.shape[0] % shards:
        shards = 1
    chunks = _num_chunks(head, targets_BxL.size // shards, chunk)
    if chunks == 1:
        logits_BxLxV = head.logits(*memory.both_gradients(head.kernel, x_BxLxD))
        return target_sums(logits_BxLxV, targets_BxL, weights_BxL, **losses)
    kernel = partitioning.constrain(head.kernel, head.axes)
    parts = [_cut(array, shards, chunks) for array in (x_BxLxD, targets_BxL, weights_BxL)]
    sums = _summed(sums_of, head.axes, kernel, *parts)
    return {name: value if name == 'loss' else jax.lax.stop_gradient(value) for name, value in sums.items()}


def _num_chunks(head: Head, tokens: int, chunk: int | Literal['auto'] | None) -> int:
    if chunk == 'auto':
        chunk = max(_TOKENS, _BYTES // (4 * partitioning.split_size(head.axes, head.kernel.shape, 'vocab')))
    return 1 if chunk is None else max(1, -(-tokens // chunk))


def _cut(array_BxLx: jax.Array, shards: int, chunks: int) -> jax.Array:
    """Cuts each device's tokens into chunks, filled up with zeros: (chunks, shards, N, ...)."""
    rest = array_BxLx.shape[2:]
    own = array_BxLx.reshape(shards, -1, *rest)
    size = -(-own.shape[1] // chunks)
    own = jnp.pad(own, ((0, 0), (0, chunks * size - own.shape[1]), *((0, 0) for _ in rest)))
    cut = jnp.moveaxis(own.reshape(shards, chunks, size, *rest), 1, 0)
    return partitioning.constrain(cut, (None, 'batch', None, *(None for _ in rest)))


def _summed(sums_of: Callable[..., Sums], axes: tuple[str, str], *operands: jax.Array) -> Sums:
    """Adds `sums_of(kernel, x, targets, weights)` over chunks; the derivative of `loss` comes with it."""
    dtype = operands[1].dtype
    over_shards = {'in_axes': (None, 0, 0, 0), 'spmd_axis_name': partitioning.BATCH_AXES}
    sums_of_chunk = jax.vmap(sums_of, **over_shards)

    def forward(kernel: jax.Array, *parts: jax.Array) -> Sums:
        def body(total: Sums, part: Any) -> tuple[Sums, None]:
            return jax.tree.map(jnp.add, total, sums_of_chunk(kernel, *part)), None

        start = _zeros(sums_of_chunk, kernel, *(part[0] for part in parts))
        return jax.tree.map(jnp.sum, jax.lax.scan(body, start, parts)[0])

    def loss_of(kernel: jax.Array, x: jax.Array, *rest: jax.Array) -> tuple[jax.Array, Sums]:
        sums = sums_of(kernel, x, *rest)
        return sums['loss'], sums

    derivative = jax.vmap(jax.grad(loss_of, argnums=(0, 1), has_aux=True), **over_shards)

    def with_gradient(kernel: jax.Array, *parts: jax.Array) -> tuple[Sums, Any]:
        def of_chunk(kernel: jax.Array, x: jax.Array, *rest: jax.Array) -> tuple[tuple[jax.Array, Sums], jax.Array]:
            # In float32, so that the derivative is rounded once, after it is scaled.
            (dkernel, dx), sums = derivative(kernel, x.astype(jnp.float32), *rest)
            return (partitioning.constrain(dkernel, ('batch', *axes)), sums), dx

        def body(total: Any, part: Any) -> tuple[Any, jax.Array]:
            new, dx = of_chunk(kernel, *part)
            return jax.tree.map(jnp.add, total, new), dx

        start, _ = _zeros(of_chunk, kernel, *(part[0] for part in parts))
        (dkernel, sums), dx = jax.lax.scan(body, start, parts)
        return jax.tree.map(jnp.sum, sums), (dkernel.sum(axis=0), dx)

    def backward(kept: tuple[jax.Array, jax.Array], cotangents: Sums) -> tuple[jax.Array | None, ...]:
        dkernel, dx = kept
        scale = cotangents['loss']
        return scale * dkernel, (scale * dx).astype(dtype), None, None

    total = jax.custom_vjp(forward)
    total.defvjp(with_gradient, backward)
    return total(*operands)


def _zeros(function: Callable[..., Any], *operands: jax.Array) -> Any:
    """Returns zeros of the shapes of a function's results."""
    return jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), jax.eval_shape(function, *operands))
