"""Derivatives that hold less memory on TPUs, by the compiler's account (docs/performance.md); results do not change.

They rely on optimization barriers, which XLA:CPU drops: on CPUs the programs run, and hold more.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from upcycle import partitioning

# One layer: (parameters, x_BxLxD, arrays, keys, index of the iteration) -> (x_BxLxD, metrics).
Layer = Callable[[Any, jax.Array, Any, Any, jax.Array], tuple[jax.Array, Any]]


@jax.custom_jvp
def softmax(logits: jax.Array) -> jax.Array:
    """Softmax over the last axis that keeps its result only, where `jax.nn.softmax` keeps two arrays of that size.

    For attention without a kernel. On TPU v4 such a T5 Base with 32 experts had 12.5 GB of temporaries instead of 15.8.
    """
    return jax.lax.optimization_barrier(jax.nn.softmax(logits))


@softmax.defjvp
def _softmax_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    weights, (change,) = softmax(*primals), tangents
    return weights, weights * (change - (weights * change).sum(axis=-1, keepdims=True))


def recomputed(function: Callable[[Any, Any], jax.Array], rest: Any, xs: Any) -> jax.Array:
    """Returns `function(rest, xs)`, of which the backward pass keeps the arguments only.

    Unlike under `jax.checkpoint`, a policy of a surrounding `jax.checkpoint` still applies to what the function computes.
    T5 Base with 32 experts on v4, with attention in plain JAX: 12.1 GB of temporaries instead of 12.5, by the MLPs' activations.
    """
    run = jax.custom_vjp(function)

    def forward(rest: Any, xs: Any) -> tuple[jax.Array, Any]:
        return function(rest, xs), (rest, xs)

    def backward(kept: Any, dy: jax.Array) -> Any:
        rest, xs = kept
        # Without the barrier the compiler merges the recomputation with the forward pass, and keeps its values.
        xs, _ = jax.lax.optimization_barrier((xs, dy))
        return jax.vjp(function, rest, xs)[1](dy)

    run.defvjp(forward, backward)
    return run(rest, xs)


def both_gradients(kernel: jax.Array, x: Any) -> tuple[jax.Array, Any]:
    """Returns the operands of a matrix product, tied so that the backward pass continues only with both gradients.

    A compiler leaves the kernel's gradient for the end and holds the output's gradient until then: in T5 Large on v4 234 MB,
    that of the logits. It pays where that gradient is larger than the kernel's.
    """
    return jax.lax.optimization_barrier((kernel, x))


def replayed(
    layers: Sequence[Layer],
    stack: Callable[[Any], Any],
    block_axes: Any,
    params: Sequence[Sequence[Any]],
    x_BxLxD: jax.Array,
    arrays: Any,
    keys: Any,
    *,
    stack_again: bool,
) -> tuple[jax.Array, Any]:
    """Loops over rematerialised layers with few stacks of parameters: for T5 Large on v4, 6.9 GB of temporaries instead of 8.2.

    The backward pass keeps the layers' inputs and their routers' decisions, and writes gradients over the stacked parameters that
    it has read. JAX's derivative of `jax.lax.scan` would hold the stacks, and make others for the gradients.

    Args:
      layers: one block, each layer under `jax.checkpoint`, whose policy says what else is kept.
      stack: stacks `params`.
      block_axes: logical axes of each layer's parameters.
      params: for each layer of the block, its parameters in each iteration.
      x_BxLxD, arrays, keys: input; arrays for every layer; random keys by name.
      stack_again: stack the parameters anew in the backward pass, so that an encoder's are not held while the decoder runs.

    Returns:
      (B, L, D), and the stacked metrics of each layer of the block.
    """
    repeats = len(params[0])

    def forward(params, x_BxLxD, arrays, keys):
        # Not before the layers below are done: a compiler is free to stack a decoder's parameters while the encoder runs.
        params, x_BxLxD = jax.lax.optimization_barrier((params, x_BxLxD))
        stacked = stack(params)

        def body(x_BxLxD, xs):
            index, params = xs
            inputs, derivatives, metrics = [], [], []
            for layer, own in zip(layers, params, strict=True):
                inputs.append(x_BxLxD)
                (x_BxLxD, written), derivative = jax.vjp(layer, own, x_BxLxD, arrays, keys, index)
                derivatives.append(_without_arguments(derivative))
                metrics.append(written)
            return x_BxLxD, (inputs, derivatives, metrics)

        x_BxLxD, (inputs, derivatives, metrics) = jax.lax.scan(body, x_BxLxD, (jnp.arange(repeats), stacked))
        kept = params, None if stack_again else stacked, inputs, derivatives, arrays, keys
        return (x_BxLxD, metrics), kept

    def backward(kept, cotangents):
        params, stacked, inputs, derivatives, arrays, keys = kept
        dx_BxLxD, dmetrics = cotangents
        if stack_again:
            # Without a barrier the compiler would find that it has these stacks already, and hold them.
            params, dx_BxLxD = jax.lax.optimization_barrier((params, dx_BxLxD))
        again, unstack = jax.vjp(stack, params)

        def body(carry, xs):
            dx_BxLxD, darrays, stacks = carry
            index, inputs, derivatives, dmetrics = xs
            stacks = list(stacks)
            for j in reversed(range(len(layers))):
                # Barriers around each layer: else the compiler computes the layers below again while this one's activations are
                # held, or leaves its parameters' gradients for later.
                here = _taken(stacks[j], index), inputs[j], dx_BxLxD
                params, x_BxLxD, dx_BxLxD = jax.lax.optimization_barrier(here)
                derivative = _with_arguments(derivatives[j], [params, x_BxLxD, arrays, keys, index])
                dparams, dx_BxLxD, more, *_ = derivative((dx_BxLxD, dmetrics[j]))
                darrays = jax.tree.map(_add, darrays, more, is_leaf=lambda x: x is None)
                dparams, dx_BxLxD, darrays = jax.lax.optimization_barrier((dparams, dx_BxLxD, darrays))
                stacks[j] = _put(stacks[j], dparams, index, block_axes[j])
            return (dx_BxLxD, darrays, tuple(stacks)), None

        start = dx_BxLxD, jax.tree.map(_zeros, arrays), again if stack_again else stacked
        xs = jnp.arange(repeats), inputs, derivatives, dmetrics
        (dx_BxLxD, darrays, grads), _ = jax.lax.scan(body, start, xs, reverse=True)
        return *unstack(grads), dx_BxLxD, darrays, None

    loop = jax.custom_vjp(lambda *operands: forward(*operands)[0])
    loop.defvjp(forward, backward)
    return loop(params, x_BxLxD, arrays, keys)


def _zeros(x: jax.Array) -> jax.Array | None:
    """The start of a gradient's sum; None for an array without a gradient."""
    return jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.floating) else None


