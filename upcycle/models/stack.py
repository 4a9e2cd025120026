"""A stack of layers: one after the other, rematerialised or not, or as one compiled block that is looped over.

Parameters are `layers_0`, `layers_1`, ... (T5) or `encoderblock_0`, ... (ViT) however the stack is compiled: a loop stacks them
on the way in, so that neither the surgery, nor the optimizer, nor a checkpoint knows about it, and a run can be resumed with the
other form.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from upcycle import partitioning
from upcycle.models.casting import needed_as_they_are
from upcycle.models.layers import PRODUCT
from upcycle.moe.all_to_all import CROSSED
from upcycle.moe.layer import METRICS
from upcycle.moe.routing import DECISION

ACTIVATIONS = ('batch', 'length', 'embed')


class Remat(enum.StrEnum):
    """What the backward pass computes again instead of keeping, layer by layer.

    Every form keeps the routers' decisions: recomputed activations are rounded differently, so that a router could choose other
    experts, and a token's gradient would go to an expert that never saw it. They are a few integers a token: with capacity
    factor 2, 8 bytes in an Expert Choice layer and 16 in a Top-2 layer.
    """

    NONE = 'none'
    MINIMAL = 'minimal'  # all but the products with weight matrices
    EXCHANGE = 'exchange'  # all but what crossed the network between expert shards
    FULL = 'full'  # all, the all-to-alls of expert parallelism included

    @property
    def keeps_attention_weights(self) -> bool:
        """While the backward pass is in a layer. They are the largest arrays there that are cheap to compute once more."""
        return self in (Remat.NONE, Remat.MINIMAL)


def _policy(remat: Remat):
    policies = jax.checkpoint_policies
    named = policies.save_only_these_names
    return {
        Remat.MINIMAL: policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, named(DECISION, CROSSED, PRODUCT)
        ),
        Remat.EXCHANGE: named(DECISION, CROSSED),
        Remat.FULL: named(DECISION),
    }[remat]


def apply_layers(
    parent: nn.Module,
    layer: type[nn.Module],
    config: Any,
    kinds: Sequence[Any],
    x_BxLxD: jax.Array,
    arrays: tuple[jax.Array | None, ...],
    switches: tuple[bool | int, ...],
    *,
    remat: Remat,
    scan: bool,
    last: bool,
    prefix: str = 'layers_',
) -> jax.Array:
    """Applies a stack of layers inside the compact method of `parent`.

    Args:
      parent: owns the parameters of the layers.
      layer: called as `layer(config, kind)(x, *arrays, *switches)`.
      config: of every layer. Its `dtype` is that of the activations.
      kinds: what tells one layer from another, such as its MoE.
      x_BxLxD: input.
      arrays: the same for every layer.
      switches: the same for every layer, static.
      remat: see `Remat`.
      scan: loop over blocks of equal layers.
      last: no other stack follows it, so that the backward pass begins with it.
      prefix: of the layers' names, before their number.

    Returns:
      (B, L, D).
    """
    module = layer
    if remat is not Remat.NONE:
        first = 2 + len(arrays)
        module = nn.remat(layer, policy=_policy(remat), static_argnums=tuple(range(first, first + len(switches))))
    scan = scan and not parent.is_initializing()
    for start, period, repeats in segments(kinds):
        if scan and repeats > 1:
            block = kinds[start : start + period]
            ends = last and start + period * repeats == len(kinds)
            x_BxLxD = _loop(
                parent, layer, config, block, start, repeats, x_BxLxD, arrays, switches, remat, ends, prefix
            )
            continue
        for i in range(start, start + period * repeats):
            x_BxLxD = module(config, kinds[i], name=f'{prefix}{i}')(x_BxLxD, *arrays, *switches)
            x_BxLxD = nn.with_logical_constraint(x_BxLxD, ACTIVATIONS)
    return x_BxLxD


def segments(kinds: Sequence[Any]) -> list[tuple[int, int, int]]:
    """Cuts a stack into repeated blocks: (first layer, layers in the block, repeats).

    The whole stack is one segment where it is periodic (every second layer sparse); else runs of equal layers are segments (the
    last half sparse).
    """
    depth = len(kinds)
    for period in range(1, depth // 2 + 1):
        if depth % period == 0 and all(kinds[i] == kinds[i % period] for i in range(depth)):
            return [(0, period, depth // period)]
    starts = [i for i in range(depth) if i == 0 or kinds[i] != kinds[i - 1]]
    ends = [*starts[1:], depth][: len(starts)]
    return [(start, 1, end - start) for start, end in zip(starts, ends, strict=True)]


def _loop(
    parent: nn.Module,
    layer: type[nn.Module],
    config: Any,
    block: Sequence[Any],
    start: int,
    repeats: int,
    x_BxLxD: jax.Array,
    arrays: tuple[jax.Array | None, ...],
    switches: tuple[bool | int, ...],
    remat: Remat,
    last: bool,
    prefix: str,
) -> jax.Array:
    """`repeats` blocks of layers as a scan over their stacked parameters."""
    params = parent.variables['params']
    period = len(block)
    keys = {name: parent.make_rng(name) for name in ('dropout', 'jitter') if parent.has_rng(name)}

    def axes(j: int) -> Any:
        def init() -> Any:
            return layer(config, block[j], parent=None).init(
                {'params': jax.random.key(0), **keys}, x_BxLxD, *arrays, *switches
            )

        return partitioning.logical_axes(jax.eval_shape(init)['params'])

    block_axes = tuple(axes(j) for j in range(period))
    own = tuple([params[f'{prefix}{start + r * period + j}'] for r in range(repeats)] for j in range(period))

    def layer_of(j: int) -> LayerOfLoop:
        def apply(params, x_BxLxD, arrays, keys, index):
            layer_keys = {name: jax.random.fold_in(key, index * period + j) for name, key in keys.items()}
            x_BxLxD, metrics = layer(config, block[j], parent=None).apply(
                {'params': params}, x_BxLxD, *arrays, *switches, rngs=layer_keys, mutable=[METRICS]
            )
            return nn.with_logical_constraint(x_BxLxD, ACTIVATIONS), metrics.get(METRICS, {})

        return apply

    layers = tuple(layer_of(j) for j in range(period))
    dtypes = tuple(
        _stack_dtypes(layer, config.dtype, params[0], x_BxLxD, arrays, keys, jnp.zeros((), jnp.int32))
        for layer, params in zip(layers, own, strict=True)
    )
    if remat is not Remat.NONE:
        layers = tuple(jax.checkpoint(layer, policy=_policy(remat), prevent_cse=False) for layer in layers)
    stack = functools.partial(_stack_block, block_axes=block_axes, dtypes=dtypes)
    if remat is Remat.FULL:
        x_BxLxD, written = _replayed(layers, stack, block_axes, own, x_BxLxD, arrays, keys, stack_again=not last)
    else:
        x_BxLxD, written = _scan(layers, stack(own), x_BxLxD, arrays, keys)
    if parent.is_mutable_collection(METRICS):
        for j, metrics in enumerate(written):
            for r in range(repeats if metrics else 0):
                here = jax.tree.map(lambda leaf, r=r: leaf[r], metrics)
                parent.put_variable(METRICS, f'{prefix}{start + r * period + j}', here)
    return x_BxLxD


# One layer: (parameters, x_BxLxD, arrays, keys, iteration) -> (x_BxLxD, what it wrote into METRICS).
LayerOfLoop = Callable[[Any, jax.Array, Any, Any, jax.Array], tuple[jax.Array, Any]]


def _scan(
    layers: Sequence[LayerOfLoop], stacked: Any, x_BxLxD: jax.Array, arrays: Any, keys: Any
) -> tuple[jax.Array, Any]:
    """The loop: (B, L, D), and, stacked, what each layer wrote."""

    def body(x_BxLxD, xs):
        index, params = xs
        written = []
        for layer, own in zip(layers, params, strict=True):
            x_BxLxD, metrics = layer(own, x_BxLxD, arrays, keys, index)
            written.append(metrics)
        return x_BxLxD, written

    repeats = jax.tree.leaves(stacked)[0].shape[0]
    return jax.lax.scan(body, x_BxLxD, (jnp.arange(repeats), stacked))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Constant:
    """A constant of a traced program, among arrays."""

    value: Any


def _replayed(
    layers: Sequence[LayerOfLoop],
    stack: Callable[[Any], Any],
    block_axes: Any,
    params: Any,
    x_BxLxD: jax.Array,
    arrays: Any,
    keys: Any,
    *,
    stack_again: bool,
) -> tuple[jax.Array, Any]:
    """The loop with `Remat.FULL`, with as few stacks as possible: they are what a loop costs in memory.

    Kept are the layers' inputs and their routers' decisions. The backward pass writes gradients over the stacked parameters: each
    of its iterations is the last to read its layers' parameters, whose gradients have the same shapes and types. With
    `stack_again` it stacks the parameters anew, so that an encoder's stacks are not held while the decoder runs. JAX's own
    derivative of `_scan` would hold the stacks, and make others for the gradients.

    `layers` are under `jax.checkpoint`, whose policy says what else is kept.
    """
    leaves, structure = jax.tree.flatten(arrays)
    has_gradient = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    floats, others = (
        [x for x, yes in zip(leaves, has_gradient, strict=True) if bool(yes) is kind] for kind in (True, False)
    )

    layers = [_with_floats_apart(apply, structure, has_gradient) for apply in layers]

    def forward(params, x_BxLxD, floats, others, keys):
        # Not before the layers below are done: a compiler is free to stack a decoder's parameters while the encoder runs.
        params, x_BxLxD = jax.lax.optimization_barrier((params, x_BxLxD))
        stacked = stack(params)

        def body(x_BxLxD, xs):
            index, params = xs
            inputs, derivatives, written = [], [], []
            for layer, own in zip(layers, params, strict=True):
                inputs.append(x_BxLxD)
                (x_BxLxD, metrics), derivative = jax.vjp(layer, own, x_BxLxD, floats, others, keys, index)
                derivatives.append(_without_arguments(derivative))
                written.append(metrics)
            return x_BxLxD, (inputs, derivatives, written)

        x_BxLxD, (inputs, derivatives, written) = jax.lax.scan(body, x_BxLxD, (_indices(stacked), stacked))
        kept = params, None if stack_again else stacked, inputs, derivatives, floats, others, keys
        return (x_BxLxD, written), kept

    def backward(kept, cotangents):
        params, stacked, inputs, derivatives, floats, others, keys = kept
        dx_BxLxD, dwritten = cotangents
        if stack_again:
            # Without a barrier the compiler would find that it has these stacks already, and hold them.
            params, dx_BxLxD = jax.lax.optimization_barrier((params, dx_BxLxD))
        again, unstack = jax.vjp(stack, params)
        stacked = again if stack_again else stacked

        def body(carry, xs):
            dx_BxLxD, dfloats, stacks = carry
            index, inputs, derivatives, dwritten = xs
            stacks = list(stacks)
            for j in reversed(range(len(layers))):
                # One layer at a time, its parameters' gradients included: else the compiler computes the layers below again while
                # this one's activations are held.
                here = _taken(stacks[j], index), inputs[j], dx_BxLxD
                params, x_BxLxD, dx_BxLxD = jax.lax.optimization_barrier(here)
                derivative = _with_arguments(derivatives[j], [params, x_BxLxD, floats, others, keys, index])
                dparams, dx_BxLxD, more, *_ = derivative((dx_BxLxD, dwritten[j]))
                dparams, dx_BxLxD, more = jax.lax.optimization_barrier((dparams, dx_BxLxD, more))
                dfloats = jax.tree.map(jnp.add, dfloats, more)
                stacks[j] = _put(stacks[j], dparams, index, block_axes[j])
            return (dx_BxLxD, dfloats, tuple(stacks)), None

        start = dx_BxLxD, jax.tree.map(jnp.zeros_like, floats), stacked
        kept = _indices(stacked), inputs, derivatives, dwritten
        (dx_BxLxD, dfloats, grads), _ = jax.lax.scan(body, start, kept, reverse=True)
        return *unstack(grads), dx_BxLxD, dfloats, None, None

    loop = jax.custom_vjp(lambda *operands: forward(*operands)[0])
    loop.defvjp(forward, backward)
    return loop(params, x_BxLxD, floats, others, keys)


def _indices(stacked: Any) -> jax.Array:
    """The numbers of a loop's iterations."""
    return jnp.arange(jax.tree.leaves(stacked)[0].shape[0])


def _with_floats_apart(apply: LayerOfLoop, structure: Any, has_gradient: Sequence[bool]) -> Callable[..., Any]:
    """The layer as a function of its arrays that have a gradient, and of the others."""

    def layer(params, x_BxLxD, floats, others, keys, index):
        sources = {True: iter(floats), False: iter(others)}
        arrays = jax.tree.unflatten(structure, [next(sources[yes]) for yes in has_gradient])
        return apply(params, x_BxLxD, arrays, keys, index)

    return layer


def _without_arguments(derivative: Any) -> Any:
    """A layer's derivative, as `jax.vjp` returns it, as one loop hands it to another.

    It goes without the layer's arguments, which are there already, and is not stacked where it is a constant of the program.
    """
    derivative.args_res = None
    kept = derivative.opaque_residuals
    derivative.opaque_residuals = [x if isinstance(x, jax.Array) else _Constant(x) for x in kept]
    return derivative


def _with_arguments(derivative: Any, arguments: list[Any]) -> Any:
    """What `_without_arguments` made, as it was."""
    derivative.args_res = arguments
    kept = derivative.opaque_residuals
    derivative.opaque_residuals = [x.value if isinstance(x, _Constant) else x for x in kept]
    return derivative


def _taken(stacks: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, index, keepdims=False), stacks)