def _add(total: jax.Array | None, more: Any) -> jax.Array | None:
    return None if total is None else total + more


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Constant:
    """A constant of a traced program, among arrays."""

    value: Any


def _without_arguments(derivative: Any) -> Any:
    """Prepares a layer's derivative, from `jax.vjp`, for being stacked by one loop and read by another.

    The arguments are left out, since the other loop has them, and constants of the program are not stacked.
    """
    derivative.args_res = None
    kept = derivative.opaque_residuals
    derivative.opaque_residuals = [x if isinstance(x, jax.Array) else _Constant(x) for x in kept]
    return derivative


def _with_arguments(derivative: Any, arguments: list[Any]) -> Any:
    """Undoes `_without_arguments`."""
    derivative.args_res = arguments
    kept = derivative.opaque_residuals
    derivative.opaque_residuals = [x.value if isinstance(x, _Constant) else x for x in kept]
    return derivative


def _taken(stacks: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, index, keepdims=False), stacks)


def _put(stacks: Any, leaves: Any, index: jax.Array, axes: Any) -> Any:
    """Writes one layer's leaves into the stacks, which keep their places on the mesh."""

    def put(logical: PartitionSpec, stack: jax.Array, leaf: jax.Array) -> jax.Array:
        return partitioning.constrain_stack(jax.lax.dynamic_update_index_in_dim(stack, leaf, index, axis=0), logical)

    return jax.tree.map(put, axes, stacks, leaves)