def _put(stacks: Any, leaves: Any, index: jax.Array, axes: Any) -> Any:
    """The stacks with one layer's leaves at an index, lying on the mesh as they did."""

    def put(logical: PartitionSpec, stack: jax.Array, leaf: jax.Array) -> jax.Array:
        return partitioning.constrain_stack(jax.lax.dynamic_update_index_in_dim(stack, leaf, index, axis=0), logical)

    return jax.tree.map(put, axes, stacks, leaves, is_leaf=_is_axes)


def _is_axes(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _stack_dtypes(layer: LayerOfLoop, dtype: Any, params: Any, *arguments: Any) -> Any:
    """For each parameter of a layer, the type of its stack.

    It is `dtype` where the layer itself does nothing with the parameter but cast it to that type: cast first it is the same
    number, and half as large. Any other one is stacked as it is, since a layer that is not in a loop reads it so.
    """
    as_they_are = needed_as_they_are(layer, dtype, params, *arguments)
    return jax.tree.map(lambda leaf, keep: leaf.dtype if keep else jnp.dtype(dtype), params, as_they_are)


def _stack_block(params: Sequence[Sequence[Any]], block_axes: Sequence[Any], dtypes: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_stack(layers, *how) for layers, *how in zip(params, block_axes, dtypes, strict=True))


def _stack(layers: Sequence[Any], axes: Any, dtypes: Any) -> Any:
    """Stacked parameters, each in the type of its stack.

    A stack lies on the mesh as its parameters do, and so does its gradient, which the compiler would else be free to lay out
    along another axis, and to move from there in every step.
    """

    def stack(logical: PartitionSpec, dtype: Any, *leaves: jax.Array) -> jax.Array:
        return partitioning.constrain_stack(jnp.stack([leaf.astype(dtype) for leaf in leaves]), logical)

    return jax.tree.map(stack, axes, dtypes, *layers, is_leaf=_is_axes)
